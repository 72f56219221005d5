"""The policy and blocks that an optimizer's state comes from, by the text in its parameter groups."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from torch.optim import Optimizer

from ..errors import SurgicalError
from ..policies.policy import Policy

_VERSION = "2:"  # of the text; before, a policy's facts were fields, which its text repeated
_FACTS = [
    *("granularity", "probe_batches", "probe_every", "criterion", "by_epoch", "hard", "state_policy"),
    *("reset_at_probe", "skip_idle", "own_loss"),
]
_SINCE = {"AutoRGN": ("every", "num_batches", "state"), "AutoSNR": ("every", "num_batches"), "BVGLS": ("momentum",)}
_DISCRIMINATIVE = re.compile(r"Discriminative\((.*)factor=(.*)\)")


def text_of(policy: Policy) -> str:
    """The text by which a parameter group knows its policy."""
    return _VERSION + str(policy)


def check_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state that another policy, or a training of other blocks, has left.

    Raises:
        SurgicalError: it has.
    """
    saved, current = state_dict["param_groups"], optimizer.param_groups
    policy: Policy = optimizer.block_rates.policy  # type: ignore[attr-defined]
    if not _is_of(saved[0].get("policy"), policy) or _blocks(saved) != _blocks(current):
        raise SurgicalError(
            f"this checkpoint was trained under {_origin(saved)}, not under {_origin(current)}: resume with what "
            "wrote it, or start anew."
        )


def _is_of(text: str | None, policy: Policy) -> bool:
    if text is None or text.startswith(_VERSION):
        return text == text_of(policy)
    # `discriminative(f)` had a class of its own, and is `layer_decay(1 / f)` now
    text = _DISCRIMINATIVE.sub(lambda parts: f"LayerDecay({parts[1]}decay={1 / float(parts[2])!r})", text)
    return text in (str(policy), _first_text(policy))


def _first_text(policy: Policy) -> str:
    """A policy's text in the first version: its facts, then the settings that are none of them."""
    cls = type(policy)
    since = [name for base in cls.__mro__ for name in _SINCE.get(base.__name__, ())]
    settings = {name: getattr(policy, name) for name in _FACTS}
    settings |= {f.name: getattr(policy, f.name) for f in fields(policy) if f.repr and f.name not in since}
    if "multipliers" in settings and cls.__name__ == "Static":
        settings["given"] = tuple(settings.pop("multipliers").items())
    return f"{cls.__qualname__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def _blocks(groups: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(group.get("block", "") for group in groups))


def _origin(groups: list[dict[str, Any]]) -> str:
    if "policy" not in groups[0]:
        return "another optimizer"
    return f"{groups[0]['policy'].removeprefix(_VERSION)} on the blocks {', '.join(_blocks(groups))}"
