"""Damaged files of the package itself: what is read is of the types of its class, and writes the same again."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import optuna
from hypothesis import strategies as st

from surgical_peft import BlockScores, Selection, SurgicalError, run_search
from surgical_peft.experiments.advise.advice import Advice
from surgical_peft.experiments.training.card import make_card, write_card
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.search.result import SearchResult
from surgical_peft.typed_json import read_json
from tests.support.played import BLOCKS

from .damage import at, byte_damage, damage, damaged, file_damage, json_damage
from .outcomes import Family
from .values import is_of, odd, sample

optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[3]
REPORT = ROOT / "model_cards" / "auto" / "report.json"
SEARCH = ROOT / "benchmarks" / "sweeps" / "noise" / "search" / "search.json"
STORAGES = {"study.db": "sqlite:///{}", "study.log": "journal:///{}"}


def _scores() -> BlockScores:
    units = ("embeddings", "0", "1", "head")
    values = dict(zip(units, (0.1, 0.4, 0.2, 0.9), strict=True))
    return BlockScores(
        values, dict.fromkeys(units, 8), {name: name for name in units}, ("2",), "rgn", "block", 5, "ViT"
    )


def _read(kind: str, path: Path) -> Any:
    if kind == "report.json":
        write_card(path.parent)
        return TrainingReport.from_json(json.loads(path.read_text()))
    if kind == "search.json":
        return SearchResult.load(path)
    return BlockScores.load(path) if kind == "scores.json" else Advice.from_json(read_json(path, "ask again"))


def _write(kind: str, path: Path) -> None:
    sources: dict[str, Callable[[], str]] = {
        "report.json": REPORT.read_text,
        "search.json": SEARCH.read_text,
        "scores.json": lambda: _scores().to_json(),
        "advice.json": lambda: json.dumps(sample(Advice).to_json()),
    }
    path.write_text(sources[kind]())


def check_file(case: tuple[str, tuple[Any, ...]], folder: Path) -> None:
    """Read a damaged file of results, and use what was read in every way that there is."""
    kind, how = case
    path = folder / kind
    _write(kind, path)
    if kind == "report.json":
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        shutil.copyfile(REPORT.with_name("scores.png"), folder / "scores.png")
    damage(path, how)
    result = _read(kind, path)
    _check_types(result, type(result).__name__)
    again = result.to_json()
    written = json.loads(again) if isinstance(again, str) else again
    given = json.loads(path.read_text())
    assert _agrees(written, given), "it writes something else than it has read"
    if kind == "search.json":
        assert isinstance(str(result), str) and result.candidates and isinstance(result.profile, dict)
        assert result.best.blocks and set(result.best.blocks) <= set(result.blocks), "the choice is none of the blocks"
        assert all(trial.state in ("complete", "failed", "pruned") for trial in result.trials)
    elif kind == "scores.json":
        assert str(result) and result.values and result.values.keys() <= result.sizes.keys() == result.blocks.keys()
        assert result.sizes.keys() <= {*result.values, *result.unscored}, "a score is missing"
    elif kind == "report.json":
        assert str(make_card(result))


def _check_types(record: Any, path: str) -> None:
    """Every value, at any depth, is of the type that its class says; finite, but for the metric of a failed trial."""
    hints = get_type_hints(type(record))
    for entry in fields(record):
        value, name = getattr(record, entry.name), f"{path}.{entry.name}"
        if isinstance(value, float) and not math.isfinite(value):
            assert name == "SearchTrial.metric" and record.state != "complete", f"{name} is {value}"
        assert is_of(hints[entry.name], value), f"{name} is {value!r:.100}"
        for part in (
            value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        ):
            if is_dataclass(part):
                _check_types(part, type(part).__name__)
            assert not isinstance(part, float) or math.isfinite(part) or name == "SearchTrial.metric", (
                f"{name} has {part}"
            )


def _agrees(written: Any, given: Any) -> bool:
    """What was written again was in the file, but for values that follow from others and defaults."""
    if isinstance(written, dict) and isinstance(given, dict):
        shared = (written.keys() & given.keys()) - {"profile", "deviations", "cost"}
        return all(_agrees(written[key], given[key]) for key in shared)
    if isinstance(written, list) and isinstance(given, list):
        return len(written) == len(given) and all(map(_agrees, written, given))
    return bool(written == given) and type(written) in (type(given), float)


def metric_of(blocks: tuple[str, ...]) -> float:
    """The metric of a candidate: another one for each."""
    return round(1 / (2 + sum((place + 1) * 7 for place, name in enumerate(BLOCKS.names) if name in blocks)), 6)


class _Objective:
    blocks = BLOCKS

    def __call__(self, selection: Selection) -> float:
        return metric_of(selection.blocks)


@functools.cache
def _studies() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name, url in STORAGES.items():
        run_search("sweep", _Objective(), storage=url.format(folder / name))
    return folder


_rows = st.tuples(st.just("row"), at, at, at, odd.filter(lambda value: isinstance(value, str | int | float | None)))
_lines = st.one_of(
    st.tuples(st.just("line"), at, json_damage.filter(lambda how: how[0] != "text")),
    st.tuples(st.just("line"), at, st.tuples(st.just("text"), st.sampled_from(["", "5", "null", "{}", "[]", "x"]))),
)
_studies_damage = st.one_of(
    st.tuples(st.just("study.db"), _rows | byte_damage | file_damage),
    st.tuples(st.just("study.db"), _rows),
    st.tuples(st.just("study.log"), _lines | byte_damage | file_damage),
    st.tuples(st.just("study.log"), _lines),
)


def check_study(case: tuple[str, tuple[Any, ...]], folder: Path) -> None:
    """Take up a search from a damaged study: a result by its rules, or an error."""
    name, how = case
    path = Path(shutil.copyfile(_studies() / name, folder / name))
    if how[0] == "row":
        _change_row(path, *how[1:])
    elif how[0] == "line":
        _change_line(path, *how[1:])
    else:
        damage(path, how)
    result = run_search("sweep", _Objective(), storage=STORAGES[name].format(path))
    _check_types(result, "SearchResult")
    assert {trial.blocks for trial in result.trials} == {*((n,) for n in BLOCKS.layers), BLOCKS.names, ("head",)}
    assert all(trial.metric == metric_of(trial.blocks) or how[0] != "file" for trial in result.trials)
    done = [trial for trial in result.trials if trial.state == "complete"]
    assert result.metric == max(trial.metric for trial in done), "the best is not the best"
    assert json.loads(result.to_json())


def _change_row(path: Path, table: float, row: float, column: float, value: Any) -> None:
    connection = sqlite3.connect(path)
    names = [n for (n,) in connection.execute("select name from sqlite_master where type = 'table'")]
    names = [n for n in names if connection.execute(f"select count(*) from {n}").fetchone()[0]]
    name = names[int(table * len(names))]
    columns = [c[1] for c in connection.execute(f"pragma table_info({name})")]
    rows = [r for (r,) in connection.execute(f"select rowid from {name}")]
    chosen = columns[int(column * len(columns))], rows[int(row * len(rows))]
    try:
        connection.execute(f"update {name} set {chosen[0]} = ? where rowid = ?", (value, chosen[1]))
        connection.commit()
    except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:  # the database itself refuses it
        raise SurgicalError(f"cannot be in a study: {error}") from error
    finally:
        connection.close()


def _change_line(path: Path, place: float, how: tuple[Any, ...]) -> None:
    lines = path.read_text().splitlines()
    at_line = int(place * len(lines))
    lines[at_line] = how[1] if how[0] == "text" else json.dumps(damaged(json.loads(lines[at_line]), how))
    path.write_text("\n".join(lines) + "\n")


FILES = st.tuples(
    st.sampled_from(["report.json", "search.json", "scores.json", "advice.json"]),
    json_damage | json_damage | byte_damage | file_damage,
)
FAMILIES = [Family("files of results", FILES, check_file), Family("studies", _studies_damage, check_study)]
