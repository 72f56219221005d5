"""`BlockScores`: through JSON and back, as text, normalized, and as a picture."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import rich.console

from surgical_peft import BlockScores, SurgicalError, score_blocks
from surgical_peft.scoring.plot import plot_scores
from tests.support.toys import TOYS, Toy

VALUES = {"embeddings": 0.2, "0": 0.05, "1": 0.1, "head": 3.0}


def scores_of(values: dict[str, float], **changes: object) -> BlockScores:
    scores = BlockScores(
        values=values,
        sizes={name: 10 * (index + 1) for index, name in enumerate(values)},
        blocks={name: name for name in values},
        unscored=("final_norm",),
        criterion="rgn",
        granularity="block",
        num_batches=5,
        model_name="ToyModel",
    )
    return dataclasses.replace(scores, **changes)  # type: ignore[arg-type]


def test_json_gives_back_equal_scores(toy: Toy) -> None:
    for granularity in ("block", "tensor"):
        scores = score_blocks(toy.model(), [toy.batch()], granularity=granularity)
        again = BlockScores.from_json(scores.to_json())
        assert again == scores and list(again.values) == list(scores.values)


def test_save_and_load(tmp_path: Path) -> None:
    scores = scores_of(VALUES)
    path = tmp_path / "made" / "scores.json"
    scores.save(path)
    assert BlockScores.load(path) == scores
    assert json.loads(path.read_text())["values"] == VALUES
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"values": {}, "unscored": []}', "null"])
def test_what_is_not_scores_is_refused(text: str) -> None:
    with pytest.raises(SurgicalError, match="JSON"):
        BlockScores.from_json(text)


def test_an_unknown_field_is_refused() -> None:
    data = {**json.loads(scores_of(VALUES).to_json()), "color": "red"}
    with pytest.raises(SurgicalError, match="color"):
        BlockScores.from_json(json.dumps(data))


def test_text_says_unit_and_direction_and_what_was_not_measured() -> None:
    scores = scores_of({"embeddings": -0.2, "0": -0.1, "1": -0.3}, basis={"embeddings": "guessed", "1": "given up"})
    lines = str(scores).splitlines()
    assert [line.split()[-2] if "█" in line else line.split()[-1] for line in lines[3:6]] == ["-0.2?", "-0.1", "-0.3~"]
    notes = " ".join(lines[6:])
    assert all(word in notes for word in ("higher", "no unit", "? never trained", "~ given up", "below zero"))
    assert "given up" not in str(scores_of(VALUES)) and "below zero" not in str(scores_of(VALUES))
    assert BlockScores.from_json(scores.to_json()) == scores


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(SurgicalError, match=rf"1 \({value}\)"):
        scores_of({**VALUES, "1": value})


def test_text_has_every_name_size_and_score() -> None:
    scores = scores_of(VALUES, sizes=dict.fromkeys(VALUES, 1_234_567), num_batches=3)
    text = str(scores)
    assert all(name in text for name in VALUES) and text.count("1,234,567") == 4
    assert all(f"{value:.4g}" in text for value in VALUES.values())
    assert "rgn of ToyModel, mean of 3 batches" in text.replace("\n", " ")


def test_text_cuts_no_long_name() -> None:
    """The table was drawn 100 characters wide and put an ellipsis into longer names."""
    name = "model.vision_tower.vision_model.encoder.layers.10.self_attention.query_projection.base.weight"
    scores = scores_of({name: 0.123}, blocks={name: "vision.10"}, granularity="tensor")
    assert name in str(scores) and "…" not in str(scores)


def test_text_is_plain_also_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich shows the table beside the string, which came out empty."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(scores_of(VALUES))
    assert "embeddings" in text and "\x1b" not in text


def test_text_of_negative_and_zero_scores() -> None:
    assert "-0.5" in str(scores_of({"0": -0.5, "1": 0.0}))


def test_the_bars_are_in_proportion() -> None:
    lines = {line.split("  ")[0]: line.count("█") for line in str(scores_of(VALUES)).splitlines()}
    assert (lines["head"], lines["embeddings"], lines["block 0"]) == (20, 1, 0)


def test_the_bars_begin_at_zero() -> None:
    """Those below zero go to the left, and none is so long that nothing else is seen."""
    lines = str(scores_of({"0": -14.0, "1": -0.25, "2": 0.5, "3": 1.0})).splitlines()
    bars = [(line.index("█"), line.rindex("█") + 1) for line in lines if "█" in line]
    (first, zero), (half, end), *above = bars
    assert end == zero and all(start == zero for start, _ in above)
    assert (zero - first, zero - half, *(end - zero for _, end in above)) == (10, 2, 5, 10)


def test_max_divides_by_the_largest_outside_the_head() -> None:
    assert scores_of(VALUES).normalized() == pytest.approx({"embeddings": 1, "0": 0.25, "1": 0.5, "head": 1})


def test_minmax_maps_smallest_to_zero_outside_the_head() -> None:
    normalized = scores_of(VALUES).normalized("minmax")
    assert normalized == pytest.approx({"embeddings": 1, "0": 0, "1": 1 / 3, "head": 1})


def test_the_units_of_a_head_are_known_by_their_block() -> None:
    blocks = {"a": "0", "b": "1", "c.weight": "head", "d.weight": "vision_model.head"}
    scores = scores_of({"a": 1.0, "b": 2.0, "c.weight": 9.0, "d.weight": 0.1}, blocks=blocks)
    assert scores.normalized() == {"a": 0.5, "b": 1.0, "c.weight": 1.0, "d.weight": 1.0}


def test_normalized_keeps_the_order() -> None:
    assert list(scores_of({"head": 1.0, "0": 2.0}).normalized()) == ["head", "0"]


def test_equal_scores_all_become_one() -> None:
    scores = scores_of({"0": 2.0, "1": 2.0})
    assert scores.normalized("minmax") == scores.normalized("max") == {"0": 1.0, "1": 1.0}


def test_minmax_of_negative_scores() -> None:
    """The largest was zero, which was taken for 'all are zero'."""
    assert scores_of({"0": -1.0, "1": -0.5, "2": 0.0}).normalized("minmax") == {"0": 0.0, "1": 0.5, "2": 1.0}


@pytest.mark.parametrize(
    ("values", "how", "why"),
    [
        (VALUES, "mean", "normalize='mean' .* max, minmax"),
        ({"head": 1.0}, "mean", "normalize='mean' is unknown"),
        ({"0": 0.0, "1": 0.0, "head": 1.0}, "max", "zero"),
        ({"0": 0.0, "1": 0.0}, "minmax", "zero"),
        ({"0": -2.0, "1": -1.0}, "max", "-2.*'minmax'"),
    ],
)
def test_normalized_refuses(values: dict[str, float], how: str, why: str) -> None:
    """Divided by a largest score below zero, the worst block would have come out on top."""
    with pytest.raises(SurgicalError, match=why):
        scores_of(values).normalized(how)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("count", [8, 30])
def test_plot_writes_a_picture(count: int, tmp_path: Path) -> None:
    names = ["embeddings", *map(str, range(count - 2)), "head"]
    scores_of({name: 1 / (index + 1) for index, name in enumerate(names)}).plot(tmp_path / "scores.png")
    width, height = png_size(tmp_path / "scores.png")
    assert 400 <= width <= 2000 and 0.25 * 150 * count <= height <= 150 * (2 + 0.3 * count)
    assert (tmp_path / "scores.png").stat().st_size > 5_000
    assert [file.name for file in tmp_path.iterdir()] == ["scores.png"]


def test_plot_makes_room_for_long_names(tmp_path: Path) -> None:
    scores_of({"0": 1.0}).plot(tmp_path / "short.png")
    scores_of({"model.layers.0.self_attn.q_proj.weight" * 2: 1.0}).plot(tmp_path / "long.png")
    assert png_size(tmp_path / "long.png")[0] > 1.5 * png_size(tmp_path / "short.png")[0]


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_plot_writes_other_formats(suffix: str, tmp_path: Path) -> None:
    scores_of(VALUES).plot(tmp_path / f"scores{suffix}")
    assert (tmp_path / f"scores{suffix}").read_bytes()[:5] == {".pdf": b"%PDF-", ".svg": b"<?xml"}[suffix]


def test_a_picture_of_two_panels_and_of_zero_and_negative_scores(tmp_path: Path) -> None:
    two = {"zero": scores_of({"0": 0.0, "1": 0.0}), "negative": scores_of({"0": -1.0, "1": 0.5})}
    plot_scores(two, tmp_path / "two.png")
    scores_of(VALUES).plot(tmp_path / "one.png")
    assert png_size(tmp_path / "two.png")[0] > 1.7 * png_size(tmp_path / "one.png")[0]


def test_plotting_touches_no_figure_of_the_user(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), plt.get_backend()
    scores_of(VALUES).plot(tmp_path / "scores.png")
    assert (plt.get_fignums(), plt.get_backend()) == (before, backend)


def test_scores_of_a_toy_plot(tmp_path: Path) -> None:
    toy = TOYS["t5"]
    score_blocks(toy.model(), [toy.batch()], granularity="module").plot(tmp_path / "modules.png")
    assert png_size(tmp_path / "modules.png")[1] > 300
