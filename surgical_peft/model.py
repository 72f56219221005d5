"""The tuner: finds the modules of the chosen blocks and wraps them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.data import DataLoader

from .blocks import BlockMap, walk
from .config import SurgicalConfig
from .errors import SurgicalError
from .layer import SurgicalLayer
from .scoring import LossFunction, score_blocks
from .selection import top_k


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
        self._targets = modules_to_tune(model, peft_config)

    def _check_target_module_exists(self, peft_config: SurgicalConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

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

    def train(self, mode: bool = True) -> SurgicalModel:
        """Set train mode; unless the config says `frozen_eval=False`, all that is not tuned stays in eval mode."""
        super().train(mode)
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if mode and active and all(config.frozen_eval for config in active):
            _eval_frozen(self.model)
        return self


def _eval_frozen(module: nn.Module) -> bool:
    """Put every module without a tuned one in it into eval mode; returns whether `module` holds a tuned one."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        tuned = any(parameter.requires_grad for parameter in module.parameters())
        if not tuned:
            module.eval()
        return tuned
    tuned = any([_eval_frozen(child) for child in module.children()])
    tuned = tuned or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if not tuned:
        module.training = False
    return tuned


def modules_to_tune(model: nn.Module, config: SurgicalConfig) -> set[str]:
    """Paths of the modules that `config` asks to tune in `model`; settles `config.blocks` to the final block names.

    Raises:
        SurgicalError: blocks that do not exist, `target_modules` that match nothing inside them, a tied weight, or a
            module already tuned, as part or as whole, by another adapter. The model is left as it was.
    """
    if config.blocks == "auto":
        raise SurgicalError(
            "blocks='auto' needs data to choose by: call get_surgical_model(model, config, dataloader), which scores "
            "the blocks and then calls get_peft_model."
        )
    _maybe_include_all_linear_layers(config, model)
    inside = None
    if config.blocks is not None:
        blocks = BlockMap.find(model)
        names = blocks.parse(config.blocks)
        inside = [path for name in names for path in blocks.modules[name]]
        config.blocks = list(names)
    if config.target_modules:
        targets = _matching(model, config, inside)
    else:
        targets = [path for path in inside or [] if not _excluded(config, path)]
    if not targets:
        where = "the model" if inside is None else f"blocks {config.blocks}"
        raise SurgicalError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} match no module "
            f"of {where}. Names inside: {_some_names(model, inside)}."
        )
    _check_wrappable(model, targets)
    if config.modules_to_save:
        _leave_out_tuned(model, config, targets)
    return set(targets)


def _matching(model: nn.Module, config: SurgicalConfig, inside: list[str] | None) -> list[str]:
    """The outermost modules that match `target_modules`, within the paths `inside` if given."""
    found: list[str] = []
    for path, _ in walk(model):
        if not path or any(path.startswith(outer + ".") for outer in found):
            continue
        if inside is not None and not any(path == home or path.startswith(home + ".") for home in inside):
            continue
        match = check_target_module_exists(config, path)
        if match and not isinstance(match, _ExcludedModule):
            found.append(path)
    return found


def _excluded(config: SurgicalConfig, path: str) -> bool:
    if not config.exclude_modules:
        return False
    probe = SurgicalConfig(target_modules=[path], exclude_modules=config.exclude_modules)
    return isinstance(check_target_module_exists(probe, path), _ExcludedModule)


def _check_wrappable(model: nn.Module, targets: list[str]) -> None:
    modules = dict(walk(model))
    wrapped = {path for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    for path in targets:
        if path not in modules:
            raise SurgicalError(
                f"{path} is a parameter of {type(model).__name__} itself, not of a module inside it, and cannot be "
                "tuned as a block yet. Choose other blocks, or name modules with target_modules."
            )
        for other in wrapped - {path}:
            if path.startswith(other + ".") or other.startswith(path + "."):
                raise SurgicalError(
                    f"{path} cannot be tuned: another adapter already tunes {other}. Adapters share a model only if "
                    "they choose the same modules or separate ones."
                )
    named = list(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, parameter in named:
        holders.setdefault(id(parameter), []).append(name)
    for path in targets:
        for name, parameter in named:
            shared = [other for other in holders[id(parameter)] if not other.startswith(path + ".")]
            if name.startswith(path + ".") and shared:
                raise SurgicalError(
                    f"{name} is tied to {', '.join(shared)}: a tuned copy of one end would leave the other as it was. "
                    "Load the model with tie_word_embeddings=False, or choose other blocks."
                )


def _leave_out_tuned(model: nn.Module, config: SurgicalConfig, targets: list[str]) -> None:
    """Take from `modules_to_save` what is tuned anyway (PEFT adds the head of a SEQ_CLS model by itself)."""
    rest = []
    for name in config.modules_to_save or []:
        paths = [path for path, _ in walk(model) if path == name or path.endswith("." + name)]
        parts = [path for path in paths for target in targets if path.startswith(target + ".")]
        if parts:
            raise SurgicalError(
                f"modules_to_save={name!r} names {parts[0]}, which lies inside a module that is tuned as a whole: "
                "leave it out of modules_to_save."
            )
        if not any(path in targets for path in paths):
            rest.append(name)
    config.modules_to_save = rest or None


def _some_names(model: nn.Module, inside: list[str] | None) -> str:
    paths = [p for p, _ in walk(model) if p and (inside is None or any(p.startswith(home + ".") for home in inside))]
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return ", ".join(name for name in list(ends)[:30] if not name.isdigit()) or "none"


def get_surgical_model(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: DataLoader | None = None,
    *,
    num_batches: int = 5,
    loss_fn: LossFunction | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Choose the blocks if the config says `"auto"`, then wrap the model with `peft.get_peft_model`.

    Args:
        model: the model to tune; scoring leaves it untouched.
        config: with `blocks="auto"`, `criterion` (default `rgn`) scores the blocks and the `num_blocks` (default 2)
            highest are taken. The caller's config is not changed; the model's holds the names and the record.
        dataloader: labelled batches of the new data, needed for `"auto"`.
        num_batches: how many batches to score on.
        loss_fn: `(model, batch) -> loss`; default is the model's own loss.
        **kwargs: passed on to `get_peft_model` (`adapter_name`, ...).

    Raises:
        SurgicalError: `"auto"` without a dataloader, or anything that scoring or wrapping refuses.

    Example:
        >>> model = get_surgical_model(model, SurgicalConfig(blocks="auto", num_blocks=2), dataloader)
        >>> model.peft_config["default"].blocks
        ['embeddings', 'head']
    """
    if config.blocks == "auto":
        if dataloader is None:
            raise SurgicalError(
                "blocks='auto' needs data to choose by: get_surgical_model(model, config, dataloader) with labelled batches."
            )
        criterion, num_blocks = config.criterion or "rgn", config.num_blocks or 2
        scores = score_blocks(model, dataloader, criterion=criterion, num_batches=num_batches, loss_fn=loss_fn)
        chosen = top_k(scores, num_blocks)
        config = replace(
            config, blocks=list(chosen.blocks), selection=chosen.record, criterion=None, num_blocks=None
        )
    return get_peft_model(model, config, **kwargs)
