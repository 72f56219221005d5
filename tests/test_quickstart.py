from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from surgical_peft import SurgicalError
from surgical_peft import quickstart as quickstart_module
from surgical_peft.methods import make_method
from surgical_peft.quickstart import METHODS, SHIFTS, SURGICAL, best_surgical, check_reload, quickstart, shipped
from surgical_peft.recipe import Recipe
from surgical_peft.train import train


def test_a_short_quickstart_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw and a few steps: the numbers mean nothing, the whole path is walked, the reload check included."""
    monkeypatch.chdir(tmp_path)  # Trainer once left an empty folder `runs` there
    monkeypatch.setattr(quickstart_module, "METHODS", ["nothing", "full", "head", "auto_rgn"])
    monkeypatch.setattr(quickstart_module, "RATES", [1e-2])
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # no processes: each would first import for seconds
    console = Console(record=True, width=160)
    report = quickstart(tmp_path / "out", console, epochs=0.1, seeds=[3])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    methods = [row["method"] for row in report["methods"]]
    assert methods == ["no adaptation", "full fine-tuning", "head", "Auto-RGN"]
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
        run = tmp_path / "out" / "adapters" / name
        assert (run / "adapter" / "adapter_model.safetensors").exists()
        assert json.loads((run / "report.json").read_text())["after"]["test"] > 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in methods)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written beside it


def test_the_surgical_methods_are_among_those_compared() -> None:
    titles = [make_method(each).title for each in METHODS]
    assert len(titles) == 7 and set(SURGICAL) < set(titles)


def test_the_best_surgical_method_is_no_baseline_and_chosen_on_validation() -> None:
    rows = [
        {"method": "full fine-tuning", "validation": [0.99, 0.99], "test": [0.99, 0.99]},
        {"method": "head", "validation": [0.9, 0.1], "test": [0.9, 0.9]},
        {"method": "last third", "validation": [0.6, 0.6], "test": [0.1, 0.1]},
    ]
    assert best_surgical({"methods": rows})["method"] == "last third"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    folder = tmp_path_factory.mktemp("tuned")
    training = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True}
    data = str(shipped("fashion_mnist/target-3"))
    recipe = Recipe(model=str(shipped("fashion_mnist/vit")), data=data, blocks=["head"], training=training)
    train(recipe, folder)
    return folder / "adapter", recipe


def test_another_accuracy_than_reported_fails_the_reload_check(tuned: tuple[Path, Recipe]) -> None:
    with pytest.raises(SurgicalError, match="loaded again, has an accuracy of"):
        check_reload(tuned[0], replace(tuned[1], corruption="gaussian_noise", severity=5))


def test_a_new_process_that_cannot_load_it_fails_the_reload_check(
    tuned: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart_module, "_RELOAD", "import sys; sys.exit(3)")
    with pytest.raises(SurgicalError, match="loaded in a new process, gives other logits than here"):
        check_reload(*tuned)


def test_missing_files_are_named() -> None:
    with pytest.raises(SurgicalError, match=r"recipes/nothing did not come with this installation"):
        shipped("nothing")


def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SurgicalError, match="would be lost"):
        quickstart(tmp_path)


def test_an_installed_package_finds_what_it_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surgical_peft" / "shipped" / "fashion_mnist").mkdir(parents=True)
    monkeypatch.setattr(quickstart_module, "__file__", str(tmp_path / "surgical_peft" / "quickstart.py"))
    assert shipped("fashion_mnist") == tmp_path / "surgical_peft" / "shipped" / "fashion_mnist"
