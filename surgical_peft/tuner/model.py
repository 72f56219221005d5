"""The tuner: gives adapters tensors of their own in the chosen blocks, and switches, merges and unwraps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..blocks.unwrap import named_bare_modules, unwrap_module
from ..criteria.criterion import reshard
from ..errors import SurgicalError
from .attach import restore_requires_grad
from .eval_mode import eval_frozen
from .gradient_checkpointing import pause_prefix_skipping, restore_checkpointing, skip_frozen_prefix
from .layer import NO_BASE, SurgicalLayer
from .mixed_batches import check_rows, rows_by_adapter
from .peft_hooks import PeftHooks
from .quantization import FloatLinear, note_float_layers, unpack
from .tensors.slots import BASE

_NO_HOOKS = nullcontext()  # entered at every call of the model


class SurgicalModel(PeftHooks):
    """Puts a `SurgicalLayer` into each module that owns tuned tensors.

    Users do not build it: `peft.get_peft_model(model, SurgicalConfig(blocks=[0, 1]))` does.
    """

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all or nothing: a refused merge leaves no layer merged.

        Raises:
            SurgicalError: an unknown adapter, or what `SurgicalLayer.merge` refuses.
        """
        unknown = [name for name in adapter_names or [] if name not in self.peft_config]
        if unknown:
            raise SurgicalError(f"adapter {unknown[0]!r} does not exist. Adapters: {', '.join(self.peft_config)}.")
        reshard(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except (SurgicalError, ValueError):  # PEFT's own LoRA layers raise the second
            for layer, merged in zip(layers, before, strict=True):
                if isinstance(layer, SurgicalLayer):
                    layer.merged_adapters = merged
                    layer.arrange()
                elif layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:  # that took out the earlier ones, too
                        layer.merge(adapter_names=merged)
            raise

    def unmerge_adapter(self) -> None:
        """As PEFT's."""
        reshard(self.model)
        super().unmerge_adapter()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: adapters are whole weights here, not differences that could be added up.

        Raises:
            SurgicalError: always.
        """
        raise SurgicalError(
            "add_weighted_adapter: adapters of SURGICAL are whole weights, of which no sum is made. Average the "
            "tensors of the saved files yourself and load the result, or export them with --format lora and add those."
        )

    def disable_adapter_layers(self) -> None:
        """As PEFT's.

        Raises:
            SurgicalError: there is no base to go back to (`keep_base="none"`).
        """
        self.check_base_kept()
        reshard(self.model)
        self._keep_labels(self.active_adapters)
        self._name_labels([BASE])
        super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """As PEFT's."""
        reshard(self.model)
        was_disabled = self._is_disabled()
        super().enable_adapter_layers()
        if was_disabled:
            self._name_labels(self.active_adapters)

    @contextmanager
    def base_standing(self) -> Iterator[None]:
        """Inside, the base's own weights stand in the model, whatever is active or merged.

        Raises:
            SurgicalError: there is no base to go back to (`keep_base="none"`), or it is quantized where it was tuned.
        """
        self.check_base_kept()
        if any(isinstance(module, FloatLinear) for module in self.model.modules()):
            raise SurgicalError(
                "the chosen blocks are quantized in the base model, and stand in float beside it: their base weights "
                "are no entries of a state dict. Load the base model afresh."
            )
        reshard(self.model)
        layers = list(self.layers())
        try:
            for layer in layers:
                layer.stand([])
            yield
        finally:
            for layer in layers:
                layer.arrange()

    def check_base_kept(self) -> None:
        """Refuse what needs the base's weights where they are not kept.

        Raises:
            SurgicalError: `keep_base="none"`.
        """
        if any(not layer.keeps_base for layer in self.layers()):
            raise SurgicalError(NO_BASE)

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, num_beams: int = 1, **kwargs: Any
    ) -> AbstractContextManager[None]:
        """Sends the rows of a mixed batch through the adapters in `adapter_names`, as PEFT does for LoRA.

        Raises:
            SurgicalError: an unknown name, not one for each row, or a model in train mode or merged.
        """
        if self.training:  # again, for who puts `training` back without a call of `train`, as Lightning does
            skip_frozen_prefix(unwrap_module(self.model))
        if adapter_names is None:
            return _NO_HOOKS
        if "__base__" in adapter_names:
            self.check_base_kept()
        check_rows(self.model, list(self.peft_config), adapter_names, [*args, *kwargs.values()])
        paths = dict.fromkeys(path for config in self.peft_config.values() for path in config.tuned_modules or ())
        return rows_by_adapter(unwrap_module(self.model), adapter_names, num_beams or 1, paths)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            self.check_base_kept()
            self._name_labels([BASE])
            for module in self.model.modules():
                if isinstance(module, SurgicalLayer):
                    module.merged_adapters.clear()
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    module._active_adapter = []  # PEFT would leave the tuned head in the base
        else:  # first, so that nothing is unwrapped yet when a layer refuses
            self.merge_adapter(adapter_names, safe_merge)
            if adapter_names or self._is_disabled():
                self._keep_labels(self.active_adapters)
                self._name_labels(adapter_names or self.active_adapters)
        reshard(self.model)
        layers = list(self.layers())
        in_float = [layer.get_base_layer() for layer in layers if layer.merged]
        for layer in layers:
            layer.give_back()
        unpack(unwrap_module(self.model), in_float)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        bare_model = unwrap_module(model)
        note_float_layers(bare_model)
        restore_checkpointing(bare_model)
        restore_requires_grad(bare_model, self._requires_grad or {})
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; if the active adapter goes, the next one is active in all layers."""
        self.check_base_kept()
        reshard(self.model)
        was_active, loras = adapter_name in self.active_adapters, self._lora_layers()
        super().delete_adapter(adapter_name)
        self._labels.pop(adapter_name, None)
        for layer in loras:
            layer.delete_adapter(adapter_name)
        if was_active and not self._is_disabled():
            self._name_labels(self.active_adapters or [BASE])
        if was_active and self.peft_config:  # PEFT lets each layer choose by itself, and believes the first
            self.set_adapter(self.active_adapters or [next(iter(self.peft_config))])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, but all or nothing; in train mode, other blocks are now the tuned ones."""
        self._attach()
        for each in self.layers():
            each.check_set_adapter(adapter_name)
        reshard(self.model)
        before = self.active_adapters
        super().set_adapter(adapter_name, inference_mode)
        self._keep_labels(name for name in before if name not in self.active_adapters)
        for layer in self._lora_layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode)
        if not self._is_disabled():
            self._name_labels(name for name in self.active_adapters if name not in before)
        self._renew_modes()

    def _lora_layers(self) -> list[LoraLayer]:
        """The LoRA layers that belong to adapters of ours; a model may have others besides."""
        names = {name for name, config in self.peft_config.items() if config.peft_type == "SURGICAL" and config.lora}
        layers = [module for module in self.model.modules() if names and isinstance(module, LoraLayer)]
        return [layer for layer in layers if names.intersection(layer._all_available_adapter_names())]

    def train(self, mode: bool = True) -> SurgicalModel:
        """Set train mode; frozen dropout and statistics stay in eval mode, unless `frozen_eval=False` was said."""
        super().train(mode)
        (skip_frozen_prefix if mode else pause_prefix_skipping)(unwrap_module(self.model))
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if mode and active and all(config.frozen_eval for config in active):
            modules = dict(named_bare_modules(self.model))
            # of a parameter that no module has to itself, only that module is tuned, not what else is in it
            whole = {
                path
                for config in active
                for path, names in (config.tuned_modules or {}).items()
                if names is None or any("." in name for name in names)
            }
            eval_frozen(self.model, [modules[path] for path in whole if path in modules])
        return self

    def _renew_modes(self) -> None:
        if self.model.training:
            self.train()
