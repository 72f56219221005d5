"""Local paths and secrets, which have no place in what is published."""

from __future__ import annotations

import re
from typing import Any

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
        return {key: without_paths(part) for key, part in value.items() if not _SECRET.search(str(key))}
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
