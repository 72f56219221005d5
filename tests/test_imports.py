"""The house rules that a machine can hold: imports run one way, modules are short, public names are documented."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import surgical_peft
from surgical_peft.experiments.compare import methods
from surgical_peft.export import targets

PACKAGE = Path(surgical_peft.__file__).parent

# A room imports from those before it, and within itself.
ROOMS = [
    *("errors", "threads", "quiet", "atomic_files", "validation", "typed_json", "rendering", "blocks", "precision"),
    *(
        "masks",
        "criteria",
        "scoring",
        "tuner",
        "policies",
        "procedures",
        "optim",
        "prefix_cache",
        "search",
        "export",
        "diagnosis",
        "auto",
        "api",
    ),
    *("experiments", "cli", "__init__", "__main__"),
]
LAB = [
    *("shifts", "metrics", "recipe", "tasks", "training", "search", "compare", "advise", "start", "quickstart"),
    *("predict", "emit", "doctor"),
]
TORCH_ONLY = ["blocks", "criteria"]  # no transformers, no PEFT

PACKAGES = [surgical_peft, surgical_peft.criteria, surgical_peft.policies, surgical_peft.procedures, methods, targets]
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def top(module: str) -> str:
    return module.partition(".")[0]


def imported(tree: ast.Module, module: str) -> list[str]:
    """Absolute names that a module imports when it is imported: not inside functions, but inside `if` and `try`."""
    names: list[str] = []
    ahead: list[ast.AST] = [tree]
    package = ["surgical_peft", *module.split(".")[:-1]]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *(node.module.split(".") if node.module else [])]
            names += [".".join(source)] if node.module else [".".join([*source, alias.name]) for alias in node.names]
        ahead += ast.iter_child_nodes(node)
    return names


def upwards(rooms: list[str], within: str = "") -> list[str]:
    """Imports of a room from one that is not before it."""
    wrong = []
    for module, path in MODULES.items():
        names = [name.removeprefix("surgical_peft.") for name in imported(ast.parse(path.read_text()), module)]
        names = [name.removeprefix(within) for name in names if name.startswith(within)]
        own = top(module.removeprefix(within))
        if own in rooms and module.startswith(within):
            later = [name for name in names if top(name) in rooms[rooms.index(own) + 1 :]]
            wrong += [f"{module} imports {name}" for name in later]
    return wrong


def test_every_module_is_in_a_room() -> None:
    assert {top(module) for module in MODULES} == set(ROOMS)
    assert {module.split(".")[1] for module in MODULES if module.startswith("experiments.")} == {*LAB, "__init__"}


def test_imports_run_one_way() -> None:
    assert upwards(ROOMS) == []
    assert upwards(LAB, "experiments.") == []


def test_no_circle() -> None:
    """Between modules, by what they import when they are imported."""
    arrows: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = [name.removeprefix("surgical_peft.") for name in imported(ast.parse(path.read_text()), module)]
        arrows[module] = {name for name in names if name in MODULES and name != module}
    TopologicalSorter(arrows).prepare()  # raises CycleError


def test_what_matters_is_found_with_torch_only() -> None:
    for module in MODULES:
        if top(module) in TORCH_ONLY:
            outside = {top(name) for name in imported(ast.parse(MODULES[module].read_text()), module)}
            assert not outside & {"transformers", "peft", "accelerate", "datasets", "matplotlib", "rich"}, module


def test_modules_are_short_and_say_what_they_are_for() -> None:
    assert [module for module, path in MODULES.items() if len(path.read_text().splitlines()) > 300] == []
    assert [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_unique_and_documented(package: ModuleType) -> None:
    assert list(package.__all__) == sorted(set(package.__all__))
    for name in package.__all__:
        public = getattr(package, name)
        assert public.__doc__ and not public.__doc__.startswith(f"{name}("), name  # a dataclass makes one up
        if inspect.isclass(public):
            own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
            methods = [
                key for key, value in own.items() if inspect.isfunction(value) or isinstance(value, classmethod)
            ]
            assert all(inspect.getdoc(getattr(public, key)) for key in methods), name


FRESH = """
import json, sys
import accelerate, peft, torch, transformers
from transformers import PreTrainedModel, Trainer
before = set(sys.modules)
import surgical_peft
new = sorted({name.partition(".")[0] for name in sys.modules.keys() - before})
for name in MISSING:
    sys.modules[name] = None
says = {}
def told(what, run):
    try:
        run()
    except surgical_peft.SurgicalError as error:
        says[what] = str(error)
def draw():
    from surgical_peft.rendering import new_figure
    with new_figure("bars.png", 2, 2):
        pass
def lab():
    import surgical_peft.experiments
told("draw", draw)
told("lab", lab)
print(json.dumps({"new": new, "says": says}))
"""


def test_the_library_stands_alone(tmp_path: Path) -> None:
    """It brings in nothing of the lab's, and what needs an extra that is missing says which."""
    script = FRESH.replace("MISSING", '["matplotlib", "evaluate"]')
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["new"]) == {"surgical_peft", "peft"}
    assert result["says"].keys() == {"draw", "lab"}
    assert all("surgical-peft[experiments]" in said for said in result["says"].values())
    assert list(tmp_path.iterdir()) == []
