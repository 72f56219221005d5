from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from surgical_peft import SurgicalError
from surgical_peft.experiments.compare.comparison import Comparison
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.quickstart import quickstart as module
from surgical_peft.experiments.quickstart.quickstart import (
    METHODS,
    SHIFTS,
    best_surgical,
    check_reload,
    quickstart,
    shipped,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_short_quickstart_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw and a few steps: the numbers mean nothing, the whole path is walked, the reload check included."""
    monkeypatch.setattr(module, "RATES", [1e-3])
    monkeypatch.setitem(METHODS, "head", {"blocks": {"names": ["head"], "rates": [1e-3, 3e-3]}})
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
    assert by_name["head"]["shifts"]["noise"]["rate"] in (1e-3, 3e-3)  # the grid as it is, its edge or not
    assert by_name["no adaptation"]["ms"] is None
    text = console.export_text()
    assert "Total:" in text and "equal logits" in text and "scores.png" in text
    assert (tmp_path / "out" / "scores.png").stat().st_size > 10_000
    for name in ("noise", "label-map"):
        assert (tmp_path / "out" / "adapters" / name / "adapter_model.safetensors").exists()
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in METHODS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written beside it


def test_the_best_surgical_method_is_no_baseline() -> None:
    comparison = Comparison(module._recipe("noise", 1, [0]))
    saved = json.loads((BENCHMARKS / "compare" / "noise" / "report.json").read_text())
    row = ComparisonReport.from_json(saved).methods[0]
    validation = {"full fine-tuning": 0.99, "LoRA r=8": 0.98, "head": 0.5, "last (4, 5)": 0.6}
    rows = {
        name: replace(row, method=title, validation=[validation.get(name, 0.1)])
        for name, title in zip(METHODS, comparison.methods, strict=True)
    }
    assert best_surgical(rows, comparison) == ("last (4, 5)", rows["last (4, 5)"])


def test_a_damaged_adapter_fails_the_reload_check(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    with pytest.raises(SurgicalError, match="loaded in a new process"):
        check_reload(tmp_path / "noise", tmp_path)


def test_missing_files_are_named() -> None:
    with pytest.raises(SurgicalError, match="recipes/nothing"):
        shipped("nothing")


def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SurgicalError, match="would be lost"):
        quickstart(tmp_path)


def test_an_installed_package_finds_what_it_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surgical_peft" / "shipped" / "fashion_mnist").mkdir(parents=True)
    monkeypatch.setattr(
        module, "__file__", str(tmp_path / "surgical_peft" / "experiments" / "quickstart" / "quickstart.py")
    )
    assert shipped("fashion_mnist") == tmp_path / "surgical_peft" / "shipped" / "fashion_mnist"
