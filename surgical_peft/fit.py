"""Whether a saved adapter belongs to a model: names, shapes and base weights, under today's names of the modules."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from .config import Choice, SurgicalConfig
from .errors import SurgicalError
from .fingerprint import differ_in_dtype, fingerprint
from .layer import SurgicalLayer
from .lists import join, within
from .loading import Shapes, saved_shapes
from .patterns import check_matching
from .quantised import is_packed
from .slots import BASE
from .tensors import Targets, TensorMap
from .wrappers import bare, clean_name, named_children, seen_through, walk

_KEYS_SHOWN = 5


def prepare_loading(model: nn.Module, config: SurgicalConfig) -> Shapes | None:
    """What must be known before a config's names are looked up in `model`; settles names that transformers changed.

    Returns:
        names and shapes of the saved weights; None if the adapter is a new one.

    Raises:
        SurgicalError: damaged or missing weights, or expressions that match without end.
    """
    shapes = saved_shapes(config)
    saved = {name: (shapes or {})[key] for name, key in bare_names(shapes or {}).items()}
    check_matching(_expressions(config), [*(path for path, _ in walk(model)), *saved])
    if saved and config.target_modules is not None:
        _follow_renames(model, config, saved)
    return None if shapes is None else saved


def _expressions(config: SurgicalConfig) -> dict[str, str]:
    choices = config.target_modules if isinstance(config.target_modules, dict) else {"": config.target_modules}
    found: dict[str, Any] = {f"target_modules{key and f'[{key!r}]'}": choice for key, choice in choices.items()}
    found["exclude_modules"] = config.exclude_modules
    for name in ("target_modules", "exclude_modules"):
        found[f"lora: {name}"] = (config.lora or {}).get(name)
    for name in ("rank_pattern", "alpha_pattern"):
        found |= {f"lora: {name}": rf"(.*\.)?({key})" for key in (config.lora or {}).get(name, {})}
    return {field: choice for field, choice in found.items() if isinstance(choice, str)}


def check_fit(model: nn.Module, config: SurgicalConfig, targets: Targets, saved: Shapes) -> None:
    """Refuse saved weights that are not, name by name and shape by shape, those of the modules to tune.

    Args:
        model: the model, before it is wrapped.
        config: what the saved adapter says.
        targets: paths of the modules to tune, and the parameters tuned in them (None for all).
        saved: names and shapes from the header of the saved weights.

    Raises:
        SurgicalError: weights are missing, too many, or of another shape.
    """
    modules = dict(walk(model))
    to_save = [path for path in modules if any(path.endswith(name) for name in config.modules_to_save or [])]
    tensors = TensorMap.find(model)
    expected: Shapes = {}
    for name in tensors.chosen(targets):
        tensor = tensors.places[name][0].tensor  # a quantised one is in the file in float, and whole
        packed = isinstance(tensor, nn.Parameter) and is_packed(tensor)
        expected[name] = saved.get(name, (0,)) if packed else tuple(tensor.shape)
    for path in to_save:
        expected |= {
            join(path, key): tuple(value.shape) for key, value in _original(modules[path]).state_dict().items()
        }
    match(model, config, saved, expected, f"the adapter in {config.read_from and config.read_from.path.parent}")


def match(model: nn.Module, config: SurgicalConfig, saved: Shapes, expected: Shapes, what: str) -> dict[str, str]:
    """Which expected weight each saved one is: of the same name, or of the name that transformers gave it since.

    Args:
        what: the saved weights in words, for messages.

    Raises:
        SurgicalError: weights are missing, too many, or of another shape.
    """
    names = {key: key for key in saved if not (config.lora and ".lora_" in key)}
    extra: Shapes = {}
    if not names.keys() <= expected.keys():
        rename = _renamer(model)
        extra = _embeddings(model)
        first = TensorMap.find(model).first
        again = {key for key in names if key not in expected and first.get(key) in expected}
        names = {key: name for key, name in names.items() if key not in again}  # tied, and saved once more
        ordered = sorted(names, key=dot_natural_key)  # some renames of transformers count on it
        names = {key: key if key in expected or key in extra else rename(key) for key in ordered}
    found = set(names.values())
    missing = [key for key in expected if key not in found]
    unknown = [key for key, name in names.items() if name not in expected and name not in extra]
    whose = type(bare(model)).__name__
    if missing:
        others = f", and has others ({_listed(unknown)})" if unknown else ""
        raise SurgicalError(
            f"{what} does not fit {whose}: it lacks {len(missing)} of {len(expected)} weights ({_listed(missing)})"
            f"{others}. It is not complete, or was made for another architecture."
        )
    if unknown or len(found) < len(names):
        twice = [key for key, name in names.items() if key != name and name in names]
        raise SurgicalError(
            f"{what} holds weights that its config does not tune ({_listed(unknown or twice)}): config and weights "
            "are not of one adapter."
        )
    for key, name in names.items():
        shape = {**extra, **expected}[name]
        if saved[key] != shape and shape != (0,):  # DeepSpeed leaves an empty tensor where it shards
            cure = "call resize_token_embeddings first" if name in extra else "load its own base model"
            raise SurgicalError(
                f"{what} is for a model of another size: {key} has shape {saved[key]} there and {shape} in {whose}. "
                f"Nothing of it was loaded: {cure}."
            )
    return {key: name for key, name in names.items() if name in expected}


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """The names of weights in the bare model, and the names they have in a file."""
    names: dict[str, str] = {}
    for key in keys:
        if other := names.get(clean_name(key)):
            raise SurgicalError(f"{key} and {other} are one weight, saved twice: which is right cannot be told.")
        names[clean_name(key)] = key
    return names


def _original(module: nn.Module) -> nn.Module:
    return module.get_submodule("original_module") if isinstance(module, ModulesToSaveWrapper) else module


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")


def _embeddings(model: nn.Module) -> Shapes:
    """Weights that PEFT saves beside any adapter when the vocabulary was resized."""
    base = bare(model)
    if not isinstance(base, PreTrainedModel):
        return {}
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:  # of a model without
        return {}
    found = {path: module for path, module in walk(base) if any(seen_through(end) is module for end in ends if end)}
    return {f"{path}.{key}": tuple(value.shape) for path, m in found.items() for key, value in m.state_dict().items()}


def _renamer(model: nn.Module) -> Callable[[str], str]:
    """Gives a weight the name that it has had since transformers, or the model's author, renamed modules."""
    base = bare(model)
    if not isinstance(base, PreTrainedModel):
        return lambda key: key
    own = getattr(base, "_checkpoint_conversion_mapping", None) or {}  # of models with code of their own
    renamings = [each for each in get_model_conversion_mapping(base) if isinstance(each, WeightRenaming)]

    def rename(key: str) -> str:
        for pattern, new in own.items():
            if re.search(pattern, key):
                return re.sub(pattern, new, key)
        return rename_source_key(key, renamings, [])[0]

    return rename


def _follow_renames(model: nn.Module, config: SurgicalConfig, saved: Shapes) -> None:
    """Replace names in `target_modules` that modules had when the adapter was saved by their paths of today."""
    known = {clean_name(key) for key in model.state_dict()}
    rename = _renamer(model)
    now = {key: key if key in known else rename(key) for key in sorted(saved, key=dot_natural_key)}
    if all(key == name or name not in known for key, name in now.items()):
        return
    if isinstance(config.target_modules, dict):
        config.target_modules = {
            block: _renamed(choice, now, known) for block, choice in config.target_modules.items()
        }
    elif config.target_modules is not None:
        config.target_modules = _renamed(config.target_modules, now, known)


def _renamed(choice: Choice, now: Mapping[str, str], known: Collection[str]) -> Choice:
    if isinstance(choice, str) and choice.startswith("all"):
        return choice
    asked = SurgicalConfig(target_modules=choice)
    moved: dict[str, list[str]] = {}
    for key, name in now.items():
        parts = key.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts)))
        if old := next((path for path in above if check_target_module_exists(asked, path)), None):
            moved.setdefault(old, []).append(name)
    return sorted({path for names in moved.values() for path in _homes(names, known)}) or choice


def _homes(names: list[str], known: Collection[str]) -> set[str]:
    """The module that holds just the weights `names`; if there is none, the modules that hold them directly."""
    parents = {name.rpartition(".")[0] for name in names}
    together = itertools.takewhile(lambda at: len(set(at)) == 1, zip(*(p.split(".") for p in parents), strict=False))
    common = ".".join(parts[0] for parts in together)
    return {common} if {name for name in known if name.startswith(common + ".")} == set(names) else parents


def _base_tensors(model: nn.Module, targets: Targets, without: Collection[str] = ()) -> Iterator[torch.Tensor]:
    """The base's own parameters that `targets` ask for, also where an adapter's stand; none at the paths `without`."""
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    slots = {place: slot for layer in layers for slot in layer.slots.values() for place in slot.places}
    tensors = TensorMap.find(model)
    for name in [name for name, asked in tensors.chosen(targets).items() if asked and not within(name, without)]:
        place = tensors.places[name][0]
        slot = slots.get((place.module, place.attribute))
        yield place.tensor if slot is None or BASE not in slot else slot.of(BASE)


# PEFT's classes for these tasks save a classifier besides, since its weights are new.
_TASKS_WITH_NEW_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def new_head(model: nn.Module, config: SurgicalConfig) -> list[str]:
    """Paths of what a model has beside the body that it shares with other tasks, if its task has a new head."""
    task_model = bare(model)
    body = getattr(task_model, "base_model_prefix", "")
    if config.task_type not in _TASKS_WITH_NEW_HEAD or body not in task_model._modules:
        return []
    return [path for path, _ in named_children(task_model) if path != body]


def check_base(model: nn.Module, config: SurgicalConfig, targets: Targets, strict: bool) -> None:
    """Compare the base weights of the tuned modules with those that the adapter was made from, or note them in it.

    Warns:
        UserWarning: they are others.

    Raises:
        SurgicalError: with `strict`: they are others, or that cannot be told.
    """
    here = fingerprint(_base_tensors(model, targets, new_head(model, config)))  # which is random in every process
    if config.read_from is None:
        config.fingerprint = here
        return
    if here == config.fingerprint and here is not None:
        return
    if config.fingerprint is not None and config.fingerprint == fingerprint(_base_tensors(model, targets)):
        return  # as version 0.1.0 made it
    if here is None or config.fingerprint is None:
        problem = (
            "the adapter has no fingerprint of its base model"
            if config.fingerprint is None
            else "the weights of this base model cannot be read yet (offloaded or sharded)"
        )
        if strict:
            raise SurgicalError(
                f"strict_base=True, but {problem}: load without it if you know that the base is right."
            )
        return
    cause = (
        "The base is loaded in another dtype than the adapter was made in, which may be all: load it in that dtype to "
        "be sure."
        if differ_in_dtype(here, config.fingerprint)
        else "A tuned block in the midst of another model's blocks seldom works: load the base it was made from."
    )
    message = (
        f"the adapter was made from a base model with fingerprint {config.fingerprint} in the tuned blocks, this one "
        f"has {here}. {cause}"
    )
    if strict:
        raise SurgicalError(message)
    warnings.warn(message, stacklevel=2)
