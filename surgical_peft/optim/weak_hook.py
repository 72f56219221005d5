"""Hooks on a model that belong to something else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class WeakHook:
    """Calls a method while its object lives, which it does not keep alive; a copy of it, or a pickled one, is idle.

    Example:
        >>> handle = model.register_forward_hook(WeakHook(watcher.look), with_kwargs=True)
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = (lambda: None) if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        """The result of the method; None if its object is gone."""
        method = self._method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()
