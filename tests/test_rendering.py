"""Tables for the terminal: nothing is cut, whatever the width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from surgical_peft.blocks.block_map import blocks_in_words
from surgical_peft.rendering import TextTable, clock

TABLE = TextTable(
    "A title that is long enough to be wrapped where there is little room for it, as on half a screen",
    ["method", "accuracy,\u00a0%", "tuned parameters", "state"],
    [
        ["full fine-tuning of the whole model", "87.5 ± 0.3", "205,962,000", "recommended"],
        ["last third", "62.5 ± 12.1", "66,944", "out after 1/4"],
    ],
    ["* a note that is long enough to be wrapped as well, where there is little room for it."],
    left=(0, 3),
    bold=(0,),
)
WORDS = [word for row in TABLE.rows for cell in row[::3] for word in cell.split()]


@pytest.mark.parametrize("width", [120, 80, 66, 56, 46])
def test_no_word_or_number_is_cut(width: int) -> None:
    lines = [line for line, _ in TABLE.lines(width)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for part in (*WORDS, "87.5 ± 0.3", "62.5 ± 12.1", "205,962,000", "accuracy,\u00a0%", "parameters"):
        assert part in text, part


def test_numbers_stand_below_each_other() -> None:
    *_, one, other, _ = [line for line, _ in TABLE.lines(120)]
    assert one.index("205,962,000") + len("205,962,000") == other.index("66,944") + len("66,944")


def test_it_prints_in_a_terminal_as_wide_as_it_is() -> None:
    out = io.StringIO()
    Console(file=out, width=66).print(TABLE)
    assert out.getvalue().rstrip("\n").splitlines() == [line for line, _ in TABLE.lines(66)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1:00 min"), (90, "1:30 min"), (1599, "27 min"), (3723, "1:02 h")],
)
def test_times(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["0"], "block 0"),
        (["head"], "head"),
        (["embeddings", "0", "2", "3", "4", "head"], "embeddings, blocks 0 and 2 to 4, head"),
        (["0", "1"], "blocks 0 and 1"),
        (["encoder.0", "decoder.1"], "encoder.0, decoder.1"),
        ([], ""),
    ],
)
def test_blocks_in_words(names: list[str], text: str) -> None:
    assert blocks_in_words(names) == text
