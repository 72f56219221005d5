"""The house rules that a machine can hold: imports run one way, modules are short, public names are documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import surgical_peft
from surgical_peft import methods

PACKAGE = Path(surgical_peft.__file__).parent

# A module may import from tiers above its own, and a package (criteria, policies, report) within itself.
TIERS = [
    ["errors", "memory", "quiet", "threads", "strict_yaml", "rate_grid", "terminal", "weight_versions"],
    ["files", "names", "fingerprint", "patterns", "paired", "step_costs", "class_code", "epochs", "weak_hook"],
    ["float16_gradients", "origin"],
    ["master_weights"],
    ["wrappers", "checkpointing", "eval_mode", "foreign_optimizers"],
    ["lists", "masks"],
    ["stacks", "architecture", "tensors"],
    ["batches", "slots", "offloading", "partition"],
    ["blocks", "parked"],
    ["layer", "quantised"],
    ["criteria", "mixed_batches"],
    ["scores", "processes"],
    ["reading", "leftovers", "progress"],
    ["scoring", "selection", "prefix_cache"],
    ["signature"],
    ["config"],
    ["saved", "loading", "adapter_card"],
    ["new_weights", "moved_buffers"],
    ["fit", "target_checks"],
    ["stock", "delta", "adapter_weights", "same_base"],
    ["lowrank"],
    ["export"],
    ["targets", "lora", "attach"],
    ["choosing", "peft_hooks"],
    ["model"],
    ["auto", "peft_patches"],
    ["registration"],
    ["policies"],
    ["search_result"],
    ["report"],
    ["rates"],
    ["optim", "callback", "trainer_patch"],
    ["procedures", "storages"],
    ["studies"],
    ["search"],
    ["shifts", "metrics"],
    ["recipe_folders"],
    ["recipe"],
    ["tasks"],
    ["run_report", "push", "tiny"],
    ["train"],
    ["workbench"],
    ["objective"],
    ["recipe_search", "methods"],
    ["compare_settings", "halving"],
    ["compare_check"],
    ["compare_runs", "advice_rows"],
    ["advise"],
    ["compare_crew", "compare_report"],
    ["compare"],
    ["trials"],
    ["quickstart"],
    ["cli_many"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]
TIER_OF = {name: number for number, tier in enumerate(TIERS) for name in tier}
TORCH_ONLY = ["wrappers", "lists", "stacks", "partition", "blocks", "criteria"]  # no transformers, no PEFT

PACKAGES = [surgical_peft, surgical_peft.criteria, surgical_peft.policies, surgical_peft.procedures, methods]
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


def violations(module: str, tree: ast.Module) -> list[str]:
    own = TIER_OF[top(module)]
    wrong = []
    for name in imported(tree, module):
        if not name.startswith("surgical_peft."):
            continue
        other = name.split(".")[1]
        within = "." in module and other == top(module)
        if not within and TIER_OF.get(other, len(TIERS)) >= own:
            wrong.append(f"{module} imports {other}")
    return wrong


def test_every_module_has_a_tier() -> None:
    unknown = sorted({top(module) for module in MODULES} - TIER_OF.keys())
    assert not unknown, f"{unknown}: add each to TIERS in {__file__}, below everything that it imports"
    gone = sorted(TIER_OF.keys() - {top(module) for module in MODULES})
    assert not gone, f"{gone}: no such module, take them out of TIERS in {__file__}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    assert violations(module, ast.parse(MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("scores", "from .scoring import score_blocks", ["scores imports scoring"]),
        ("scores", "def f():\n    from .report.plots import plot_scores", []),
        ("blocks", "if True:\n    from . import criteria", ["blocks imports criteria"]),
        ("criteria.rgn", "from ..scores import BlockScores", ["criteria.rgn imports scores"]),
        ("criteria.rgn", "from .fisher import fisher\nimport torch", []),
        ("policies.static", "import surgical_peft.optim", ["policies.static imports optim"]),
        ("selection", "from .scoring import score_blocks", ["selection imports scoring"]),
        ("cli", "from .new_module import f", ["cli imports new_module"]),
        ("config", "from .selection import Selection\nfrom .errors import SurgicalError", []),
    ],
)
def test_the_check_sees(module: str, source: str, wrong: list[str]) -> None:
    assert violations(module, ast.parse(source)) == wrong


@pytest.mark.parametrize("module", [module for module in MODULES if top(module) in TORCH_ONLY])
def test_what_matters_is_found_with_torch_only(module: str) -> None:
    outside = {top(name) for name in imported(ast.parse(MODULES[module].read_text()), module)}
    assert not outside & {"transformers", "peft", "accelerate", "datasets", "matplotlib", "rich", "typer"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_300_lines(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 300


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_unique(package: ModuleType) -> None:
    assert list(package.__all__) == sorted(set(package.__all__))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: ModuleType) -> None:
    for name in package.__all__:
        public = getattr(package, name)
        assert public.__doc__ and not public.__doc__.startswith(f"{name}("), name  # a dataclass makes one up
        if inspect.isclass(public):
            own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
            methods = [
                key for key, value in own.items() if inspect.isfunction(value) or isinstance(value, classmethod)
            ]
            assert all(inspect.getdoc(getattr(public, key)) for key in methods), name
