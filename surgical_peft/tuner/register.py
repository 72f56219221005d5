"""Registers the method with PEFT, once, when the package is imported.

`peft.utils.register_peft_method` only takes members of PEFT's own closed enum, so the mappings are written directly,
under a key of our own enum. They are looked up by the string in `adapter_config.json`, to which that key is equal.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ..errors import SurgicalError
from .config import SurgicalConfig, SurgicalPeftType
from .loading.saved_files import watch_reading
from .model import SurgicalModel
from .peft_patches import patch_peft


def register() -> None:
    """Enter `SURGICAL` into PEFT's mappings; a second call changes nothing.

    Raises:
        SurgicalError: another package, or a later PEFT, already uses the name or the prefix.
    """
    key: Any = SurgicalPeftType.SURGICAL
    ours = _full_name(SurgicalModel)
    users = [
        _full_name(PEFT_TYPE_TO_TUNER_MAPPING[name])
        for name, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()
        if name == key or prefix == SurgicalModel.prefix
    ]
    others = [user for user in users if user != ours]  # ours may be there, from before a reload
    if others:
        raise SurgicalError(
            f"PEFT already knows {others[0]} under the name {key.value!r} or the prefix {SurgicalModel.prefix!r}, and "
            f"{ours} needs both: use them in separate processes."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = SurgicalConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = SurgicalModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = SurgicalModel.prefix
    watch_reading()
    patch_peft()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
