"""Reads the names that the code of a module's class uses: the only sign of what it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

import torch
from torch import nn


@cache
def names_in_code(cls: type) -> frozenset[str]:
    """The names that the methods of a class use, and the functions of its module that they name.

    `nn.Module`'s own methods do not count. Of a TorchScript class, which has no code to look into, `training` is
    assumed.

    Example:
        >>> "training" in names_in_code(nn.Dropout), "training" in names_in_code(nn.Linear)
        (True, False)
    """
    if issubclass(cls, torch.jit.ScriptModule):
        return frozenset(["training"])
    bases = [base for base in cls.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    methods = [method for base in bases for method in vars(base).values() if isinstance(method, FunctionType)]
    called = [method.__globals__.get(name) for method in methods for name in _names(method.__code__)]
    functions = [*methods, *(function for function in called if isinstance(function, FunctionType))]
    return frozenset(name for function in functions for name in _names(function.__code__))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
