"""The private methods by which PEFT asks a tuner to inject, save and load an adapter: all of them that we override.

A test compares their signatures with those of the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from ..blocks.unwrap import named_bare_modules, unwrap_module
from .attach import AdapterPlan, attach, plan_adapter, requires_grad_by_name
from .config import SurgicalConfig
from .gradient_checkpointing import skip_frozen_prefix
from .layer import SurgicalLayer
from .loading.adapter_weights import adapter_weights, layers_by_path, load_weights
from .loading.compatibility import check_fit, names_today, prepare_loading, recorded
from .loading.head_config import (
    Labels,
    apply_head_config,
    head_config_of,
    head_config_to_save,
    labels_of,
    restore_labels,
)
from .loading.new_weights import newly_initialized, note_new_weights
from .loading.same_base import check_base
from .loading.saved_adapter import heads_of
from .lora import check_lora, inject_lora
from .moved_buffers import note_buffers
from .target_checks import check_adapter_names, check_no_container
from .target_modules import modules_to_tune, with_modules_besides
from .tensors.slots import BASE
from .tensors.tuned_tensors import TensorMap


class PeftHooks(BaseTuner):
    """Injects, saves and loads; what users call is in [`SurgicalModel`][surgical_peft.SurgicalModel]."""

    prefix = "surgical_"
    tuner_layer_cls = SurgicalLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _plan: AdapterPlan | None = None  # what the adapter that is being injected will have
    _requires_grad: dict[str, bool] | None = None  # before the first adapter came

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        # As transformers does by add_adapter, which keeps the model and not us: its train() does not ask ours
        self._for_others_to_train = isinstance(peft_config, PeftConfig)
        labels = labels_of(model)  # of the base, and of each adapter that was active before, as they were then
        self._labels: dict[str, Labels] = {} if labels is None else {BASE: labels}
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def _prepare_adapter_config(self, peft_config: SurgicalConfig, model_config: dict[str, Any]) -> SurgicalConfig:
        return peft_config  # PEFT would look up default target modules by model type; ours are said in blocks

    def _check_tied_modules(self, model: nn.Module, peft_config: SurgicalConfig) -> None:
        pass  # PEFT would warn: tied weights are tuned at both ends here

    def _check_merge_allowed(self) -> None:
        pass  # the same

    def _prepare_model(self, peft_config: SurgicalConfig, model: nn.Module) -> None:
        # Names become tensors here, once, before anything is changed. They are not put into target_modules: PEFT
        # condenses a list of 20 and more to suffixes, which would match other blocks too.
        try:
            self._plan = self._look_before_wrapping(peft_config, model)
        except Exception:  # transformers' models share their dictionary with the tuner, which has the new name already
            layers = list(self.layers())
            for name in [name for name, config in self.peft_config.items() if config is peft_config][-1:]:
                if not any(name in layer.trained for layer in layers):
                    del self.peft_config[name]
            raise

    def _look_before_wrapping(self, peft_config: SurgicalConfig, model: nn.Module) -> AdapterPlan:
        check_no_container(model)
        check_adapter_names(model, self.peft_config, peft_config)
        saved = prepare_loading(model, peft_config)
        today = None if saved is None else names_today(model, saved)
        own = None if today is None else recorded(model, peft_config, today)
        new = newly_initialized(model)
        paths = [path for path, _ in named_bare_modules(model)]
        to_save = heads_of(peft_config, paths)  # before those that are tuned anyway are dropped
        targets = modules_to_tune(model, peft_config)
        moving = not peft_config.frozen_eval or (self._for_others_to_train and not self._empty)
        every = with_modules_besides(model, peft_config, targets, new, moving, own)
        if saved is not None:
            check_fit(model, peft_config, every, saved)
        if peft_config.lora:
            check_lora(model, peft_config, every, saved)
        plan = plan_adapter(model, peft_config, every)
        configs = [config for config in self.peft_config.values() if isinstance(config, SurgicalConfig)]
        strict = any(config.strict_base for config in configs)
        chosen = TensorMap.find(model).chosen(every)
        note_new_weights(model, peft_config, chosen, new, to_save, None if today is None else today.values())
        if today is None:
            peft_config.head_config = head_config_of(model, peft_config)
        check_base(model, peft_config, targets, chosen, today, strict)
        note_buffers(model, peft_config, chosen)
        return plan

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's; then the adapter's LoRA, if it has one.

        A config object that another adapter was made from stands for that adapter: the new one starts as a copy of it,
        as TRL wants of the reference that it makes.

        `state_dict` is not needed: PEFT finds the modules by it where a config does not say them, ours always does.
        """
        self._adapter, self._empty = adapter_name, low_cpu_mem_usage
        model = unwrap_module(model)  # torch.compile's wrapper, for one: our paths begin in the model that it holds
        if self._requires_grad is None:
            self._requires_grad = requires_grad_by_name(model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        config = self.peft_config[adapter_name]
        active = adapter_name in self.active_adapters and not config.inference_mode
        for layer in self.layers():  # PEFT has put back flags from before, also of what is the new adapter's now
            layer.set_requires_grad(adapter_name, active)
        if config.lora:
            inject_lora(model, config, config.tuned_modules or {}, adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if adapter_name in self.active_adapters and not self._is_disabled():
            self._name_labels([adapter_name])
        self._renew_modes()  # the model may be in train mode already

    def _is_disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self.layers())

    def _keep_labels(self, adapters: Iterable[str]) -> None:
        labels = labels_of(self.model)
        if labels is not None and not self._is_disabled():
            self._labels |= dict.fromkeys(adapters, labels)

    def _name_labels(self, adapters: Iterable[str]) -> None:
        for name in adapters if BASE in self._labels else ():
            config = self.peft_config.get(name)
            restore_labels(self.model, self._labels.get(name, self._labels[BASE]))
            if name not in self._labels and isinstance(config, SurgicalConfig) and config.read_from is not None:
                apply_head_config(self.model, config)

    def _post_injection_hook(self, model: nn.Module, config: SurgicalConfig, adapter_name: str) -> None:
        skip_frozen_prefix(unwrap_module(model))

    def _check_target_module_exists(self, peft_config: SurgicalConfig, key: str) -> bool | _ExcludedModule:
        assert self._plan is not None
        targets = self._plan.targets
        # PEFT wants one match at least, and does not look at the model itself. Else it warns that exclude_modules had
        # no effect.
        return key in targets or targets.keys() == {""} or _ExcludedModule()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        pass  # all at once, as soon as PEFT has matched its names: `_attach`. Nothing is replaced

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT would read child.weight, which a whole new head does not have

    def _attach(self) -> None:
        plan, self._plan = self._plan, None
        if plan is None:
            return
        config = self.peft_config[self._adapter]
        like = next((n for n, other in self.peft_config.items() if other is config and n != self._adapter), BASE)
        attach(unwrap_module(self.model), plan, config, self._adapter, like, self._empty)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        ours = [
            (t, t.requires_grad)
            for layer in self.layers()
            for name in layer.trained
            for t in layer.tensors(name).values()
        ]
        super()._mark_only_adapters_as_trainable(model)  # by names, which those that stand share with the base's
        for tensor, requires_grad in ours:
            tensor.requires_grad_(requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # a block upcast to float32 inside a bfloat16 model could not take its neighbor's output

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SurgicalConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        layers = layers_by_path(model).values()  # while they are disabled, the labels are the base's
        is_active = any(adapter_name in layer.active_adapters and not layer.disable_adapters for layer in layers)
        config.head_config = head_config_to_save(model, config, is_active)
        weights = adapter_weights(model, config, adapter_name, state_dict)
        lora = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {**weights, **lora}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        rest = load_weights(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)  # LoRA

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".lora_" in key:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return key  # our keys carry none, and a module may be called as the adapter is

    def layers(self) -> Iterator[SurgicalLayer]:
        """The layers that hold the parked tensors, in the order of the modules."""
        return (module for module in self.model.modules() if isinstance(module, SurgicalLayer))
