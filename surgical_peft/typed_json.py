"""Reads JSON that anybody may have changed, into frozen dataclasses by their type hints; names what does not fit."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import SurgicalError, reason_of
from .validation import is_number

T = TypeVar("T")
_MOST_BYTES = 2**28  # of a file that this package writes
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_WORDS |= {list: "a list", tuple: "a list", dict: "keys with values", Mapping: "keys with values"}


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The dictionary in a JSON file.

    Args:
        path: of the file.
        remedy: what to do about a file that cannot be read.

    Raises:
        SurgicalError: there is no such file, it is larger than any of this package, or it holds no dictionary.

    Example:
        >>> read_json("runs/auto/report.json", "train again")["task"]
        'image_classification'
    """
    path = Path(path)
    try:
        if not path.is_file():  # a named pipe would be waited for
            raise SurgicalError(f"there is no file {str(path)!r}: {remedy}.")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise SurgicalError(f"{str(path)!r} has {size:,} bytes, {_MOST_BYTES:,} at most: {remedy}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SurgicalError(f"{str(path)!r} is not readable as JSON ({reason_of(error)}): {remedy}.") from error
    return parse_json(text, repr(str(path)), remedy)


def parse_json(text: str, name: str, remedy: str) -> dict[str, Any]:
    """The dictionary in a JSON text; `name` says what text it is.

    Raises:
        SurgicalError: it is not JSON, nested too deeply, with text that no file can hold, or no dictionary.
    """
    try:
        values = json.loads(text)
        if "\\ud" in text.lower():  # half of a character
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise SurgicalError(f"{name} is not readable as JSON ({reason_of(error)}): {remedy}.") from error
    if not isinstance(values, dict):
        raise SurgicalError(f"{name} holds a {type(values).__name__}, not a dictionary: {remedy}.")
    return values


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
            kind: may be nested, with lists, tuples, dictionaries and alternatives.
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
        origin, arguments = get_origin(kind), get_args(kind)
        if kind in (Any, list, dict):
            self._check_finite(value, path)
        if kind is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._one_of(arguments, value, path)
        if is_dataclass(kind):
            return self._record(kind, value, path)
        if origin is Literal:
            fits = any(value is known or (isinstance(known, str) and value == known) for known in arguments)
        elif kind in (int, float):
            fits = is_number(value) and (kind is float or isinstance(value, int))
        elif kind is str:
            fits = isinstance(value, str) and value != ""
        else:
            plain = origin or kind
            fits = not isinstance(plain, type) or isinstance(value, list if plain is tuple else plain)
        if not fits:
            self.refuse(path, value, kind)
        if origin in (list, tuple):
            return origin(self._read(arguments[0], entry, path) for entry in value)
        if origin in (dict, Mapping):
            return {key: self._read(arguments[1], entry, _join(path, str(key))) for key, entry in value.items()}
        return value

    def _check_finite(self, value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                self._check_finite(entry, _join(path, str(key)))
        elif isinstance(value, list):
            for entry in value:
                self._check_finite(entry, path)
        elif isinstance(value, float):
            self._read(float, value, path)

    def _one_of(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None and NoneType in kinds:
            return None
        alternatives = [kind for kind in kinds if kind is not NoneType]
        if len(alternatives) == 1:  # the message names what is wrong inside
            return self._read(alternatives[0], value, path)
        for kind in alternatives:
            try:
                return self._read(kind, value, path)
            except SurgicalError:
                continue
        self.refuse(path, value, Union[kinds])

    def _record(self, kind: Any, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self.refuse(path, value, dict)
        hints = get_type_hints(kind)
        keys = {entry.name: entry.name.rstrip("_") for entry in fields(kind)}
        optional = {entry.name for entry in fields(kind) if default_of(entry) is not MISSING}
        asked = {name: key for name, key in keys.items() if key in value or name not in optional}
        members = {name: self.member(value, key, path) for name, key in asked.items()}
        return kind(**{name: self._read(hints[name], members[name], _join(path, keys[name])) for name in asked})

    def refuse(self, path: str, value: Any, wanted: Any) -> NoReturn:
        """Raise a `SurgicalError` about the value at `path`, which has to be something else."""
        raise SurgicalError(f"{path} is {value!r} in {self.file}, and has to be {_in_words(wanted)}: {self.remedy}.")


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    word = _WORDS.get(origin or kind, getattr(kind, "__name__", str(kind)))
    return f"a list of {_in_words(arguments[0])}" if origin in (list, tuple) and arguments[0] is not Any else word


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass as `JsonReader` reads it."""
    return asdict(record, dict_factory=lambda pairs: {name.rstrip("_"): value for name, value in pairs})


def default_of(entry: Field[Any]) -> Any:
    """The default of a field of a dataclass; `MISSING` if it has none."""
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def is_plain(kind: Any) -> bool:
    """True for a type of JSON, also nested: `JsonReader` looks at all of its values.

    Example:
        >>> is_plain(list[float] | None), is_plain(SchedulerType | str)
        (True, False)
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType, list, tuple, dict):
        return all(map(is_plain, arguments))
    return origin is Literal or kind in (int, float, str, bool, list, dict, NoneType)
