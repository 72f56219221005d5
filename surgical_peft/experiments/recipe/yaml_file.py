"""Reads a YAML file that anybody may have written: strictly, and without ever taking long."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ...errors import SurgicalError, reason_of

_MOST_BYTES = 2**20
_MOST_VALUES = 20_000  # with all aliases written out
_DEEPEST = 30


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice and deep nesting, and reads `1e-3` as the number it is."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, in which others lie no deeper than a recipe ever needs."""
        self._depth += 1
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {_DEEPEST} deep", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """The value of the whole file, unless its aliases make it huge or endless."""
        if _size(node, {}) > _MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"it holds more than {_MOST_VALUES:,} values, with its aliases (*) written out",
                problem_mark=node.start_mark,
            )
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _size(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """The number of values in a node; what is seen again is counted again, without being walked again."""
    if node in sizes:
        size = sizes[node]
        if size is None:
            raise yaml.MarkedYAMLError(problem="an alias (*) lies in what it stands for", problem_mark=node.start_mark)
        return size
    sizes[node] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    total = 1 + sum(_size(part, sizes) for part in parts)
    sizes[node] = total
    return total


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        SurgicalError: no such file, one that is too large, not YAML, or anything but a mapping.
    """
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise SurgicalError(f"{str(path)[:200]!r} cannot be the path of a recipe: {reason_of(error)}.") from error
    if not is_file:
        raise SurgicalError(f"there is no recipe {str(path)!r}: give the path of a YAML file.")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise SurgicalError(f"{path} has {size:,} bytes, more than any recipe ({_MOST_BYTES:,}): give a YAML file.")
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # dates, numbers, encoding
        raise SurgicalError(f"{path} is not YAML that can be read: {error}") from error
    if not isinstance(keys, dict):
        raise SurgicalError(f"{path} holds no keys: a recipe needs at least model and data.")
    return keys
