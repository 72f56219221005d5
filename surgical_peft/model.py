"""The tuner: wraps the modules of the chosen blocks, and switches, merges and unwraps them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .batches import LossFunction
from .checkpointing import mend_checkpointing, pause_mending, restore_checkpointing
from .choosing import choose_blocks
from .config import SurgicalConfig
from .errors import SurgicalError
from .fit import check_base, check_fit, prepare_loading, remap
from .layer import SurgicalLayer, forget_shared
from .lora import check_lora, inject_lora
from .mixed_batches import check_rows, rows_by_adapter
from .original import NO_BASE, note_trainable
from .targets import check_adapter_names, modules_to_tune
from .wrappers import seen_through

_NO_HOOKS = nullcontext()  # entered at every call of the model


class SurgicalModel(BaseTuner):
    """Puts a [`SurgicalLayer`][surgical_peft.layer.SurgicalLayer] in the place of each chosen module.

    Users do not build it: `peft.get_peft_model(model, SurgicalConfig(blocks=[0, 1]))` does.
    """

    prefix = "surgical_"
    tuner_layer_cls = SurgicalLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(forget_shared)

    def _prepare_adapter_config(self, peft_config: SurgicalConfig, model_config: dict[str, Any]) -> SurgicalConfig:
        return peft_config  # PEFT would look up default target modules by model type; ours are said in blocks

    def _prepare_model(self, peft_config: SurgicalConfig, model: nn.Module) -> None:
        # Names become modules here, once, before anything is changed. They are not put into target_modules: PEFT
        # condenses a list of 20 and more to suffixes, which would match other blocks too.
        try:
            self._look_before_wrapping(peft_config, model)
        except Exception:  # transformers' models share their dictionary with the tuner, which has the new name already
            layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
            for name in [name for name, config in self.peft_config.items() if config is peft_config][-1:]:
                if not any(name in layer.surgical_copies for layer in layers):
                    del self.peft_config[name]
            raise

    def _look_before_wrapping(self, peft_config: SurgicalConfig, model: nn.Module) -> None:
        check_adapter_names(model, self.peft_config, peft_config)
        saved = prepare_loading(model, peft_config)
        self._targets = modules_to_tune(model, peft_config)
        if peft_config.lora:
            check_lora(model, peft_config, self._targets)
        if saved is not None:
            check_fit(model, peft_config, self._targets, saved)
        strict = any(config.strict_base for config in self.peft_config.values())
        check_base(model, peft_config, self._targets, strict)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's; then the adapter's LoRA, if it has one.

        `state_dict` is not needed: PEFT finds the modules by it where a config does not say them, ours always does.
        """
        self._empty = low_cpu_mem_usage
        model = seen_through(model)  # torch.compile's wrapper, for one: our paths begin in the model that it holds
        note_trainable(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        config = self.peft_config[adapter_name]
        if config.lora:
            inject_lora(model, config, self._targets, adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._renew_modes()  # the model may be in train mode already

    def _post_injection_hook(self, model: nn.Module, config: SurgicalConfig, adapter_name: str) -> None:
        mend_checkpointing(seen_through(model))

    def _check_target_module_exists(self, peft_config: SurgicalConfig, key: str) -> bool | _ExcludedModule:
        return key in self._targets or _ExcludedModule()  # else PEFT warns that exclude_modules had no effect

    def _create_and_replace(
        self,
        peft_config: SurgicalConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SurgicalLayer):
            target.update_layer(adapter_name, self._targets[current_key], self._empty)
        else:
            layer = SurgicalLayer(target, adapter_name, self._targets[current_key], peft_config.keep_base, self._empty)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT would read child.weight, which a whole block does not have

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # a block upcast to float32 inside a bfloat16 model could not take its neighbour's output

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = remap(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)  # LoRA

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".lora_" in key:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return key  # our keys carry none, and a module may be called as the adapter is

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all or nothing: a refused merge leaves no layer merged.

        Raises:
            SurgicalError: an unknown adapter, or what `SurgicalLayer.merge` refuses.
        """
        unknown = [name for name in adapter_names or [] if name not in self.peft_config]
        if unknown:
            raise SurgicalError(f"adapter {unknown[0]!r} does not exist. Adapters: {', '.join(self.peft_config)}.")
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except (SurgicalError, ValueError):  # PEFT's own LoRA layers raise the second
            for layer, merged in zip(layers, before, strict=True):
                if isinstance(layer, SurgicalLayer):
                    layer.merged_adapters = merged
                elif layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:  # that took out the earlier ones, too
                        layer.merge(adapter_names=merged)
            raise

    def disable_adapter_layers(self) -> None:
        """As PEFT's.

        Raises:
            SurgicalError: there is no base to go back to (`keep_base="none"`).
        """
        self._needs_base()
        super().disable_adapter_layers()

    def _needs_base(self) -> None:
        if any(isinstance(module, SurgicalLayer) and not module.keeps_base for module in self.model.modules()):
            raise SurgicalError(NO_BASE)

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, num_beams: int = 1, **kwargs: Any
    ) -> AbstractContextManager[None]:
        """Hands `adapter_names` of a mixed batch to every layer, as PEFT does for LoRA.

        Raises:
            SurgicalError: an unknown name, not one for each row, or a model in train mode or merged.
        """
        if self.training:  # again, for who puts `training` back without a call of `train`, as Lightning does
            mend_checkpointing(seen_through(self.model))
        if adapter_names is None:
            return _NO_HOOKS
        if "__base__" in adapter_names:
            self._needs_base()
        check_rows(self.model, list(self.peft_config), adapter_names, [*args, *kwargs.values()])
        return rows_by_adapter(self.model, adapter_names, num_beams or 1)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            self._needs_base()
        else:  # first, so that nothing is unwrapped yet when a layer refuses
            self.merge_adapter(adapter_names, safe_merge)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore_checkpointing(seen_through(model))
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; if the active adapter goes, the next one is active in all layers."""
        self._needs_base()
        was_active, loras = adapter_name in self.active_adapters, self._lora_layers()
        super().delete_adapter(adapter_name)
        for layer in loras:
            layer.delete_adapter(adapter_name)
        if was_active and self.peft_config:  # PEFT lets each layer choose by itself, and believes the first
            self.set_adapter(self.active_adapters or [next(iter(self.peft_config))])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; in train mode, other blocks are now the tuned ones."""
        super().set_adapter(adapter_name, inference_mode)
        for layer in self._lora_layers():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode)
        self._renew_modes()

    def _lora_layers(self) -> list[LoraLayer]:
        """The LoRA layers that belong to adapters of ours; a model may have others besides."""
        names = {name for name, config in self.peft_config.items() if config.peft_type == "SURGICAL" and config.lora}
        layers = [module for module in self.model.modules() if names and isinstance(module, LoraLayer)]
        return [layer for layer in layers if names.intersection(layer._all_available_adapter_names())]

    def train(self, mode: bool = True) -> SurgicalModel:
        """Set train mode; unless the config says `frozen_eval=False`, all that is not tuned stays in eval mode."""
        super().train(mode)
        (mend_checkpointing if mode else pause_mending)(seen_through(self.model))
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if mode and active and all(config.frozen_eval for config in active):
            _eval_frozen(self.model)
        return self

    def _renew_modes(self) -> None:
        if self.model.training:
            self.train()


def _eval_frozen(module: nn.Module) -> bool:
    """Put every module without a tuned one in it into eval mode; returns whether `module` holds a tuned one."""
    if isinstance(module, AuxiliaryTrainingWrapper | LoraLayer):  # LoRA's dropout has no weights, and is part of it
        tuned = any(parameter.requires_grad for parameter in module.parameters())
        if not tuned:
            module.eval()
        return tuned
    below = [_eval_frozen(child) for child in module._modules.values() if child is not None]
    tuned = any(below) or any(
        parameter is not None and parameter.requires_grad for parameter in module._parameters.values()
    )
    if module.training and not tuned:
        module.training = False
    return tuned


def get_surgical_model(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: Iterable[Any] | None = None,
    *,
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Choose the blocks if the config says `"auto"`, then wrap the model with `peft.get_peft_model`.

    Args:
        model: the model to tune; scoring leaves it untouched.
        config: with `blocks="auto"`, `criterion` (default `probe`) scores the blocks and the `num_blocks` highest that
            can be tuned are taken; without a number, short joint trainings decide how many. The caller's config is not
            changed; the model's holds the names and the record.
        dataloader: labelled batches of the new data, needed for `"auto"`; those of the training split, not of the
            test split.
        num_batches: how many batches to score on; default is what the criterion asks for.
        loss_fn: `(model, batch) -> loss`; default is the model's own loss.
        **kwargs: passed on to `get_peft_model` (`adapter_name`, ...).

    Raises:
        SurgicalError: `"auto"` without a dataloader, or anything that scoring or wrapping refuses.

    Example:
        >>> model = get_surgical_model(model, SurgicalConfig(blocks="auto"), dataloader)
        >>> model.peft_config["default"].blocks
        ['head']
    """
    config = copy.deepcopy(config)
    if config.blocks == "auto":
        if dataloader is None:
            raise SurgicalError(
                "blocks='auto' needs data to choose by: get_surgical_model(model, config, dataloader) with labelled "
                "batches."
            )
        config, _ = choose_blocks(model, config, dataloader, num_batches, loss_fn)
    return get_peft_model(model, config, **kwargs)
