"""The arguments of a `LoraConfig` as JSON can hold them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from peft import LoraConfig

from ..errors import SurgicalError, reason_of
from ..typed_json import JsonReader, is_plain
from ..validation import check_count, check_number

_JSON = JsonReader("lora", "give what peft.LoraConfig takes")
_WIDER: dict[str, Any] = {  # than PEFT's annotations say, or narrower
    "lora_alpha": float,
    "init_lora_weights": bool | str | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
}


def lora_arguments(lora: LoraConfig | dict[str, Any]) -> dict[str, Any]:
    """The arguments that differ from LoRA's defaults.

    Raises:
        SurgicalError: arguments that LoRA does not take, or that are no part of ours.
    """
    try:
        config = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
    except Exception as error:  # whatever PEFT runs into
        raise SurgicalError(f"lora={lora!r} cannot be made into a LoraConfig: {reason_of(error)}.") from error
    if config.modules_to_save or config.layer_replication:
        raise SurgicalError(
            "lora: modules_to_save and layer_replication are not its part here; put new heads into modules_to_save of "
            "SurgicalConfig itself."
        )
    default = LoraConfig()
    given = {known.name: as_list(getattr(config, known.name)) for known in fields(config)}
    changed = {name: value for name, value in given.items() if _is_changed(value, as_list(getattr(default, name)))}
    hints = {**get_type_hints(LoraConfig), **_WIDER}
    for name, value in changed.items():
        if is_plain(hints[name]):
            _JSON.read(hints[name], value, name)
    check_count("lora", "r", config.r, "the rank")
    check_number("lora", "lora_dropout", config.lora_dropout, "a share", at_least=0, at_most=1)
    for name, rank in (config.rank_pattern or {}).items():
        check_count("lora", f"rank_pattern[{name!r}]", rank, "the rank of these modules")
    return {
        name: value for name, value in changed.items() if name not in ("peft_type", "auto_mapping", "peft_version")
    }


def _is_changed(value: Any, default: Any) -> bool:
    return type(value) is not type(default) or bool(value != default)


def as_list(choice: Any) -> Any:
    """A sorted list of a tuple or set, which JSON has not; all else as it is."""
    return sorted(choice, key=str) if isinstance(choice, tuple | set) else choice
