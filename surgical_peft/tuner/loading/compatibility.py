"""Checks that a saved adapter fits a model: names and shapes, under today's names of the modules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from ...blocks.module_lists import inside, join, parents
from ...blocks.unwrap import bare_parameter_name, named_bare_modules, unwrap_model
from ...errors import SurgicalError, first_of
from ..config import Choice, SurgicalConfig
from ..name_checks import check_matching
from ..quantization import is_packed
from ..tensors.tuned_tensors import Targets, TensorMap
from .new_weights import embeddings
from .saved_files import Shapes, saved_fractions, saved_shapes


def prepare_loading(model: nn.Module, config: SurgicalConfig) -> Shapes | None:
    """Read the saved shapes before a config's names are looked up in `model`; follow names that transformers changed.

    Returns:
        names and shapes of the saved weights; None if the adapter is a new one.

    Raises:
        SurgicalError: damaged or missing weights, or expressions that match without end.
    """
    shapes = saved_shapes(config)
    saved = {name: (shapes or {})[key] for name, key in bare_names(shapes or {}).items()}
    check_expressions(model, config, saved)
    if saved:
        config.new_weights = config.new_weights and sorted(names_today(model, config.new_weights).values())
    if saved and config.target_modules is not None:
        _follow_renames(model, config, saved)
    return None if shapes is None else saved


def check_expressions(model: nn.Module, config: SurgicalConfig, saved: Collection[str] = ()) -> None:
    """Refuse a config whose regular expressions would match without end, before any is matched with `model`.

    Args:
        saved: names of the saved weights, which are matched, too, where modules have other names today.

    Raises:
        SurgicalError: see `check_matching`.
    """
    paths = [path for path, _ in named_bare_modules(model)]
    check_matching(_expressions(config), [*paths, *saved, *(above for name in saved for above in parents(name))])


def _expressions(config: SurgicalConfig) -> dict[str, str]:
    """All that PEFT and this package match as a regular expression, by where it stands; as PEFT puts it together."""
    choices = config.target_modules if isinstance(config.target_modules, dict) else {"": config.target_modules}
    expressions: dict[str, Any] = {f"target_modules{key and f'[{key!r}]'}": choice for key, choice in choices.items()}
    expressions["exclude_modules"] = config.exclude_modules
    lora = config.lora if isinstance(config.lora, dict) else {}
    for name in ("target_modules", "exclude_modules"):
        expressions[f"lora: {name}"] = lora.get(name)
    for name in ("rank_pattern", "alpha_pattern"):
        expressions |= {f"lora: {name}[{key!r}]": rf"(.*\.)?({key})" for key in lora.get(name) or {}}
    layers = lora.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        expressions[f"lora: layers_pattern {pattern!r}"] = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
    return {field: choice for field, choice in expressions.items() if isinstance(choice, str)}


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
    modules = dict(named_bare_modules(model))
    to_save = [path for path in modules if any(path.endswith(name) for name in config.modules_to_save or [])]
    tensors = TensorMap.find(model)
    expected: Shapes = {}
    fractions = saved_fractions(config)
    floating: set[str] = set()
    for name in tensors.chosen(targets):
        tensor = tensors.at(name)[0].tensor  # a quantized one is in the file in float, and whole
        packed = isinstance(tensor, nn.Parameter) and is_packed(tensor)
        expected[name] = saved.get(name, (0,)) if packed else tuple(tensor.shape)
        if tensor.is_floating_point() or packed:
            floating.add(name)
    for path in to_save:
        heads = {join(path, key): value for key, value in _original(modules[path]).state_dict().items()}
        expected |= {name: tuple(value.shape) for name, value in heads.items()}
        floating |= {name for name, value in heads.items() if value.is_floating_point()}
    where = f"the adapter in {config.read_from and config.read_from.path.parent}"
    for key, name in match(model, config, saved, expected, where).items():
        if (key in fractions) != (name in floating):
            raise SurgicalError(
                f"{where} is damaged: {key} holds another kind of numbers there than in "
                f"{type(unwrap_model(model)).__name__}. Save or fetch it again."
            )


def match(model: nn.Module, config: SurgicalConfig, saved: Shapes, expected: Shapes, what: str) -> dict[str, str]:
    """Map each saved weight to an expected one: of the same name, or of the name that transformers gave it since.

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
    matched = set(names.values())
    missing = [key for key in expected if key not in matched]
    unknown = [key for key, name in names.items() if name not in expected and name not in extra]
    whose = type(unwrap_model(model)).__name__
    if missing:
        others = f", and has others ({first_of(unknown)})" if unknown else ""
        raise SurgicalError(
            f"{what} does not fit {whose}: it lacks {len(missing)} of {len(expected)} weights ({first_of(missing)})"
            f"{others}. It is not complete, or was made for another architecture."
        )
    if unknown or len(matched) < len(names):
        twice = [key for key, name in names.items() if key != name and name in names]
        raise SurgicalError(
            f"{what} holds weights that its config does not tune ({first_of(unknown or twice)}): config and weights "
            "are not of one adapter."
        )
    for key, name in names.items():
        shape = {**extra, **expected}[name]
        if saved[key] != shape and shape != (0,):  # DeepSpeed leaves an empty tensor where it shards
            cure = "call resize_token_embeddings first" if name in extra else "load its own base model"
            if name not in extra and saved[key][:1] == ((config.head_config or {}).get("num_labels"),):
                cure += f" with num_labels={saved[key][0]}, ignore_mismatched_sizes=True, for its new head"
            raise SurgicalError(
                f"{what} is for a model of another size: {key} has shape {saved[key]} there and {shape} in {whose}. "
                f"Nothing of it was loaded: {cure}."
            )
    return {key: name for key, name in names.items() if name in expected}


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """The names of weights in the bare model, and the names they have in a file."""
    names: dict[str, str] = {}
    for key in keys:
        if other := names.get(bare_parameter_name(key)):
            raise SurgicalError(f"{key} and {other} are one weight, saved twice: which is right cannot be told.")
        names[bare_parameter_name(key)] = key
    return names


def _original(module: nn.Module) -> nn.Module:
    return module.get_submodule("original_module") if isinstance(module, ModulesToSaveWrapper) else module


def _embeddings(model: nn.Module) -> Shapes:
    """Weights that PEFT saves beside any adapter when the vocabulary was resized."""
    tables = embeddings(model).items()
    return {
        f"{path}.{key}": tuple(value.shape) for path, module in tables for key, value in module.state_dict().items()
    }


def _renamer(model: nn.Module) -> Callable[[str], str]:
    """Return a function from the old name of a weight to the one that transformers, or its author, gave it since."""
    base = unwrap_model(model)
    if not isinstance(base, PreTrainedModel):
        return lambda key: key
    mapping = getattr(base, "_checkpoint_conversion_mapping", None) or {}  # of models with code of their own
    renamings = [rule for rule in get_model_conversion_mapping(base) if isinstance(rule, WeightRenaming)]

    def rename(key: str) -> str:
        for pattern, new in mapping.items():
            if re.search(pattern, key):
                return re.sub(pattern, new, key)
        return rename_source_key(key, renamings, [])[0]

    return rename


def names_today(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """By the names that weights of `model` had when an adapter was saved, those that they have now."""
    known = {bare_parameter_name(key) for key in model.state_dict()}
    rename = _renamer(model)
    return {key: key if key in known else rename(key) for key in sorted(names, key=dot_natural_key)}


def recorded(model: nn.Module, config: SurgicalConfig, today: Mapping[str, str]) -> set[str]:
    """Today's first names of those weights in an adapter's file that the record in its `config` says are its own.

    Args:
        today: their names of today, by those in the file.
    """
    tensors = TensorMap.find(model)
    record = config.tuned_modules or {}
    parameters = {join(path, name) for path, names in record.items() for name in names or ()}
    homes = {*(path for path, names in record.items() if not names), *(name.rpartition(".")[0] for name in parameters)}
    tuned = set()
    for old, name in today.items():
        if first := tensors.first_name(name):
            buffer = not tensors.at(first)[0].is_parameter
            whole = any(names is None and inside(old, path) for path, names in record.items())
            if whole or old in parameters or (buffer and old.rpartition(".")[0] in homes):
                tuned.add(first)
    return tuned


def _follow_renames(model: nn.Module, config: SurgicalConfig, saved: Shapes) -> None:
    """Replace names in `target_modules` that modules had when the adapter was saved by their paths of today."""
    known = {bare_parameter_name(key) for key in model.state_dict()}
    now = names_today(model, saved)
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
