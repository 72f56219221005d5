"""The wrapper that stands in for a tuned module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn

from .errors import SurgicalError
from .keys import LoadMap, saved_keys
from .mixed_batches import run_by_rows
from .original import NO_BASE, KeepsOriginal, fixed_by_architecture
from .quantised import in_float, is_packed


class SurgicalLayer(KeepsOriginal, BaseTunerLayer, AuxiliaryTrainingWrapper):
    """A whole module of the base model and, per adapter, a full copy of it that is trained instead.

    Both of PEFT's wrapper classes at once: a `BaseTunerLayer`, because it is what the tuner injects, switches and
    merges; an `AuxiliaryTrainingWrapper`, because that is how PEFT and transformers save and load full weights under
    the base model's own names (see `adapter_state_dict`). Everything else that is asked of it, it asks the module in
    use, so a model may read `layer.attention_type` or `layer.weight` as before.

    A layer without the active adapter answers with the original module.

    Args:
        original_module: the module to tune.
        adapter_name: the first adapter's name.
        tuned: names of the parameters that adapter trains and saves; its copy shares the others with the original.
            None is all of them.
        keep_base: where the original stays (see [`SurgicalConfig`][surgical_peft.SurgicalConfig]): beside the copy,
            on the CPU until it is asked for, or nowhere, in which case the module itself is trained.
        empty: make the copy on the meta device, for weights that are loaded next (PEFT's `low_cpu_mem_usage`).
    """

    adapter_layer_names: tuple[str, ...] = ("surgical_copies",)
    other_param_names: tuple[str, ...] = ()

    def __init__(
        self,
        original_module: nn.Module,
        adapter_name: str,
        tuned: Collection[str] | None = None,
        keep_base: str = "device",
        empty: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # the wrapper class's own __init__ would set `_adapters`, a property here
        self.surgical_copies = nn.ModuleDict()
        self.keep_base = keep_base
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._lent: list[nn.Module] = []  # in a list, so that it is no submodule
        self._tuned_names: dict[str, set[str]] = {}
        self._wrapped_on = next((p.device for p in original_module.parameters()), None)
        if not hasattr(original_module, "in_features"):  # PEFT reads both off every layer; None where they say nothing
            with warnings.catch_warnings():  # of a block, for which they do not
                warnings.simplefilter("ignore")
                self.in_features, self.out_features = _get_in_out_features(original_module)
        self._fixed = fixed_by_architecture(original_module)
        original_module.requires_grad_(False)
        if keep_base == "none":
            self._add(adapter_name, in_float(original_module), tuned)
            return
        # Not `base_layer`: where PEFT finds an embedding under that name, it saves the original beside the copy.
        self.original_module = original_module
        self.update_layer(adapter_name, tuned, empty)

    def update_layer(self, adapter_name: str, tuned: Collection[str] | None = None, empty: bool = False) -> None:
        """Add a copy of the original module for `adapter_name`; its arguments are those of the class."""
        original = self.original_on(self.device_in_use())
        ready: dict[int, nn.Parameter] = {}  # what is not copied: shared with the original, or to be loaded
        with gather_params_ctx(list(original.parameters()), modifier_rank=None):  # that ZeRO-3 has dealt out
            for name, parameter in original.named_parameters():
                if tuned is not None and name not in tuned:
                    ready[id(parameter)] = parameter
                elif empty and not is_packed(parameter):
                    ready[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            module = in_float(copy.deepcopy(original, ready))
        self._add(adapter_name, module, tuned)
        self._park()

    def _add(self, adapter_name: str, module: nn.Module, tuned: Collection[str] | None) -> None:
        names = {name for name, _ in module.named_parameters()}
        self._tuned_names[adapter_name] = names if tuned is None else names & set(tuned)
        self.surgical_copies[adapter_name] = module
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters)

    @property
    def _adapters(self) -> set[str]:
        return set(self.surgical_copies)

    def get_base_layer(self) -> nn.Module:
        return self.original_module if self.keeps_base else next(iter(self.surgical_copies.values()))

    def module_in_use(self) -> nn.Module:
        """The copy of the active (or merged) adapter, else the original module."""
        names = self.merged_adapters or self._active_adapter
        if len(names) == 1 and not self._disable_adapters:  # the usual case, at every call: no list is made
            copy_in_use = self._modules["surgical_copies"]._modules.get(names[0])  # type: ignore[union-attr]
            if copy_in_use is not None:
                return copy_in_use
        active = self._names_in_use()
        if len(active) > 1:
            raise SurgicalError(
                f"adapters {active} tune the same block; a full copy cannot be added to another: use one."
            )
        if active:
            return self._modules["surgical_copies"]._modules[active[0]]  # type: ignore[union-attr,return-value]
        return self.original_on(self.device_in_use())

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.module_in_use()(*args, **kwargs)
        original = self.original_on(self.device_in_use())
        module_of = dict.fromkeys(adapter_names, original) | dict(self.surgical_copies.items())
        return run_by_rows([module_of[name] for name in adapter_names], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "original_module" not in modules and not modules.get("surgical_copies"):  # not built yet
                raise
        if name == "original_module":
            raise AttributeError(NO_BASE)
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

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_set_adapter(names)  # transformers does not ask before
        if not self.keeps_base and not any(name in self.surgical_copies for name in names):
            raise SurgicalError(NO_BASE)
        BaseTunerLayer.set_adapter(self, names, inference_mode)
        self._freeze_rest()
        self._lent.clear()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        BaseTunerLayer.set_requires_grad(self, adapter_names, requires_grad)
        self._freeze_rest()

    def _freeze_rest(self) -> None:
        for adapter, module in self.surgical_copies.items():
            trained = self._tuned_names[adapter] - self._fixed
            for name, parameter in module.named_parameters():
                if name not in trained:
                    parameter.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and not self.keeps_base:
            raise SurgicalError(NO_BASE)
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # PEFT deletes once as a tuner layer and once more, with the second argument, as an auxiliary wrapper.
    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        if not self.keeps_base:
            raise SurgicalError(NO_BASE)
        self._tuned_names.pop(adapter_name, None)
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
                    raise SurgicalError(  # PEFT's words, for who looks for them
                        f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken: {name} has "
                        "NaN or infinite values. Nothing is merged."
                    )
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
        return {
            key: state_dict[full]
            for key, full in self.adapter_state_dict_load_map(adapter_name).items()
            if full in state_dict
        }

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.surgical_copies:
            return {}
        keys = saved_keys(self.surgical_copies[adapter_name], self._tuned_names[adapter_name])
        return LoadMap((key, f"surgical_copies.{adapter_name}.{key}") for key in keys)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT goes by `base_layer.weight`, which a whole block does not have; dtypes may differ within one
        if adapter_name not in self.surgical_copies or not self.keeps_base:
            return
        original = self.original_module.state_dict(keep_vars=True)
        for key, tensor in self.surgical_copies[adapter_name].state_dict(keep_vars=True).items():
            home = self._wrapped_on if self.keep_base == "cpu" else original[key].device
            tensor.data = tensor.data.to(device or home, original[key].dtype)

    def __repr__(self) -> str:
        return "surgical." + nn.Module.__repr__(self)


def forget_shared(tuner: nn.Module, incompatible: Any) -> None:
    """Strike what copies share with the original from the keys that a loaded adapter lacks: it is in no file."""
    shared = tuple(
        f"{path}.surgical_copies.{adapter}.{name}"
        for path, layer in tuner.named_modules()
        if isinstance(layer, SurgicalLayer)
        for adapter, module in layer.surgical_copies.items()
        for name, _ in module.named_parameters()
        if name not in layer._tuned_names[adapter]
    )
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(shared)]
