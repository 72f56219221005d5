"""What the README shows is what the code does."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from surgical_peft import SurgicalCallback
from surgical_peft.experiments.quickstart.tables import comparison_markdown
from surgical_peft.experiments.recipe.recipe import load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.search.result import SearchResult

from .toys import TOYS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SWEEPS = ("noise", "label_map")  # in the order of the columns
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run a block of the README with the shipped model beside it and a tenth of an epoch of training."""
    code = code.replace('"recipes/', f'"{ROOT}/recipes/').replace('report_to="none"', 'report_to="none", use_cpu=True')
    code = re.sub(r"num_train_epochs=\d+", "max_steps=2", code)
    names["__name__"] = "__main__"  # as in a script
    exec(code, names)
    return names


def test_the_pieces_of_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(CODE) == 6
    vision, text, load, search, criterion, policy = CODE
    task = load_task(load_recipe(ROOT / "recipes" / "label_map.yaml"))
    train = [task.splits["train"][i] for i in range(64)]
    loader = DataLoader(train, batch_size=32, collate_fn=default_data_collator)  # type: ignore[arg-type]
    vision_run = run(vision, train=train, dataloader=loader)
    assert set(vision_run["model"].peft_config["default"].blocks) == {"embeddings", "head"}
    loaded = run(load, base_model=task.load_model())["model"]
    assert isinstance(loaded, PeftModel)

    bert = TOYS["bert"]
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: bert.model())
    examples = [{name: tensor[i] for name, tensor in bert.batch(size=8).items()} for i in range(8)]
    text_run = run(text, train=examples)
    assert text_run["model"].peft_config["default"].blocks == ["1", "2"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    metric = {("3",): 0.8, ("1",): 0.5, ("1", "3"): 0.9}
    found = run(
        search, model=task.load_model(), train_and_validate=lambda config: metric.get(tuple(config.blocks), 0.1)
    )
    assert found["config"].blocks == ["1", "3"] and (tmp_path / "study.db").exists()

    scores = run(criterion, model=task.load_model(), dataloader=loader)["scores"]
    assert all(0 < value < 1 for value in scores.values.values()) and "agreement" in scores.criterion
    model, args = task.load_model(), TrainingArguments("run", max_steps=3, report_to="none", use_cpu=True)
    chosen = run(policy, args=args)["optimizer"]
    seen: list[list[bool]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append([model.vit.layers[0].mlp.fc1.weight.requires_grad, model.classifier.weight.requires_grad])

    callbacks = [SurgicalCallback(), Watch()]
    Trainer(model=model, args=args, train_dataset=train, callbacks=callbacks, optimizer_cls_and_kwargs=chosen).train()
    assert seen == [[True, True], [False, True], [True, True]]


def test_own_criterion_and_policy_take_less_than_ten_lines_each() -> None:
    for code in CODE[4:]:
        body = code[code.index("@") :].strip().splitlines()
        assert len([line for line in body if line.strip()]) < 10


@pytest.mark.parametrize("folder", ["criteria", "policies"])
def test_the_benchmarks_are_the_measured_ones(folder: str) -> None:
    table = (ROOT / "benchmarks" / folder / "table.md").read_text(encoding="utf-8")
    assert table.split("\n\n")[0].strip() in README


@pytest.mark.parametrize("name", ["checkpointing", "export"])
def test_the_small_tables_are_the_measured_ones(name: str) -> None:
    text = (ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8")
    first = next(part for part in text.split("\n\n") if part.startswith("|"))
    assert first.strip() in README


def test_the_architectures_are_the_counted_ones() -> None:
    text = (ROOT / "benchmarks" / "architectures" / "table.md").read_text(encoding="utf-8")
    known, built = re.search(r"(\d+) model types, (\d+) of them built", text).groups()  # type: ignore[union-attr]
    assert f"of {known} types {built} can be built" in README.replace("\n", " ")
    assert text.count("| unknown |") == 2


@pytest.mark.parametrize("folder", ["quickstart", "quickstart-8-epochs"])
def test_the_tables_are_the_measured_ones(folder: str) -> None:
    """Every figure of the README's tables comes out of a committed report."""
    report = json.loads((ROOT / "benchmarks" / folder / "report.json").read_text(encoding="utf-8"))
    table = comparison_markdown(report)
    assert (ROOT / "benchmarks" / folder / "table.md").read_text(encoding="utf-8") == table
    assert table.split("\n\n")[0] in README


def test_the_quickstart_shows_the_reversal() -> None:
    """What issue A asks the measured table to show; the committed report is a run of `make quickstart`."""
    report = json.loads((ROOT / "benchmarks" / "quickstart" / "report.json").read_text(encoding="utf-8"))
    mean = {
        (row["method"].split(" ")[0], shift): 100 * sum(each["test"]) / len(each["test"])
        for row in report["methods"]
        for shift, each in row["shifts"].items()
    }
    assert max(mean["last", "label map"], mean["head", "label map"]) >= mean["full", "label map"] + 3
    assert mean["first", "noise"] >= mean["last", "noise"] + 3
    assert mean["first", "noise"] >= mean["full", "noise"] - 1.5
    assert report["seconds"] <= 180


def test_the_sweeps_are_those_of_the_files() -> None:
    results = [SearchResult.load(ROOT / "benchmarks" / "sweeps" / name / "search" / "search.json") for name in SWEEPS]
    for result in results:
        assert result.procedure == "sweep(candidates='all')"
    for candidates in zip(*(result.candidates for result in results), strict=True):
        blocks = candidates[0].blocks
        cells = ["all" if len(blocks) > 1 else blocks[0].replace("_", " ")]
        for result, each in zip(results, candidates, strict=True):
            assert each.blocks == blocks and each.deviation is not None
            cell = f"{100 * each.metric:.1f} ± {100 * each.deviation:.1f}"
            cells.append(f"**{cell}**" if blocks == result.best.blocks else cell)
        assert f"| {' | '.join(cells)} |" in README
    ratio = re.search(r"\*\*the sweep\*\*.*\*\*(0\.\d\d)\*\*", (ROOT / "benchmarks" / "sharing.md").read_text())
    assert ratio is not None and f"takes {ratio[1]} of the time" in " ".join(README.split())
    assert float(ratio[1]) <= 0.6


def test_what_is_said_of_the_criteria_is_that_of_the_scores() -> None:
    """Mean regrets where one thing changed, and where two did; the table gives the mean of both."""
    found = json.loads((ROOT / "benchmarks" / "criteria" / "criteria.json").read_text(encoding="utf-8"))
    truth = json.loads((ROOT / "benchmarks" / "criteria" / "truth.json").read_text(encoding="utf-8"))["shifts"]
    seen = [shift for shift, each in truth.items() if each["group"] == "design"]
    unseen = [shift for shift in truth if shift not in seen]
    double = [shift for shift in truth if " and " in shift and shift != "sandals and sneakers"]
    assert (len(seen), len(unseen), len(set(double) & set(seen))) == (40, 10, 15)

    def mean(criterion: str, shifts: list[str], what: str = "regret", digits: int = 1) -> str:
        return f"{statistics.fmean(found[criterion][shift][what] for shift in shifts):.{digits}f}"

    one, two = ([shift for shift in unseen if (shift in double) is is_double] for is_double in (False, True))
    each = sorted(found["probe"][shift]["regret"] for shift in two)
    told = " ".join(README.split())
    assert f"a sweep of {mean('a sweep', [*truth], 'trainings', 0)} trainings, for" in told
    assert f"trainings, for {mean('probe', [*truth], 'trainings', 2)}.**" in told
    assert f"kept back it is {mean('probe', unseen)} points behind the best block, {mean('probe', one)} where" in told
    assert f"of mails) and {mean('probe', two)}, from {each[0]:.1f} to {each[-1]:.1f}, where two did" in told
    assert f"The sweep is {mean('a sweep', one)} and {mean('a sweep', two)} behind." in told
    assert f"it is {mean('probe', seen)} behind, and a sweep {mean('a sweep', seen)}." in told
    cheap = f"{mean('depth_gain', seen)} points behind on the seen shifts, {mean('depth_gain', unseen)} on the unseen."
    assert cheap in told
    mails = [shift for shift, of_shift in truth.items() if of_shift["kind"] == "mail"]
    assert f"On mail the probe takes {mean('probe', mails, 'trainings', 2)} of a training." in told
    constant = statistics.fmean(found["the last layer"][shift]["regret"] for shift in truth)
    for published in ("rgn", "grad_norm", "fisher", "snr", "bvr", "eb"):
        assert statistics.fmean(found[published][shift]["regret"] for shift in truth) > constant


COMPARED = {
    "label_map": "Label map",
    "noise": "Noise",
    "contrast": "Contrast",
    "subclass": "Subclass",
    "spam_char_noise": "Mistyped mail",
    "spam_hard_ham": "Hard ham and later spam",
}


@pytest.mark.parametrize("shift", COMPARED)
def test_the_comparisons_are_those_of_the_tables(shift: str) -> None:
    """Every share of a comparison that the README tells is a mean of its committed table."""
    table = (ROOT / "benchmarks" / "compare" / shift / "table.md").read_text(encoding="utf-8")
    means = set(re.findall(r"^\| [^|]*\| \**(\d+\.\d) ±", table, re.MULTILINE))
    assert len(means) > 10
    start = README.index(f"- **{COMPARED[shift]}**", README.index("## Compare"))
    told = README[start : README.index(f"compare/{shift}/table.md", start)]
    shares = re.findall(r"(?<![+\d.])\d\d\.\d", told)
    assert len(shares) >= 6 and set(shares) <= means


@pytest.mark.parametrize(("shift", "column"), [("noise", 1), ("label_map", 3)])
def test_the_headline_is_that_of_the_tables(shift: str, column: int) -> None:
    """Accuracy and difference to full fine-tuning of every method, as in the committed tables."""

    def rows(text: str) -> dict[str, list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| ") and "accuracy" not in line]
        cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
        return {each[0]: each[1:] for each in cells}

    start = README.index("| method | noise, % |", README.index("## Compare"))
    told = rows(README[start : README.index("(`surgical-peft compare recipes/headline", start)])
    table = rows((ROOT / "benchmarks" / "compare" / f"headline_{shift}" / "table.md").read_text(encoding="utf-8"))
    assert len(table) == 10 + 1  # and the line under the header
    for method, cells in table.items():
        if not method.startswith("---"):
            assert told[method][column - 1 : column + 1] == cells[:2]
