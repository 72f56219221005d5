"""Reads JSON into frozen dataclasses by their type hints, and names what does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ...errors import SurgicalError
from ..recipe.recipe import default_of

T = TypeVar("T")


@dataclass(frozen=True)
class JsonReader:
    """Reads the values of one file.

    Numbers have to be finite and texts not empty; keys that no field has are left out, fields with a default may be
    missing. A field whose name is a keyword of Python has an underscore behind it.

    Attributes:
        file: its name, for error messages.
        remedy: what to do about a value that does not fit.

    Example:
        >>> JsonReader("report.json", "train again").read(RateReport, {"learning_rate": 1e-3, "schedule": None})
        SurgicalError: schedule is None in report.json, and has to be text: train again.
    """

    file: str
    remedy: str

    def read(self, kind: type[T], values: Any, path: str = "") -> T:
        """The values as `kind`, a dataclass or a type of JSON.

        Args:
            kind: may be nested, with lists, dictionaries and `| None`.
            values: plain data.
            path: the keys that lead to it.

        Raises:
            SurgicalError: a key is missing, or a value is of another type; the message names it.
        """
        return self._read(kind, values, path)

    def member(self, values: Mapping[str, Any], key: str, path: str = "") -> Any:
        """One of the values at `path`.

        Raises:
            SurgicalError: it is missing.
        """
        if key not in values:
            raise SurgicalError(f"{self.file} has no {_join(path, key)}: {self.remedy}.")
        return values[key]

    def _read(self, kind: Any, value: Any, path: str) -> Any:
        arguments = get_args(kind)
        if NoneType in arguments:
            return None if value is None else self._read(arguments[0], value, path)
        if kind in (int, float):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                self.refuse(path, value, "a number")
        elif kind in (str, bool):
            if not isinstance(value, kind) or value == "":
                self.refuse(path, value, "text" if kind is str else "true or false")
        elif is_dataclass(kind):
            return self._record(kind, value, path)
        elif get_origin(kind) is list:
            if not isinstance(value, list):
                self.refuse(path, value, "a list")
            return [self._read(arguments[0], entry, path) for entry in value]
        elif get_origin(kind) is dict:
            if not isinstance(value, dict):
                self.refuse(path, value, "keys with values")
            return {key: self._read(arguments[1], entry, _join(path, key)) for key, entry in value.items()}
        return value

    def _record(self, kind: Any, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self.refuse(path, value, "keys with values")
        hints = get_type_hints(kind)
        keys = {entry.name: entry.name.rstrip("_") for entry in fields(kind)}
        optional = {entry.name for entry in fields(kind) if default_of(entry) is not MISSING}
        asked = {name: key for name, key in keys.items() if key in value or name not in optional}
        members = {name: self.member(value, key, path) for name, key in asked.items()}
        return kind(**{name: self._read(hints[name], members[name], _join(path, keys[name])) for name in asked})

    def refuse(self, path: str, value: Any, wanted: str) -> None:
        """Raise a `SurgicalError` about the value at `path`, which has to be something else."""
        raise SurgicalError(f"{path} is {value!r} in {self.file}, and has to be {wanted}: {self.remedy}.")


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as `JsonReader` reads it."""
    return asdict(record, dict_factory=lambda pairs: {name.rstrip("_"): value for name, value in pairs})


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
