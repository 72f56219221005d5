"""The record of where results are from: package versions, machine, date, and the identity of a data set."""

from __future__ import annotations

import datetime
import os
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder

from ...atomic_files import digest_of
from ..tasks.task import load_or_raise

PACKAGES = ("surgical-peft", "torch", "transformers", "peft", "datasets")


def versions() -> dict[str, str]:
    """The installed version of each package that results depend on."""
    return {name: version(name) for name in PACKAGES}


def machine() -> str:
    """Processor and number of cores.

    Example:
        >>> machine()
        'x86_64, 2 cores'
    """
    return f"{platform.machine()}, {os.cpu_count()} cores"


def today() -> str:
    """The date in UTC, such as `2026-11-28`."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def identity(data: str, config: str | None = None) -> dict[str, Any]:
    """The commit of a data set on the Hub, or a digest of the files of a local one, as `DataReport` has them.

    Args:
        data: path or Hub id.
        config: name of a configuration, where the data set has several.

    Raises:
        SurgicalError: it is neither here nor to be had from the Hub.
    """
    path = Path(data)
    if not path.exists():
        builder = load_or_raise(partial(load_dataset_builder, name=config), data, "data set")
        return {"on_hub": True, "commit": builder.hash, "fingerprint": None}
    return {"on_hub": False, "commit": None, "fingerprint": digest_of(path)}
