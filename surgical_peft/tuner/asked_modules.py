"""The modules that names or an expression ask for, by PEFT's rules: the largest ones."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ..blocks.module_lists import parents, within
from ..blocks.unwrap import named_bare_modules
from ..errors import SurgicalError
from .config import Choice, SurgicalConfig

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class NamedModules:
    """The modules of a model that a config may ask for.

    A config may choose among each of a thousand blocks: what it excludes is found once, and the modules of a block
    without a walk through all of them.

    Args:
        model: whose modules.
        config: its `exclude_modules` are left out.

    Attributes:
        by_path: all modules, in the order of the model.

    Raises:
        SurgicalError: `exclude_modules` that match nothing.
    """

    def __init__(self, model: nn.Module, config: SurgicalConfig) -> None:
        self._model, self._task_type = model, config.task_type
        self.by_path = dict(named_bare_modules(model))
        self._paths = list(self.by_path)
        self._places = {path: place for place, path in enumerate(self._paths)}
        self._excluded = _excluded(self._paths, config.exclude_modules)
        if config.exclude_modules and not self._excluded:
            raise SurgicalError(
                f"exclude_modules={config.exclude_modules!r} match no module. Names: {self.some_names(None)}."
            )
        self._opened = {parent for path in self._excluded for parent in (path, *parents(path))}

    def outermost(self, choice: Choice, inside: Collection[str] | None) -> dict[str, set[str] | None]:
        """The largest modules asked for, within the paths `inside` if given; in parts where they hold an excluded one.

        Returns:
            for each path the names of the parameters in it that are asked for; None for all of them.
        """
        asked = SurgicalConfig(target_modules=choice, task_type=self._task_type)
        if isinstance(asked.target_modules, str) and asked.target_modules.lower() == "all-linear":
            _maybe_include_all_linear_layers(asked, self._model)
        outermost: dict[str, None] = {}
        apart: dict[str, set[str] | None] = {}
        for path in self.inside(inside):
            if not path or within(path, outermost) or within(path, self._excluded):
                continue
            if not (check_target_module_exists(asked, path) or within(path, apart)):
                continue
            module = self.by_path[path]
            if not any(True for _ in module.parameters()):
                continue
            if not isinstance(module, _WITHOUT_FORWARD) and path not in self._opened:
                outermost[path] = None
                continue
            apart[path] = {name for name, _ in module.named_parameters(recurse=False)}
        return {**{path: names for path, names in apart.items() if names}, **outermost}

    def inside(self, homes: Collection[str] | None) -> list[str]:
        """The paths of the modules within `homes`, in the order of the model; of all modules if None."""
        if homes is None:
            return self._paths
        places: set[int] = set()
        for home in homes:
            if (place := self._places.get(home)) is None:  # a parameter that no module has to itself
                continue
            places.add(place)
            while (place := place + 1) < len(self._paths) and (not home or self._paths[place].startswith(f"{home}.")):
                places.add(place)
        return [self._paths[place] for place in sorted(places)]

    def some_names(self, inside: Collection[str] | None) -> str:
        """Names of modules for a message."""
        ends = dict.fromkeys(path.rpartition(".")[2] for path in self.inside(inside) if path not in (inside or ("",)))
        return ", ".join([name for name in ends if not name.isdigit()][:30]) or "none"


def _excluded(paths: Collection[str], exclude_modules: list[str] | str | None) -> set[str]:
    if isinstance(exclude_modules, str):
        asked = SurgicalConfig(target_modules=".*", exclude_modules=exclude_modules)
        return {path for path in paths if isinstance(check_target_module_exists(asked, path), _ExcludedModule)}
    names = set(exclude_modules or ())  # PEFT tries each of them on each path

    def is_named(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[place:]) in names for place in range(len(parts)))

    return {path for path in paths if is_named(path)} if names else set()
