"""Each metric that ships, against a plain reference; and how they are loaded."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error, r2_score

from surgical_peft import SurgicalError
from surgical_peft.experiments import metrics
from surgical_peft.experiments.metrics import SHIPPED, load_metric

FOLDER = Path(load_metric.__code__.co_filename).parent
CLASSES = {
    "accuracy": accuracy_score,
    "macro_f1": lambda right, predicted: f1_score(right, predicted, average="macro", zero_division=0),
    "matthews_correlation": matthews_corrcoef,
}

NUMBERS = {
    "r2": r2_score,
    "neg_mean_squared_error": lambda right, predicted: -mean_squared_error(right, predicted),
    "pearson": lambda right, predicted: np.corrcoef(right, predicted)[0, 1],
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [2, 5, 50])
def test_metrics_of_classes_are_those_of_scikit_learn(name: str, size: int) -> None:
    metric = load_metric(name)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        right = rng.integers(0, 4, size)
        predicted = np.where(rng.random(size) < 0.5, right, rng.integers(0, 5, size))
        expected = CLASSES[name](right, predicted)
        assert metric(predicted.tolist(), right.tolist()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [2, 5, 50])
def test_metrics_of_numbers_are_those_of_scikit_learn_and_numpy(size: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        right = rng.normal(3, 2, size)
        predicted = right + rng.normal(0, 1, size)
        for name, reference in NUMBERS.items():
            value = load_metric(name)(predicted.tolist(), right.tolist())
            assert value == pytest.approx(reference(right, predicted), abs=1e-9)


def test_metrics_of_constant_numbers() -> None:
    assert load_metric("pearson")([1.0, 1.0], [0.0, 2.0]) == 0
    assert load_metric("r2")([1.0, 1.0], [0.0, 2.0]) == 0
    assert load_metric("r2")([1.0, 2.0], [1.0, 1.0]) == 0


def test_f1_of_label_sets_is_that_of_scikit_learn() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        right, predicted = rng.integers(0, 2, (2, 20, 4))
        expected = f1_score(right, predicted, average="micro", zero_division=0)
        assert load_metric("micro_f1")(predicted.tolist(), right.tolist()) == pytest.approx(expected)
    assert load_metric("micro_f1")([[0, 0]], [[0, 0]]) == 0


def spans(tags: tuple[str, ...]) -> set[tuple[int, int, str]]:
    """All (start, end, type) whose words are one span: begun by B-, or by I- with no span of the type before it."""
    found = set()
    for start, end in itertools.combinations(range(len(tags) + 1), 2):
        first, *others = tags[start:end]
        kind = first[2:]
        begins = first[0] == "B" or (first[0] == "I" and (start == 0 or tags[start - 1][2:] != kind))
        goes_on = end < len(tags) and tags[end] == f"I-{kind}"
        if begins and all(tag == f"I-{kind}" for tag in others) and not goes_on:
            found.add((start, end, kind))
    return found


def test_spans_are_those_of_the_definition() -> None:
    """F1 of every pair of taggings of 3 words with two types, against sets made from the definition."""
    metric = load_metric("span_f1")
    taggings = list(itertools.product(["O", "B-A", "I-A", "B-B", "I-B"], repeat=3))
    rng = np.random.default_rng(0)
    for _ in range(150):
        predicted, right = (taggings[rng.integers(len(taggings))] for _ in range(2))
        both = spans(predicted), spans(right)
        total = sum(map(len, both))
        expected = 2 * len(both[0] & both[1]) / total if total else 0.0
        assert metric([list(predicted)], [list(right)]) == pytest.approx(expected)


def test_spans_of_different_examples_are_different() -> None:
    assert load_metric("span_f1")([["B-A"], ["O"]], [["O"], ["B-A"]]) == 0
    assert load_metric("span_f1")([["B-A"], ["O"]], [["B-A"], ["B-A"]]) == pytest.approx(2 / 3)


def test_tags_of_another_scheme_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'S-A'.*IOB2"):
        load_metric("span_f1")([["S-A"]], [["O"]])


def test_exact_match_and_log_likelihood() -> None:
    assert load_metric("exact_match")(["a", "b ", "c", "d"], ["a", "b", "C", "d"]) == 0.5
    assert load_metric("log_likelihood")([-1.0, -2.5], [3, 4]) == -1.75


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 4 and\n#### 1,234", 1234),
        ("#### -5", -5),
        ("it costs $18.", 18),
        ("$1,234.50 in all", 1234.5),
        ("a tip of $.50 each", 0.5),
        ("0.5 kg or .25", 0.25),
        ("1.2.3", 3),
        ("(7)-2", 2),
        ("1,234,567 or 12,34", 34),
        ("18.00", 18),
        ("-$3", -3),
        ("10-4", 4),
        ("1, 2,3", 3),
        ("1234,567", 567),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    metric = load_metric("exact_number")
    assert metric([text], [f"is {number}"]) == (number is not None)
    assert metric(["9"], [text]) == 0


def test_the_scripts_come_with_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER.parents[2], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"surgical_peft/experiments/metrics/{name}/{name}.py" for name in SHIPPED} < names


def test_every_metric_that_ships_is_tested_here() -> None:
    assert {*CLASSES, *NUMBERS, "micro_f1", "span_f1", "exact_match", "exact_number", "log_likelihood"} == {
        name
        for name in SHIPPED
        if not name.startswith("squad_")  # tests/experiments/tasks/test_question_answering.py
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_script_has_one_import_a_line_and_imports_nothing_to_install(name: str) -> None:
    """`evaluate` reads imports by line before it runs a script, and fails on what is not installed."""
    standard = {"import re"}
    imports = re.findall(r"^(?:import|from) .*$", (FOLDER / name / f"{name}.py").read_text(), re.MULTILINE)
    own = {line for line in imports if line.startswith("from surgical_peft.")}
    assert set(imports) - standard - own == {"import datasets", "import evaluate"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "'accuracy'.*accuracy, exact_match"),
        ("no-such/metric", "'no-such/metric'.*accuracy.*Hub"),
    ],
)
def test_an_unknown_metric_says_which_ship(name: str, message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_metric(name)


SCRIPT = """
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"first": predictions[0], "last": predictions[-1], "each": predictions}
"""


def test_a_metric_of_the_users_own_with_several_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(SCRIPT)
    path = str(tmp_path / "mine")
    assert load_metric(f"{path}:last")([3, 4], [0, 0]) == 4
    for name in (path, f"{path}:each", f"{path}:median"):
        with pytest.raises(SurgicalError, match=rf"{path}:first, {path}:last\."):
            load_metric(name)([3, 4], [0, 0])


def test_a_metric_that_forgets_to_return_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(SCRIPT.replace("return {", "{"))
    with pytest.raises(SurgicalError, match=r"mine.*NoneType"):
        load_metric(str(tmp_path / "mine"))([3, 4], [0, 0])


def test_a_metric_that_cannot_be_imported_is_not_called_unknown(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("import not_installed\n" + SCRIPT)
    with pytest.raises(SurgicalError, match="not_installed") as raised:
        load_metric(str(tmp_path / "mine"))
    assert "unknown" not in str(raised.value)


def compute_often(number: int) -> list[float]:
    metrics._module.cache_clear()
    return [load_metric("accuracy")([number] * 50, [number] * number + [9] * (50 - number)) for _ in range(20)]


def test_processes_side_by_side_share_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default `evaluate` keeps predictions in files that all processes share."""
    monkeypatch.chdir(tmp_path)
    load_metric("accuracy")([0], [0])
    before = set(Path(evaluate.config.HF_METRICS_CACHE).rglob("*.arrow*"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        values = pool.map(compute_often, (1, 2), chunksize=1)
    assert values == [[1 / 50] * 20, [2 / 50] * 20]
    assert list(tmp_path.iterdir()) == []
    assert set(Path(evaluate.config.HF_METRICS_CACHE).rglob("*.arrow*")) == before
