"""The wrapper that stands in for a tuned module."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .errors import SurgicalError


class SurgicalLayer(BaseTunerLayer, AuxiliaryTrainingWrapper):
    """A whole module of the base model and, per adapter, a full copy of it that is trained instead.

    Both of PEFT's wrapper classes at once: a `BaseTunerLayer`, because it is what the tuner injects, switches and
    merges; an `AuxiliaryTrainingWrapper`, because that is how PEFT and transformers save and load full weights under
    the base model's own names (see `adapter_state_dict`). Everything else that is asked of it, it asks the module in
    use, so a model may read `layer.attention_type` or `layer.weight` as before.

    A layer without the active adapter answers with the original module.
    """

    adapter_layer_names: tuple[str, ...] = ("surgical_copies",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, original_module: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)  # the wrapper class's own __init__ would set `_adapters`, a property here
        # Not `base_layer`: where PEFT finds an embedding under that name, it saves the original beside the copy.
        self.original_module = original_module
        self.surgical_copies = nn.ModuleDict()
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str) -> None:
        """Add a copy of the original module for `adapter_name`."""
        self.original_module.requires_grad_(False)
        tuned = copy.deepcopy(self.original_module)
        tuned.requires_grad_(adapter_name in self.active_adapters)
        self.surgical_copies[adapter_name] = tuned

    @property
    def _adapters(self) -> set[str]:
        return set(self.surgical_copies)

    def get_base_layer(self) -> nn.Module:
        return self.original_module

    def module_in_use(self) -> nn.Module:
        """The copy of the active (or merged) adapter, else the original module."""
        if self._disable_adapters:
            return self.original_module
        active = [name for name in self.merged_adapters or self.active_adapters if name in self.surgical_copies]
        if len(active) > 1:
            raise SurgicalError(
                f"adapters {active} tune the same block; a full copy cannot be added to another: use one."
            )
        return self.surgical_copies[active[0]] if active else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module_in_use()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):  # not built yet, e.g. while unpickling
                raise
        return getattr(self.module_in_use(), name)

    @property
    def weight(self) -> torch.Tensor:  # PEFT's property would answer with the original weight, not the tuned one
        return self.module_in_use().weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor:
        return self.module_in_use().bias  # type: ignore[return-value]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        here = [name for name in names if name in self.surgical_copies]
        if len(here) > 1:
            raise SurgicalError(f"adapters {here} tune the same block and cannot be active at once: set one of them.")
        return here[0] if here else None

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # PEFT deletes once as a tuner layer and once more, with the second argument, as an auxiliary wrapper.
    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        BaseTunerLayer.delete_adapter(self, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Answer with the tuned copy from now on, whatever adapter is active; no weight moves, so unmerging is exact.

        Raises:
            SurgicalError: two adapters at once, or, with `safe_merge`, a tuned weight that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.surgical_copies]
        if not names:
            return
        if len(names) > 1 or self.merged:
            both = [*self.merged_adapters, *names]
            raise SurgicalError(f"adapters {both} tune the same block; merge one, or unmerge the other first.")
        if safe_merge:
            for name, weight in self.surgical_copies[names[0]].named_parameters():
                if not torch.isfinite(weight).all():
                    raise SurgicalError(f"{name} of adapter {names[0]!r} has NaN or infinite weights: not merged.")
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        # SurgicalModel has merged already if that was asked for
        module = self.surgical_copies[self.merged_adapters[0]] if self.merged else self.original_module
        return module.requires_grad_(False)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tuned weights under the original module's own names: no container, no adapter name."""
        prefix = f"surgical_copies.{adapter_name}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.surgical_copies:
            return {}
        prefix = f"surgical_copies.{adapter_name}."
        return {key: prefix + key for key in self.surgical_copies[adapter_name].state_dict()}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT goes by `base_layer.weight`, which a whole block does not have; dtypes may differ within one
        if adapter_name not in self.surgical_copies:
            return
        original = self.original_module.state_dict(keep_vars=True)
        for key, tensor in self.surgical_copies[adapter_name].state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(device or original[key].device, original[key].dtype)

    def __repr__(self) -> str:
        return "surgical." + nn.Module.__repr__(self)
