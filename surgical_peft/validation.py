"""The text edge: turns a name from YAML, the command line or a config into the function it stands for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from .errors import SurgicalError


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'? "` if `known` has something like `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def resolve(name: str, package: ModuleType) -> Callable[..., Any]:
    """The function that `name` stands for: one that `package` exports, or the user's own as `"package.module:name"`.

    Raises:
        SurgicalError: no such name (the message gives the nearest one and lists all), or not of a function.

    Example:
        >>> resolve("rgn", criteria)
        <function rgn at 0x...>
    """
    kind = package.__name__.rpartition(".")[2]
    if name in package.__all__:
        return getattr(package, name)
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise SurgicalError(f"{name!r} cannot be imported: {error}. Write 'package.module:name'.") from error
        if not callable(found):
            raise SurgicalError(f"{name!r} is a {type(found).__name__}, not a function.")
        return found
    raise SurgicalError(
        f"{name!r} is none of the {kind}: {nearest(name, package.__all__)}There are: {', '.join(package.__all__)}; "
        "your own as 'package.module:name'."
    )
