"""The tuner: wraps the modules of the chosen blocks, and switches, merges and unwraps them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .batches import LossFunction
from .choosing import choose_blocks
from .config import SurgicalConfig
from .errors import SurgicalError
from .layer import SurgicalLayer
from .targets import check_adapter_names, modules_to_tune


class SurgicalModel(BaseTuner):
    """Puts a [`SurgicalLayer`][surgical_peft.layer.SurgicalLayer] in the place of each chosen module.

    Users do not build it: `peft.get_peft_model(model, SurgicalConfig(blocks=[0, 1]))` does.
    """

    prefix = "surgical_"
    tuner_layer_cls = SurgicalLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: SurgicalConfig, model_config: dict[str, Any]) -> SurgicalConfig:
        return peft_config  # PEFT would look up default target modules by model type; ours are said in blocks

    def _prepare_model(self, peft_config: SurgicalConfig, model: nn.Module) -> None:
        # Names become modules here, once, before anything is changed. They are not put into target_modules: PEFT
        # condenses a list of 20 and more to suffixes, which would match other blocks too.
        check_adapter_names(model, self.peft_config, peft_config)
        self._targets = modules_to_tune(model, peft_config)

    def _post_injection_hook(self, model: nn.Module, config: SurgicalConfig, adapter_name: str) -> None:
        self._renew_modes()  # the model may be in train mode already

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
            target.update_layer(adapter_name)
        else:
            self._replace_module(parent, target_name, SurgicalLayer(target, adapter_name), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT would read child.weight, which a whole block does not have

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # a block upcast to float32 inside a bfloat16 model could not take its neighbour's output

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # our keys carry none, and a module may be called as the adapter is

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all or nothing: a refused merge leaves no layer merged.

        Raises:
            SurgicalError: an unknown adapter, or what `SurgicalLayer.merge` refuses.
        """
        unknown = [name for name in adapter_names or [] if name not in self.peft_config]
        if unknown:
            raise SurgicalError(f"adapter {unknown[0]!r} does not exist. Adapters: {', '.join(self.peft_config)}.")
        layers = [module for module in self.model.modules() if isinstance(module, SurgicalLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except SurgicalError:
            for layer, merged in zip(layers, before, strict=True):
                layer.merged_adapters = merged
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:  # first, so that nothing is unwrapped yet when a layer refuses
            self.merge_adapter(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; if the active adapter goes, the next one is active in all layers."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:  # PEFT lets each layer choose by itself, and believes the first
            self.set_adapter(self.active_adapters or [next(iter(self.peft_config))])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; in train mode, other blocks are now the tuned ones."""
        super().set_adapter(adapter_name, inference_mode)
        self._renew_modes()

    def train(self, mode: bool = True) -> SurgicalModel:
        """Set train mode; unless the config says `frozen_eval=False`, all that is not tuned stays in eval mode."""
        super().train(mode)
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if mode and active and all(config.frozen_eval for config in active):
            _eval_frozen(self.model)
        return self

    def _renew_modes(self) -> None:
        if self.model.training:
            self.train()


def _eval_frozen(module: nn.Module) -> bool:
    """Put every module without a tuned one in it into eval mode; returns whether `module` holds a tuned one."""
    if isinstance(module, AuxiliaryTrainingWrapper):
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
