"""Every table that a command prints, of the results that are committed: 80 columns, and no word or number cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.compare.tables import table as comparison_table
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.experiments.training.summary import table as training_table
from surgical_peft.rendering import TextTable
from surgical_peft.scoring.block_scores import BlockScores
from surgical_peft.search.result import SearchResult

ROOT = Path(__file__).parents[1]


def scores_table(values: dict[str, Any]) -> TextTable:
    """Of the scores in a report."""
    return BlockScores.from_json(json.dumps(values)).table()


KINDS: dict[str, tuple[str, Callable[[Any], TextTable]]] = {
    "compare": ("benchmarks/compare/*/report.json", lambda v: comparison_table(ComparisonReport.from_json(v))),
    "search": ("benchmarks/sweeps/*/search/search.json", lambda v: SearchResult.from_json(json.dumps(v)).table()),
    "train": ("model_cards/*/report.json", lambda v: training_table(TrainingReport.from_json(v))),
    "score": ("benchmarks/quickstart/report.json", lambda v: scores_table(next(iter(v["scores"].values())))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_fit_and_cut_nothing(kind: str) -> None:
    pattern, table_of = KINDS[kind]
    paths = sorted(ROOT.glob(pattern))
    assert paths
    for path in paths:
        table = table_of(json.loads(path.read_text()))
        lines = [line for line, _ in table.lines(80)]
        assert max(map(len, lines)) <= 80, path
        words = {word for cells in (table.header, *table.rows) for cell in cells for word in cell.split(" ")}
        assert not [word for word in words if not any(word in line for line in lines)], path
        assert table.notes, path
