"""The private parts of PEFT that the code relies on: what they look like in the PEFT that is installed.

A failure here names what changed; DESIGN 4.1 and the modules named below say what it is relied on for.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import peft
import peft.functional
import pytest
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load

import surgical_peft
from surgical_peft.tuner import peft_patches
from surgical_peft.tuner.layer import SurgicalLayer
from surgical_peft.tuner.model import SurgicalModel
from surgical_peft.tuner.peft_hooks import PeftHooks

PACKAGE = Path(surgical_peft.__file__).parent

# Private names of PEFT, by the module of ours that uses them.
USED = {
    "peft_hooks": {"_ExcludedModule"},
    "asked_modules": {"_ExcludedModule", "_maybe_include_all_linear_layers"},
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def overridden(cls: type, base: type) -> list[str]:
    return [
        name
        for name, value in vars(cls).items()
        if name in vars(base) and inspect.isroutine(getattr(base, name)) and not name.startswith("__")
    ]


@pytest.mark.parametrize("name", overridden(PeftHooks, BaseTuner))
def test_a_hook_is_called_as_it_was(name: str) -> None:
    theirs, ours = (
        [each for each in parameters(getattr(cls, name)) if each[0] != "self"] for cls in (BaseTuner, PeftHooks)
    )  # some are static
    takes_anything = {kind for _, kind, _ in ours} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert takes_anything or ours == theirs, f"peft {peft.__version__}: BaseTuner.{name} takes {theirs}"


@pytest.mark.parametrize("name", overridden(SurgicalModel, BaseTuner) + overridden(SurgicalLayer, BaseTunerLayer))
def test_a_verb_takes_what_it_took(name: str) -> None:
    owner, base = (SurgicalModel, BaseTuner) if name in vars(BaseTuner) else (SurgicalLayer, BaseTunerLayer)
    if isinstance(vars(base).get(name), property):
        return
    theirs = [each[0] for each in parameters(getattr(base, name))]
    ours = [each[0] for each in parameters(getattr(owner, name))]
    assert set(theirs) <= {*ours, "args", "kwargs"}, f"peft {peft.__version__}: {base.__name__}.{name} takes {theirs}"


def test_private_hooks_stand_in_one_place() -> None:
    """Outside of `peft_hooks`, only `_enable_peft_forward_hooks` and unloading are private methods of BaseTuner's."""
    assert {name for name in overridden(SurgicalModel, BaseTuner) if name.startswith("_")} == {
        "_unload_and_optionally_merge"
    }
    assert "_enable_peft_forward_hooks" in vars(SurgicalModel)
    assert "_enable_peft_forward_hooks" in inspect.getsource(peft.PeftModel)  # asked for by name


def test_no_other_private_name_is_imported() -> None:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for names in re.findall(r"^from peft[\w.]* import (\([^)]*\)|.*)$", path.read_text(), re.MULTILINE):
            private = {name for name in re.findall(r"\w+", names) if name.startswith("_")}
            if private:
                found.setdefault(path.stem, set()).update(private)
    assert found == USED
    assert all(hasattr(tuners_utils, name) for names in USED.values() for name in names)


@pytest.mark.parametrize(
    ("module", "name", "takes"),
    [
        (save_and_load, "get_base_model_state_dict", ["model"]),
        (save_and_load, "set_base_model_state_dict", ["model", "state_dict", "strict"]),
        (save_and_load, "_get_adapter_state_dict_key_prefixes", ["model"]),
        (peft.utils.other, "_set_layer_requires_grad", ["layer", "requires_grad"]),
        (peft.functional, "delete_adapter", ["model", "adapter_name", "prefix", "layer_cls"]),
    ],
)
def test_what_is_patched_takes_what_it_took(module: Any, name: str, takes: list[str]) -> None:
    function = getattr(module, name)
    assert list(inspect.signature(function._surgical_original).parameters) == takes
    assert peft_patches.patch_peft() is None
    assert not hasattr(function._surgical_original, "_surgical_original")  # a second time changes nothing


def test_patches_are_everywhere_under_their_names() -> None:
    for name in ("get_base_model_state_dict", "set_base_model_state_dict"):
        for module in (peft, peft.utils, save_and_load):
            assert hasattr(getattr(module, name), "_surgical_original")
