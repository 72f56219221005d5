"""Local paths and secrets, which have no place in what is published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME

from ..atomic_files import write_text

_ABSOLUTE = re.compile(r"/|~[\w.-]*[/\\]|\\\\|[A-Za-z]:[/\\]")
_SECRET = re.compile(r"(^|_)(hub_token|auth_token|access_token|api_key|password|secret)$")


def is_absolute(text: Any) -> bool:
    """True for text that is an absolute path, here or on another system."""
    return isinstance(text, str) and _ABSOLUTE.match(text) is not None


def without_paths(value: Any) -> Any:
    """Plain data with the last part of each absolute path in its place, and without secrets.

    Example:
        >>> without_paths({"model": "/home/me/models/vit", "data": "target-0", "hub_token": "hf_1"})
        {'model': 'vit', 'data': 'target-0'}
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(part) for key, part in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return name_of(value) if is_absolute(value) else value


def name_of(path: str) -> str:
    """The last part of a path; where a folder lies is nobody's business.

    Example:
        >>> name_of("/home/me/models/vit")
        'vit'
    """
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def without_base(config: dict[str, Any]) -> dict[str, Any]:
    """The values of an `adapter_config.json` for others: without the place of a base model that lies here.

    A name of the Hub stays. Whoever loads the adapter has the base model, or gives it as `--base` on the command line.
    """
    name = str(config.get("base_model_name_or_path") or "")
    is_here = is_absolute(name) or (name and Path(name).exists())
    return {**config, "base_model_name_or_path": None} if is_here else config


@contextmanager
def configs_without_bases(folder: str | Path) -> Iterator[None]:
    """Inside, the configs of the adapters in a folder are as `without_base` gives them; afterwards as they were."""
    texts = {path: path.read_text(encoding="utf-8") for path in Path(folder).rglob(CONFIG_NAME)}
    try:
        for path, text in texts.items():
            write_text(path, json.dumps(without_base(json.loads(text)), indent=2) + "\n")
        yield
    finally:
        for path, text in texts.items():
            write_text(path, text)
