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

    A layer without the active adapter answers with the base module.
    """

    adapter_layer_names: tuple[str, ...] = ("surgical_copies",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)  # the wrapper class's own __init__ would register the module under another name
        self.base_layer = base_layer
        self.surgical_copies = nn.ModuleDict()
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str) -> None:
        """Add a copy of the base module for `adapter_name`."""
        self.base_layer.requires_grad_(False)
        tuned = copy.deepcopy(self.base_layer)
        tuned.requires_grad_(adapter_name in self.active_adapters)
        self.surgical_copies[adapter_name] = tuned

    @property
    def _adapters(self) -> set[str]:
        return set(self.surgical_copies)

    def module_in_use(self) -> nn.Module:
        """The copy of the active (or merged) adapter, else the base module."""
        if self._disable_adapters:
            return self.base_layer
        active = [name for name in self.merged_adapters or self.active_adapters if name in self.surgical_copies]
        if len(active) > 1:
            raise SurgicalError(f"adapters {active} tune the same block; a full copy cannot be added to another: use one.")
        return self.surgical_copies[active[0]] if active else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged:
            self.unmerge()
        return self.module_in_use()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):  # not built yet, e.g. while unpickling
                raise
        return getattr(self.module_in_use(), name)

    @property
    def weight(self) -> torch.Tensor:  # PEFT's property would answer with the base weight, not the tuned one
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
        if adapter_name in self.surgical_copies:
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
                    raise SurgicalError(f"NaNs detected in the merged weights: {name} of adapter {names[0]!r}.")
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge and not self.merged:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        module = self.surgical_copies[self.merged_adapters[0]] if self.merged else self.base_layer
        return module.requires_grad_(False)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tuned weights under the base module's own names: no container, no adapter name."""
        prefix = f"surgical_copies.{adapter_name}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.surgical_copies:
            return {}
        prefix = f"surgical_copies.{adapter_name}."
        return {key: prefix + key for key in self.surgical_copies[adapter_name].state_dict()}

    def __repr__(self) -> str:
        return "surgical." + nn.Module.__repr__(self)
