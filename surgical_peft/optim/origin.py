"""Which policy and blocks the state of an optimizer comes from, by what its groups say."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..errors import SurgicalError


def check_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state that another policy, or a training of other blocks, has left.

    Raises:
        SurgicalError: it has.
    """
    saved, own = _origin(state_dict["param_groups"]), _origin(optimizer.param_groups)
    if saved != own:
        raise SurgicalError(
            f"this checkpoint was trained under {saved}, not under {own}: resume with what wrote it, or start anew."
        )


def _origin(groups: list[dict[str, Any]]) -> str:
    if "policy" not in groups[0]:
        return "another optimizer"
    blocks = dict.fromkeys(group["block"] for group in groups)
    return f"{groups[0]['policy']} on the blocks {', '.join(blocks)}"
