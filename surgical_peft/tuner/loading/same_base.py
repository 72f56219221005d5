"""Checks by digests of its weights that a model is the base a saved adapter was made from."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ...blocks.module_lists import within
from ...blocks.unwrap import named_bare_modules
from ...errors import SurgicalError
from ..config import SurgicalConfig
from ..layer import base_tensors
from ..tensors.row_names import pick
from ..tensors.tuned_tensors import Targets, TensorMap
from .fingerprint import differ_in_dtype, fingerprint
from .new_weights import new_head
from .saved_adapter import heads_of
from .saved_files import saved_tensors

_EFFECT = {
    "fingerprint": "A tuned block in the midst of another model's blocks seldom works",
    "frozen_fingerprint": "The tuned blocks get other inputs there, or their outputs are read otherwise",
}


def check_base(
    model: nn.Module,
    config: SurgicalConfig,
    targets: Targets,
    held: Collection[str],
    today: Mapping[str, str] | None,
    strict: bool,
) -> None:
    """Compare the base's weights with those that the adapter was made from, or note them in its config.

    These are the weights that are tuned, and all that the adapter takes from the base. What its file holds and is no
    weight of the base's checkpoint (`new_weights`, `modules_to_save`, embeddings of a resized vocabulary) does not
    count: it is another one in every process.

    Args:
        targets: the modules that were asked for.
        held: the tensors of the adapter.
        today: names of the weights in its file, and what they are called now; None for a new adapter.

    Warns:
        UserWarning: they are others.

    Raises:
        SurgicalError: with `strict`: they are others, or that cannot be told.
    """
    tensors = TensorMap.find(model)
    asked = [name for name, by_name in tensors.chosen(targets).items() if by_name]
    heads = heads_of(config, (path for path, _ in named_bare_modules(model)))
    new = config.new_weights or ()
    base = base_tensors(model)
    rest = [name for name in base if name not in held and not within(name, heads)]
    parts = {"fingerprint": {name: pick(base, name) for name in asked if name not in new}}
    if config.new_weights is not None:
        besides = {old: tensors.first[name] for old, name in (today or {}).items() if tensors.first.get(name) in rest}
        parts["frozen_fingerprint"] = {name: base[name] for name in rest} | _saved_besides(config, besides)
    digests = {name: fingerprint(weights.values()) for name, weights in parts.items()}
    if today is None:
        for name, digest in digests.items():
            setattr(config, name, digest)
        return
    if config.new_weights is None and _as_before(config, {n: pick(base, n) for n in asked}, new_head(model, config)):
        if strict:
            warnings.warn(
                "strict_base=True: the adapter is from an earlier version, which noted the base's weights of the "
                "tuned blocks only. These are the same; whether all others are cannot be told.",
                stacklevel=2,
            )
        return
    problems = [
        problem for name, weights in parts.items() if (problem := _compare(config, name, weights, digests[name]))
    ]
    if strict and problems:
        raise SurgicalError(problems[0][1])
    if told := [message for certain, message in problems if certain]:
        warnings.warn(told[0], stacklevel=2)


def _compare(
    config: SurgicalConfig, field: str, weights: Mapping[str, Tensor], digest: str | None
) -> tuple[bool, str] | None:
    """The fault of the `weights` here, and whether it is certain; None if there is none."""
    expected = getattr(config, field)
    if digest == expected and (digest is not None or not weights):
        return None
    if digest is None or expected is None:
        problem = (
            "the adapter has no fingerprint of its base model"
            if expected is None
            else "the weights of this base model cannot be read yet (offloaded, sharded or quantized)"
        )
        return False, f"strict_base=True, but {problem}: load without it if you know that the base is right."
    cause = (
        "The base is loaded in another dtype than the adapter was made in, which may be all: load it in that dtype to "
        "be sure."
        if differ_in_dtype(digest, expected)
        else f"{_EFFECT[field]}: load the base it was made from."
    )
    where = "in the tuned blocks" if field == "fingerprint" else "in what is not tuned"
    return (
        True,
        f"the adapter was made from a base model with fingerprint {expected} {where}, this one has {digest}. {cause}",
    )


def _as_before(config: SurgicalConfig, tuned: Mapping[str, Tensor], heads: list[str]) -> bool:
    """True if the fingerprint is that of the tuned weights as versions without `new_weights` made it."""
    without = [tensor for name, tensor in tuned.items() if not within(name, heads)]
    made = {fingerprint(without), fingerprint(tuned.values())}  # 0.1.0 counted new heads in
    return config.fingerprint is not None and config.fingerprint in made


def _saved_besides(config: SurgicalConfig, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of the base that PEFT has saved beside the adapter, from its file: they are loaded with it."""
    return {names[old]: tensor for old, tensor in saved_tensors(config, names.__contains__).items()} if names else {}
