from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from surgical_peft.scoring import progress
from surgical_peft.scoring.progress import Counted, Stages

LONG = "12 units, each trained alone: pass 4 of 4"  # as long as a stage of choosing gets


def shown(is_terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, force_interactive=is_terminal, width=width), out


def wait_for(out: io.StringIO, words: str) -> str:
    until = time.monotonic() + 10
    while words not in out.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    return out.getvalue()


def test_a_log_gets_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    console, out = shown(is_terminal=False)
    with Stages(console) as stages:
        stages.begin("train, steps", 40)
        stages.advance(10)
        stages.note("loss 0.5")
        text = wait_for(out, " left")
        stages.say("trained")
    assert text.splitlines()[0] == "train, steps"
    assert re.search(r"train, steps: 10 of 40, loss 0\.5, .*about .* left", text) and "\x1b" not in text
    assert out.getvalue().splitlines()[-1] == "trained"


def test_a_stage_of_unknown_length_is_not_silent_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    console, out = shown(is_terminal=False)
    with Stages(console) as stages:
        stages.begin("load")
        assert wait_for(out, "load: ").count("load") >= 2


def test_what_was_done_before_does_not_make_it_look_fast() -> None:
    stage = progress._Stage("train", 100, before=90, done=90)
    assert "left" not in str(stage)
    stage.began -= 5.0
    stage.done += 1
    assert "about 45 s left" in str(stage)


@pytest.mark.parametrize("total", [1000, 31.5])
def test_a_bar_fits_80_columns_and_shows_the_time_left(total: float) -> None:
    console, out = shown(is_terminal=True)
    with Stages(console) as stages:
        stages.begin(LONG, total)
        stages.advance(total / 2)
        text = wait_for(out, " left")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert LONG in plain and "…" not in plain
    assert max(map(len, re.split(r"[\r\n]+", plain))) <= 80


@pytest.mark.parametrize("note", ["", "loss 0.5"])
def test_a_line_leaves_out_what_has_no_room_and_cuts_nothing(note: str) -> None:
    stage = progress._Stage(LONG, 3000, is_bound=True, done=1000, note=note)
    stage.began -= 4000.0
    for width in (120, 80, 60, 40):
        line = stage.line(width)
        assert len(line) <= width and (("1000 of 3000" in line and "left" in line) or width < 60)
        assert "█" in line or width < 120


def test_examples_are_counted_as_they_are_read() -> None:
    with Stages(Console(file=io.StringIO())) as stages:
        stages.begin("measure", 3)
        counted = Counted([1, 2, 3], stages)
        assert [counted[index] for index in range(len(counted))] == [1, 2, 3]
        assert stages._stage is not None and stages._stage.count == "3 of 3"
