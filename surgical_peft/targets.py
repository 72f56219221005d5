"""Which modules a config asks to tune in a model, and all that is refused before anything is changed."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .blocks import BlockMap
from .config import SurgicalConfig
from .errors import SurgicalError
from .layer import SurgicalLayer
from .wrappers import walk

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def modules_to_tune(model: nn.Module, config: SurgicalConfig) -> list[str]:
    """Paths of the modules that `config` asks to tune in `model`; settles `config.blocks` to the final block names.

    Raises:
        SurgicalError: blocks that do not exist, `target_modules` that match nothing inside them, a tied weight, or a
            module already tuned, as part or as whole, by another adapter. Model and config are left as they were.
    """
    if config.blocks == "auto":
        raise SurgicalError(
            "blocks='auto' needs data to choose by: call get_surgical_model(model, config, dataloader), which scores "
            "the blocks and then calls get_peft_model."
        )
    inside: list[str] | None = None
    names: tuple[str, ...] = ()
    if config.blocks is not None:
        blocks = BlockMap.find(model)
        names = blocks.parse(config.blocks)
        inside = [path for name in names for path in blocks.modules[name]]
        if config.target_modules is None:
            _check_modules(model, inside)
    targets = _outermost(model, config, inside)
    if not targets:
        where = "the model" if inside is None else f"blocks {list(names)}"
        raise SurgicalError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} match no "
            f"module with parameters in {where}. Names inside: {_some_names(model, inside)}."
        )
    _check_separate(model, targets, SurgicalLayer)
    _check_untied(model, targets)
    to_save = _still_to_save(model, config, targets)
    if config.blocks is not None:
        config.blocks = list(names)
    config.modules_to_save = to_save or None
    return targets


def _outermost(model: nn.Module, config: SurgicalConfig, inside: list[str] | None) -> list[str]:
    """The largest modules asked for, within the paths `inside` if given; in parts where they hold an excluded one."""
    asked = SurgicalConfig(
        target_modules=config.target_modules or ".*",
        exclude_modules=config.exclude_modules,
        task_type=config.task_type,
    )
    if isinstance(asked.target_modules, str) and asked.target_modules.lower() == "all-linear":
        if any(isinstance(module, SurgicalLayer) for module in model.modules()):
            raise SurgicalError("'all-linear' overlooks what another adapter wraps: name the modules to tune instead.")
        _maybe_include_all_linear_layers(asked, model)
    verdicts = {path: check_target_module_exists(asked, path) for path, _ in walk(model)}
    excluded = [path for path, verdict in verdicts.items() if isinstance(verdict, _ExcludedModule)]
    if config.exclude_modules and not excluded:
        raise SurgicalError(
            f"exclude_modules={config.exclude_modules!r} match no module. Names: {_some_names(model, inside)}."
        )
    found: list[str] = []
    apart: list[str] = []
    for path, module in walk(model):
        if not path or _within(path, found + excluded) or not (verdicts[path] or _within(path, apart)):
            continue
        if (inside is not None and not _within(path, inside)) or not any(True for _ in module.parameters()):
            continue
        if not isinstance(module, _WITHOUT_FORWARD) and not any(_within(other, [path]) for other in excluded):
            found.append(path)
            continue
        apart.append(path)
        for name, _ in module.named_parameters(recurse=False):
            raise SurgicalError(
                f"{path} cannot be tuned in parts: its parameter {name!r} lies in none of its modules. "
                "Tune the whole module around it, or choose others with target_modules."
            )
    return found


def _within(path: str, homes: list[str]) -> bool:
    return any(path == home or path.startswith(home + ".") for home in homes)


def check_adapter_names(model: nn.Module, adapters: dict[str, SurgicalConfig], new: SurgicalConfig) -> None:
    """Refuse what PEFT would only find out by losing weights.

    Raises:
        SurgicalError: the model is wrapped already, or, with several adapters, one has the name of a module.
    """
    name = [name for name, config in adapters.items() if config is new][-1]  # two may share one config object
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    if isinstance(model, PeftModel) or any(name in layer.surgical_copies for layer in layers):
        raise SurgicalError(
            f"the model is wrapped already, an adapter {name!r} would mix with the old one: model.unload() the old "
            "one first, load the model afresh, or model.add_adapter(another_name, config)."
        )
    if len(adapters) > 1:
        parts = {part for path, module in walk(model) for part in [*path.split("."), *module._parameters]}
        for clash in [other for other in adapters if other in parts]:
            raise SurgicalError(
                f"adapter name {clash!r} is also the name of a module or weight: PEFT saves one of several adapters "
                "by leaving out all weights with another's name in their path. Call the adapter something else."
            )


def _check_modules(model: nn.Module, paths: list[str]) -> None:
    modules = {path for path, _ in walk(model)}
    for path in paths:
        if path not in modules:
            raise SurgicalError(
                f"{path} is a parameter of {type(model).__name__} that no module has to itself: it cannot be tuned as "
                "a block. Choose other blocks, or name modules with target_modules."
            )


def _check_separate(model: nn.Module, paths: list[str], kind: type[nn.Module]) -> None:
    """No path may hold, lie in, or (unless `kind` is the wrapper of both) be what another adapter wraps."""
    for other, wrapper in model.named_modules():
        if not isinstance(wrapper, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for path in paths:
            if path == other and isinstance(wrapper, kind):
                continue
            if _within(path, [other]) or _within(other, [path]):
                raise SurgicalError(
                    f"{path} cannot be tuned: another adapter already tunes {other} with a {type(wrapper).__name__}. "
                    "Adapters share a model only if they choose the same modules, in the same way, or separate ones."
                )


def _check_untied(model: nn.Module, targets: list[str]) -> None:
    named = list(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for name, parameter in named:
        holders.setdefault(id(parameter), []).append(name)
    for path in targets:
        for name, parameter in named:
            shared = [other for other in holders[id(parameter)] if not _within(other, [path])]
            if _within(name, [path]) and shared:
                raise SurgicalError(
                    f"{name} is tied to {', '.join(shared)}: a tuned copy of one end would leave the other as it was. "
                    "Choose blocks without it, or load the model with tie_word_embeddings=False if it unties then."
                )


def _still_to_save(model: nn.Module, config: SurgicalConfig, targets: list[str]) -> list[str]:
    """`modules_to_save` without what is tuned anyway (PEFT adds the head of a SEQ_CLS model by itself)."""
    rest: list[str] = []
    for name in dict.fromkeys(config.modules_to_save or []):  # PEFT adds the same ones at every load
        matches = [path for path, _ in walk(model) if path.endswith(name)]  # PEFT's rule: no dot is needed
        others = [path for path in matches if path not in targets]
        overlap = [path for path in others if _within(path, targets) or any(_within(t, [path]) for t in targets)]
        if overlap or 0 < len(others) < len(matches):
            raise SurgicalError(
                f"modules_to_save={name!r} names {(overlap or others)[0]}, but blocks and target_modules already tune "
                "all, part or one of its kind: leave it out of modules_to_save, or give its full path."
            )
        if not matches and config.task_type is None:  # with a task type, PEFT lists every name a head may have
            raise SurgicalError(
                f"modules_to_save={name!r} matches no module of {type(model).__name__}. "
                f"Names: {_some_names(model, None)}."
            )
        _check_separate(model, others, ModulesToSaveWrapper)
        if others or not matches:
            rest.append(name)
    return rest


def _some_names(model: nn.Module, inside: list[str] | None) -> str:
    paths = [p for p, _ in walk(model) if p and (inside is None or any(p.startswith(home + ".") for home in inside))]
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return ", ".join([name for name in ends if not name.isdigit()][:30]) or "none"
