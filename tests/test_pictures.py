"""Every picture that the package draws stands alone: titles in words, labels on the axes, a legend, an honest axis."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import surgical_peft
from surgical_peft.criteria.criterion import GIVEN_UP, GUESSED
from surgical_peft.experiments.advise import plot as advise
from surgical_peft.experiments.advise.advice import Advice, ScoreReport, SignatureReport
from surgical_peft.experiments.compare import plot as compare
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.optim import history
from surgical_peft.scoring import plot as scoring
from surgical_peft.scoring.block_scores import BlockScores
from surgical_peft.search import profile_plot
from surgical_peft.search.result import SearchResult
from tests.experiments.advise.test_advise import played

PACKAGE = Path(surgical_peft.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"
NAMES = ("embeddings", "0", "1", "2", "head")
SCORES = BlockScores(
    values=dict(zip(NAMES, (0.7, 0.3, 0.1, -0.2, 0.0), strict=True)),
    sizes=dict.fromkeys(NAMES, 10),
    blocks={name: name for name in NAMES},
    unscored=(),
    criterion="probe",
    granularity="block",
    num_batches=16,
    model_name="ViTForImageClassification",
    basis={"1": GIVEN_UP, "2": GUESSED},
)


def sweep(shift: str) -> SearchResult:
    return SearchResult.load(BENCHMARKS / "sweeps" / shift / "search" / "search.json")


def with_gaps() -> SearchResult:
    """A sweep in which the trainings of one block failed, and those of another were given up."""
    result, states = sweep("noise"), {"1": "failed", "3": "pruned"}
    trials = [
        replace(trial, metric=float("nan"), state=states[trial.blocks[0]]) if trial.blocks[0] in states else trial
        for trial in result.trials
    ]
    return replace(result, trials=tuple(trials))


def comparison() -> ComparisonReport:
    text = (BENCHMARKS / "compare" / "headline_noise" / "report.json").read_text(encoding="utf-8")
    return ComparisonReport.from_json(json.loads(text))


def advice() -> Advice:
    gradients = dict.fromkeys(NAMES, 0.2)
    signature = SignatureReport(
        gradients=gradients,
        loss=2.0,
        source_loss=1.0,
        moved=dict.fromkeys(NAMES[1:], 0.1),
        floor=dict.fromkeys(NAMES[1:], 0.3),
        moving=["1"],
        kind="features",
    )
    return replace(played("head", ["head"]), scores=ScoreReport("probe", SCORES.values), signature=signature)


def rows(blocks: int) -> list[dict[str, Any]]:
    return [{"step": step, "lr_multiplier": {str(n): float(n != step) for n in range(blocks)}} for step in (1, 5)]


# By module: each that draws is here, and each of its pictures.
PICTURES: dict[Any, dict[str, Callable[[Path], None]]] = {
    scoring: {
        "scores": SCORES.plot,
        "scores side by side": lambda path: scoring.plot_scores({"noise": SCORES, "label map": SCORES}, path),
        "scores of one's own": replace(SCORES, criterion="mine:steepness", basis={}, num_batches=0).plot,
    },
    profile_plot: {
        "profile": sweep("noise").plot,
        "profile from zero": sweep("label_map").plot,
        "profile with gaps": with_gaps().plot,
    },
    history: {
        f"history of {blocks}": lambda path, blocks=blocks: history.plot_history(rows(blocks), 9, path, "lisa")  # type: ignore[misc]
        for blocks in (1, 2, 12)
    },
    compare: {"compare": lambda path: compare.plot(comparison(), path)},
    advise: {"signature": lambda path: advise.plot(advice(), path)},
}
NAMED = {name: draw for pictures in PICTURES.values() for name, draw in pictures.items()}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    """Each picture as matplotlib has it; laid out, but not written."""
    drawn: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figure.draw_without_rendering()
        drawn.append(figure)
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        for draw in NAMED.values():
            draw(tmp_path_factory.mktemp("pictures") / "picture.png")
    return dict(zip(NAMED, drawn, strict=True))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text")))


def test_every_module_that_draws_is_here() -> None:
    drawing = {
        path for path in PACKAGE.rglob("*.py") if re.search(r"with new_figure\(", path.read_text(encoding="utf-8"))
    }
    assert drawing - {PACKAGE / "rendering.py"} == {Path(module.__file__) for module in PICTURES}


@pytest.mark.parametrize("name", NAMED)
def test_titles_and_labels_are_words(name: str, figures: dict[str, Figure]) -> None:
    """Not the name of a class, nor a call; each axis has its label, and the numbers say which way is better."""
    title = figures[name].get_suptitle()
    assert len(title.split()) >= 4
    assert not re.search(r"\w\(|[a-z][A-Z]", title)
    for axes in panels(figures[name]):
        assert not re.search(r"\w\(|[a-z][A-Z]", axes.get_title())
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes is not panels(figures[name])[0]


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith("history")])
def test_an_axis_says_which_way_is_better(name: str, figures: dict[str, Figure]) -> None:
    for axes in panels(figures[name]):
        assert re.search(r"higher = |above 0 = ", axes.get_xlabel() + axes.get_ylabel())


@pytest.mark.parametrize("name", NAMED)
def test_a_measured_axis_begins_at_zero_or_is_marked_as_cut(name: str, figures: dict[str, Figure]) -> None:
    for axes in panels(figures[name]):
        bars = [part for part in axes.patches if isinstance(part, Rectangle)]
        for label, limits, ends in (
            (axes.get_xlabel(), axes.get_xlim(), [bar.get_x() for bar in bars if bar.get_x()]),
            (axes.get_ylabel(), axes.get_ylim(), [bar.get_y() for bar in bars]),
        ):
            if re.search(r"higher = ", label) and min(limits) > 0:
                assert "cut" in label and ends == [min(limits)] * len(ends)
    assert "cut" not in texts(figures["profile from zero"])
    assert "cut" in texts(figures["profile"]) and "cut" in texts(figures["compare"])


@pytest.mark.parametrize("name", ["scores", "scores side by side"])
def test_what_was_given_up_or_guessed_looks_different(name: str, figures: dict[str, Figure]) -> None:
    for axes in panels(figures[name]):
        looks = {
            name: (bar.get_hatch(), to_hex(bar.get_facecolor())) for name, bar in zip(NAMES, axes.patches, strict=True)
        }
        assert looks["embeddings"] == looks["0"] == looks["head"]
        assert len({looks["0"], looks["1"], looks["2"]}) == 3
    (legend,) = figures[name].legends
    assert len(legend.get_texts()) == 3
    assert not figures["scores of one's own"].legends


def test_a_block_without_a_metric_says_what_became_of_it(figures: dict[str, Figure]) -> None:
    (axes,) = panels(figures["profile with gaps"])
    hatched = [bar for bar in axes.patches if bar.get_hatch()]
    assert len(hatched) == 2 and "no metric" in texts(figures["profile with gaps"])
    assert {"failed", "given up"} <= {text.get_text().partition("of 9 ")[2] for text in axes.texts}


def test_the_cells_of_a_signature_are_labeled(figures: dict[str, Figure]) -> None:
    """A block that was not measured has no bar of zero; and chance lies inside the panel, however far it is."""
    *_, features = panels(figures["signature"])
    assert [text.get_text() for text in features.texts] == ["not measured", "0.1", "0.1", "0.1", "0.1"]
    assert features.get_xlim()[1] > 0.3
    assert features.get_legend() is not None


def test_few_blocks_are_lines(figures: dict[str, Figure]) -> None:
    """Two were two colored rectangles."""
    for blocks in (1, 2):
        left, _ = panels(figures[f"history of {blocks}"])
        assert not left.images and left.get_legend() is not None and left.get_ylim()[0] == 0
    assert panels(figures["history of 12"])[0].images
