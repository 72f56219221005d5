"""Reading a recipe: YAML as people mean it, and the folders and files that it names, beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..metrics import SHIPPED

_FOLDERS = ("model", "data", "sources", "draws", "test_data", "source_data")


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads `1e-3` as the number it is."""

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


def find_folders(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of the recipe in the file `path`, with paths for the names of what lies beside it.

    That is models and data, a metric's folder, and the results of searches among the methods.

    Example:
        >>> find_folders(Path("recipes/noise.yaml"), {"model": "fashion_mnist/vit"})
        {'model': '/home/me/recipes/fashion_mnist/vit'}
    """
    found = {key: _beside(path, value) if key in _FOLDERS else value for key, value in keys.items()}
    if isinstance(metric := keys.get("metric"), str):
        folder, colon, number = metric.partition(":")
        found["metric"] = metric if folder in SHIPPED else _beside(path, folder) + colon + number
    if isinstance(methods := keys.get("methods"), list):
        found["methods"] = [_with_result(path, method) for method in methods]
    return found


def _beside(path: Path, name: Any) -> Any:
    """The path of what lies beside the file `path` under that name, or the name: it may be one of the Hub.

    Of a list each entry; of a mapping its entry `data`. What begins with a dot is no name on the Hub.
    """
    if isinstance(name, list):
        return [_beside(path, each) for each in name]
    if isinstance(name, dict):
        return {key: _beside(path, each) if key == "data" else each for key, each in name.items()}
    found = path.parent / str(name)
    return str(found.resolve()) if isinstance(name, str) and (found.exists() or name.startswith(".")) else name


def _with_result(path: Path, method: Any) -> Any:
    options = method.get("searched") if isinstance(method, dict) else None
    if not isinstance(options, dict) or not isinstance(result := options.get("result"), str):
        return method
    return {**method, "searched": {**options, "result": str((path.parent / result).resolve())}}
