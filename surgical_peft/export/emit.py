"""Writes a choice as another tool reads it, checked by that tool's own rule."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import SurgicalError, first_of
from ..validation import resolve
from . import targets
from .targets.choice import Choice, Emission


def emit(choice: Choice, target: str | Callable[[Choice], Emission]) -> Emission:
    """The choice as `target` reads it.

    Args:
        choice: what is to be trained, see [`Choice.of`][surgical_peft.export.targets.choice.Choice.of].
        target: a name from `export.targets`, with hyphens or underscores, one of your own as `package.module:name`, or
            the function itself.

    Raises:
        SurgicalError: no such target, or it cannot say this choice; the message gives the nearest it can.

    Example:
        >>> print(emit(Choice.of(llama, "my-llama", SurgicalConfig(blocks=[-1])), "axolotl").text)
    """
    if isinstance(target, str):
        write = resolve(target if ":" in target else target.replace("-", "_"), targets)
    else:
        write = target
    emission = write(choice)
    if not isinstance(emission, Emission):
        raise SurgicalError(f"{target} gives a {type(emission).__name__}, not an Emission: it has to return one.")
    if emission.trained == choice.parameters:
        return emission
    more, less = emission.trained - choice.parameters, choice.parameters - emission.trained
    faults = [
        f"{verb} {len(names)} tensors ({first_of((name for name in choice.names if name in names), most=3)})"
        for verb, names in (("also trains", more), ("leaves out", less))
        if names
    ]
    raise SurgicalError(
        f"{target} cannot train exactly {choice.in_words}. The nearest it can, {emission.settings}, "
        f"{' and '.join(faults)}. Choose what it can say, or another tool: axolotl, ms-swift, TRL, unsloth and verl "
        "take any parameters."
    )
