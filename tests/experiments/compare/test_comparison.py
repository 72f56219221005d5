"""What a comparison is known by: the names of its findings stay what they were."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from surgical_peft import SurgicalError
from surgical_peft.experiments.compare.comparison import Comparison, Job
from surgical_peft.experiments.compare.findings import Findings
from surgical_peft.experiments.compare.methods import make_method
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.recipe.yaml_file import StrictLoader

# Method, title, and the names that commit 99d97b5 gave to its training and its test.
EARLIER: list[tuple[object, str, str, str]] = [
    ("nothing", "no adaptation", "4792c54145e9b48bf2aaf67b", "c66f92a85544f164f1976251"),
    ("full", "full fine-tuning", "4d434dfb189c15370ad35d1a", "35e25a6e78b474b21979613c"),
    ("layer_decay", "layer decay 0.75", "7062c81e5ce4c8b3cc877ae0", "a6841e8837c24c5905e25842"),
    ({"layer_decay": {"decay": 0.65}}, "layer decay 0.65", "1f961a978e66f4725f389e73", "2180b778f41a1f13cd0fa8cc"),
    ("lp_ft", "LP-FT", "b5a9d31b8071ef5514c47d6c", "47b2c5fa0fe85c8652acda79"),
    ({"lp_ft": {"epochs": 1}}, "LP-FT, 1 + rest", "2cce48a975b0d7227471f195", "053ed972bb2f705942a73ed7"),
    ("auto_rgn", "Auto-RGN", "4aa5208d6b7133bb8a8c5ef2", "66701a33b3eec40c4a338469"),
    ("auto_rgn_paper", "Auto-RGN (paper)", "0699e90987b51e78edadc16c", "48dc286cd38ba783ade1f0b4"),
    ("bvg_ls", "BVG-LS", "f2bb775fd634c544281d7647", "6e50c6ceb518f00bc6dd341b"),
    ({"bvg_ls": {"momentum": "masked"}}, "BVG-LS, masked", "229969cbab2846c659abc091", "21c3380ae8d86ca0c5c7c0c1"),
    ({"lora": {"rank": 4, "rates": [1e-3]}}, "LoRA r=4", "f6e6f4499a793ff380b73573", "eb3b650f5ff960839fcc8f5a"),
    ({"first": {"k": 1}}, "first 1", "f9027693e4d35b49f46ab925", "56a85cb59e3b9d3690e87955"),
]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison(
        Recipe(
            model="org/vit",
            data="org/target",
            corruption="contrast",
            methods=[given for given, *_ in EARLIER],
            rates=[1e-3, 1e-2],
            seeds=[0, 1],
            source_data="org/source",
            training={"num_train_epochs": 2, "use_cpu": True, "output_dir": "run"},
        )
    )


def test_what_is_finished_is_not_trained_again(comparison: Comparison) -> None:
    """A comparison resumes from files with these names, which an earlier version may have written."""
    assert list(comparison.methods) == [title for _, title, *_ in EARLIER]
    for _, title, training, test in EARLIER:
        assert comparison.name_of(Job("training", 0, 1, title, 1e-3)) == f"training-{training}"
        assert comparison.name_of(Job("test", 0, 1, title, 1e-3)) == f"test-{test}"
    choice = Job("choice", 0, 1, "first 1")
    assert comparison.name_of(choice) == "choice-cfc9782b24a1cba672941cef"
    by_blocks = comparison.name_of(Job("training", 0, 1, "first 1", 1e-3), ("0", "embeddings"))
    assert by_blocks == "training-ad5420cae340db1accaa99a0"
    assert comparison.name_of(comparison.costs) == "costs-3bd9a4e95bf1ff139977c2eb"
    assert comparison.name_of(comparison.source(0)) == "source-e261bed98a3a6cd233282a91"


def test_the_documented_form_of_a_policy_is_read() -> None:
    text = (Path(__file__).parents[3] / "docs" / "compare_and_advise.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(methods:.*?)```", text, re.DOTALL)
    full, *named, own = yaml.load(block, Loader=StrictLoader)["methods"]
    assert full == "full" and "mymodule" in str(own)
    titles = [make_method(entry).title for entry in named]
    assert titles == ["lisa(every=8, num_blocks=1)", "auto_rgn(every='epoch'), blocks -2:, head"]


@pytest.mark.parametrize("content", ["", "5", "{}", '{"found": 5}', "[" * 100_000])
def test_a_damaged_finding_is_named_with_what_to_do(content: str, comparison: Comparison, tmp_path: Path) -> None:
    findings, job = Findings(comparison, tmp_path), comparison.source(0)
    findings.path(job).parent.mkdir(parents=True)
    findings.path(job).write_text(content)
    with pytest.raises(SurgicalError, match=r"runs/source-.*delete it"):
        findings.load(job)
