from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from surgical_peft import SurgicalError
from surgical_peft.experiments.quickstart import trials
from surgical_peft.experiments.quickstart.quickstart import best_surgical_run, quickstart, runs_at_best_rates
from surgical_peft.experiments.quickstart.trials import METHODS, SHIFTS, Run


def test_a_short_quickstart_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw and a few steps: the numbers mean nothing, the whole path is walked, the reload check included."""
    few = {name: replace(each, rates=each.rates[: 2 if name == "head" else 1]) for name, each in METHODS.items()}
    monkeypatch.setattr(sys.modules[quickstart.__module__], "METHODS", few)
    monkeypatch.chdir(tmp_path)  # Trainer once left an empty folder `runs` there
    console = Console(record=True, width=160)
    report = quickstart(tmp_path / "out", console, epochs=0.2, seeds=[1])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert [row["method"] for row in report["methods"]] == list(METHODS)
    for row in report["methods"]:
        for shift in SHIFTS:
            assert len(row["shifts"][shift]["test"]) == 1
            assert 0 <= row["shifts"][shift]["test"][0] <= 1
    by_name = {row["method"]: row for row in report["methods"]}
    assert by_name["full fine-tuning"]["parameters"] == 205_962
    assert by_name["head"]["parameters"] == 650
    assert by_name["head"]["bytes"] < 650 * 4 + 8_000
    assert by_name["no adaptation"]["ms"] is None
    text = console.export_text()
    assert "Total:" in text and "equal logits" in text and "scores.png" in text
    assert (tmp_path / "out" / "scores.png").stat().st_size > 10_000
    for name in ("noise", "label-map"):
        assert (tmp_path / "out" / "adapters" / name / "adapter_model.safetensors").exists()
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in METHODS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written beside it


def runs(method: str, accuracies: dict[float, list[float]], shift: str = "noise") -> dict[Run, float]:
    return {
        Run(shift, seed, method, rate, Path()): accuracy
        for rate, each in accuracies.items()
        for seed, accuracy in enumerate(each)
    }


def test_the_rate_is_chosen_by_the_mean_over_the_draws() -> None:
    validation = runs("head", {0.01: [0.9, 0.1], 0.03: [0.6, 0.6]}) | runs(
        "head", {0.01: [0.9], 0.03: [0.2]}, "label map"
    )
    chosen = runs_at_best_rates(validation)
    assert [(run.shift, run.rate, run.seed) for run in chosen] == [
        ("noise", 0.03, 0),
        ("noise", 0.03, 1),
        ("label map", 0.01, 0),
    ]


def test_of_equal_rates_the_lower_is_taken() -> None:
    assert {run.rate for run in runs_at_best_rates(runs("head", {0.1: [0.5], 0.01: [0.5]}))} == {0.01}


def test_the_best_surgical_run_is_no_baseline() -> None:
    validation = (
        runs("full fine-tuning", {1e-3: [0.99]}) | runs("head", {0.1: [0.5]}) | runs("last (4, 5)", {0.1: [0.6]})
    )
    assert best_surgical_run("noise", list(validation), validation).method == "last (4, 5)"


def test_a_damaged_adapter_fails_the_reload_check(tmp_path: Path) -> None:
    run = Run("noise", 0, "head", 0.01, tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SurgicalError, match="loaded in a new process"):
        trials.check_reload(tmp_path / "adapter", run)


def test_missing_files_are_named() -> None:
    with pytest.raises(SurgicalError, match="recipes/nothing"):
        trials.shipped("nothing")


def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SurgicalError, match="would be lost"):
        quickstart(tmp_path)


def test_an_installed_package_finds_what_it_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surgical_peft" / "shipped" / "fashion_mnist").mkdir(parents=True)
    monkeypatch.setattr(
        trials, "__file__", str(tmp_path / "surgical_peft" / "experiments" / "quickstart" / "trials.py")
    )
    assert trials.shipped("fashion_mnist") == tmp_path / "surgical_peft" / "shipped" / "fashion_mnist"
