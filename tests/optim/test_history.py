"""The record of a policy's factors: what is in the file, what a resumed run makes of it, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from surgical_peft.optim.history import History, plot_history, read_history


def test_a_line_for_each_change(tmp_path: Path) -> None:
    history = History(tmp_path / "run" / "surgical_history.jsonl", 0)
    for step, factor in enumerate([0.5, 0.5, 1 / 3, 1 / 3, 0.0], 1):
        history.note(step, {"0": factor, "head": 1.0})
    assert read_history(history.path) == history.rows
    assert [(row["step"], row["lr_multiplier"]["0"]) for row in history.rows] == [(1, 0.5), (3, 0.333333), (5, 0.0)]


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "surgical_history.jsonl"
    lines = [json.dumps({"step": step, "lr_multiplier": {"0": step / 10}}) for step in (1, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 7, "lr_mul')
    history = History(path, 5)
    assert [row["step"] for row in history.rows] == [1, 4]
    history.note(6, {"0": 0.4})
    history.note(7, {"0": 0.7})
    assert [row["step"] for row in read_history(path)] == [1, 4, 7]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "surgical_history.jsonl"
    path.write_text('{"step": 1, "lr_multiplier": {"0": 1.0}}\n')
    assert History(path, 0).rows == read_history(path) == []
    assert History(tmp_path / "none.jsonl", 3).rows == []


def test_the_picture_has_a_row_for_each_block_and_counts_steps(tmp_path: Path) -> None:
    sizes = []
    for blocks in (3, 30):
        rows = [{"step": step, "lr_multiplier": {str(n): float(n != step) for n in range(blocks)}} for step in (1, 5)]
        plot_history(rows, 9, tmp_path / f"{blocks}.png", "lisa")
        with Image.open(tmp_path / f"{blocks}.png") as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] == 1500
    assert sizes[1][1] > 2 * sizes[0][1]
