"""The arguments of a `LoraConfig` as JSON can hold them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from ..errors import SurgicalError


def lora_arguments(lora: LoraConfig | dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ from LoRA's defaults.

    Raises:
        SurgicalError: arguments that LoRA does not take, or that are no part of ours.
    """
    try:
        config = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
    except TypeError as error:
        raise SurgicalError(f"lora={lora!r} cannot be made into a LoraConfig: {error}.") from error
    if config.modules_to_save or config.layer_replication:
        raise SurgicalError(
            "lora: modules_to_save and layer_replication are not its part here; put new heads into modules_to_save of "
            "SurgicalConfig itself."
        )
    default = LoraConfig()
    given = {known.name: getattr(config, known.name) for known in fields(config)}
    return {
        name: as_list(value)
        for name, value in given.items()
        if value != getattr(default, name) and name not in ("peft_type", "auto_mapping", "peft_version")
    }


def as_list(choice: Any) -> Any:
    """A sorted list of a tuple or set, which JSON has not; all else as it is."""
    return sorted(choice) if isinstance(choice, tuple | set) else choice
