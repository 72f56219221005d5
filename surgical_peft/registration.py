"""Makes PEFT know the method: done once, when the package is imported.

`peft.utils.register_peft_method` only takes members of PEFT's own closed enum, so the mappings are written directly,
under a key of our own enum. They are looked up by the string in `adapter_config.json`, to which that key is equal.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import SurgicalConfig, SurgicalPeftType
from .errors import SurgicalError
from .model import SurgicalModel


def register() -> None:
    """Enter `SURGICAL` into PEFT's mappings; a second call changes nothing.

    Raises:
        SurgicalError: another package, or a later PEFT, already uses the name or the prefix.
    """
    key: Any = SurgicalPeftType.SURGICAL
    present = PEFT_TYPE_TO_TUNER_MAPPING.get(key)
    if present is SurgicalModel:
        return
    users = [str(name) for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == SurgicalModel.prefix]
    if present is not None or users:
        raise SurgicalError(
            f"PEFT already has a method {key.value!r} or a prefix {SurgicalModel.prefix!r} "
            f"({present or ', '.join(users)}): it cannot be used beside surgical_peft in one process."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = SurgicalConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = SurgicalModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = SurgicalModel.prefix
