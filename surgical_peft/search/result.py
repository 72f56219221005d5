"""`SearchResult`: the trials of a search and its choice; plain data that prints, plots and goes through JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..atomic_files import all_finite, write_text
from ..blocks.block_map import blocks_in_words
from ..errors import SurgicalError
from ..rendering import TextTable, clock
from ..scoring.selection import Selection
from ..typed_json import JsonReader, parse_json, read_json

_JSON = JsonReader("the JSON of a search result", "search again, or copy it again")
SOURCE_LOSS_RISE = "source_loss_rise"  # a key of a trial's notes
_STATES = ("complete", "failed", "pruned")


@dataclass(frozen=True)
class SearchTrial:
    """One training.

    Attributes:
        blocks: the candidate that was tuned.
        metric: larger is better; NaN if it has none.
        seconds: how long the objective took.
        state: `"complete"`, `"failed"` or `"pruned"`.
        rate, seed: what the objective was given besides, None where the search has no such list.
        error: why it failed or was pruned.
        notes: what the objective wrote into its selection's `record`, e.g. the number of tuned parameters.
    """

    blocks: tuple[str, ...]
    metric: float
    seconds: float = field(compare=False)
    state: str = "complete"
    rate: float | None = None
    seed: int | None = None
    error: str | None = None
    notes: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Candidate:
    """The trainings of one candidate, summarized.

    Attributes:
        blocks: the candidate.
        metric: at its best rate, the mean over the seeds; NaN if at every rate a training failed or was pruned.
        deviation: the standard deviation over the seeds; None with fewer than two.
        rate: the best rate, None where the search has no rates.
    """

    blocks: tuple[str, ...]
    metric: float
    deviation: float | None
    rate: float | None


def candidate_of(trials: Iterable[SearchTrial]) -> Candidate:
    """The trainings of one candidate in one number: mean over the seeds, then the best rate; of equals the first.

    A rate at which a training failed or was pruned is out: a mean over fewer seeds does not compare with the others.
    """
    by_rate: dict[float | None, list[SearchTrial]] = {}
    for trial in trials:
        by_rate.setdefault(trial.rate, []).append(trial)
    best: Candidate | None = None
    for rate, group in by_rate.items():
        metrics = [trial.metric for trial in group]
        if any(math.isnan(metric) for metric in metrics):
            continue
        deviation = statistics.stdev(metrics) if len(metrics) > 1 else None
        candidate = Candidate(group[0].blocks, statistics.fmean(metrics), deviation, rate)
        if best is None or candidate.metric > best.metric:
            best = candidate
    rate, group = next(iter(by_rate.items()))
    return best or Candidate(group[0].blocks, math.nan, None, rate)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best: the chosen blocks, for `SurgicalConfig.from_selection`; `best.record` says how they were chosen.
        metric: theirs.
        trials: every training, in the order in which the procedure proposed them.
        blocks: the names of all blocks of the map, in its order.
        procedure: what proposed them, in words.

    Example:
        >>> result.best.blocks, result.metric
        (('0', '1'), 0.747)
        >>> result.plot("profile.png")
    """

    best: Selection
    metric: float
    trials: tuple[SearchTrial, ...]
    blocks: tuple[str, ...]
    procedure: str

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """One entry for each candidate, in the order of the proposals."""
        grouped: dict[tuple[str, ...], list[SearchTrial]] = {}
        for trial in self.trials:
            grouped.setdefault(trial.blocks, []).append(trial)
        return tuple(map(candidate_of, grouped.values()))

    @property
    def profile(self) -> dict[str, float]:
        """The metric of each block that was tuned alone, in the model's order: the fine-tuning profile."""
        return {name: candidate.metric for name, candidate in self._alone.items()}

    @property
    def deviations(self) -> dict[str, float]:
        """The standard deviation over the seeds, for each block of the profile that had several."""
        alone = self._alone.items()
        return {name: candidate.deviation for name, candidate in alone if candidate.deviation is not None}

    @property
    def _alone(self) -> dict[str, Candidate]:
        by_blocks = {candidate.blocks: candidate for candidate in self.candidates}
        return {name: by_blocks[name,] for name in self.blocks if (name,) in by_blocks}

    @property
    def trainings(self) -> int:
        """The number of trainings: the cost."""
        return len(self.trials)

    @property
    def seconds(self) -> float:
        """The time of all trainings together, whichever worker ran them: the cost in time."""
        return sum(trial.seconds for trial in self.trials)

    def table(self) -> TextTable:
        """A table of the candidates in the order of the proposals; the chosen one is marked."""
        has_rates = any(trial.rate is not None for trial in self.trials)
        has_faults = any(trial.state != "complete" for trial in self.trials)
        has_source = any(SOURCE_LOSS_RISE in trial.notes for trial in self.trials)
        seeds = len({trial.seed for trial in self.trials})
        rows, chosen = [], []
        for number, candidate in enumerate(self.candidates):
            trials = [trial for trial in self.trials if trial.blocks == candidate.blocks]
            spread = "" if candidate.deviation is None else f" ± {candidate.deviation:.2g}"
            is_chosen = candidate.blocks == self.best.blocks
            chosen += [number] * is_chosen
            row = [self._label(candidate.blocks) + " *" * is_chosen]
            row.append("-" if math.isnan(candidate.metric) else f"{candidate.metric:.4g}{spread}")
            row += ["-" if candidate.rate is None else f"{candidate.rate:g}"] * has_rates
            row += [source_loss_of(candidate, trials)] * has_source
            row.append(clock(sum(trial.seconds for trial in trials)))
            row += [state_of(trials)] * has_faults
            rows.append(row)
        header = ["blocks", "metric", *["rate"] * has_rates, *["source loss"] * has_source]
        header += ["time", *["state"] * has_faults]
        notes = ["* chosen. Metric: of the objective, higher is better; time: of all trainings of a row."]
        if seeds > 1:
            notes[0] += f" ± the standard deviation of {seeds} seeds."
        if has_rates:
            notes.append("Rate: the best of those that were tried.")
        if has_source:
            notes.append("Source loss: its rise on the source model's own data.")
        title = f"{self.procedure}: {self.trainings} trainings in {clock(self.seconds)}"
        left = (0, len(header) - 1) if has_faults else (0,)
        return TextTable(title, header, rows, notes, left=left, bold=chosen)

    def _label(self, blocks: tuple[str, ...]) -> str:
        return "all blocks" if blocks == self.blocks else blocks_in_words(blocks)

    def __str__(self) -> str:
        return str(self.table())

    def to_json(self) -> str:
        """The result as JSON, with the profile and the cost besides; `from_json` gives it back.

        A failed training's metric is null: JSON knows no NaN.
        """
        data = all_finite({**asdict(self), "profile": self.profile})
        data["deviations"] = self.deviations
        data["cost"] = {"trainings": self.trainings, "seconds": self.seconds}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        """A result from its JSON.

        Raises:
            SurgicalError: not JSON, or not that of a search.
        """
        return cls._from_values(parse_json(text, _JSON.file, _JSON.remedy))

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> SearchResult:
        read = [
            trial_of(trial) for trial in _JSON.read(list[dict[str, Any]], _JSON.member(values, "trials"), "trials")
        ]
        result = replace(_JSON.read(cls, {**values, "trials": []}), trials=tuple(read))
        chosen, known = set(result.best.blocks), {*result.blocks, *(name for trial in read for name in trial.blocks)}
        if not chosen or not read or not known <= set(result.blocks) or not chosen <= known:
            raise SurgicalError(f"{_JSON.file} chooses or tries other blocks than it has: {_JSON.remedy}.")
        return result

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path`, whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote."""
        return cls._from_values(read_json(path, _JSON.remedy))

    def plot(self, path: str | Path, metric: str = "validation metric") -> None:
        """Draw the profile: a bar for each block that was tuned alone, the head and all blocks together as lines.

        Args:
            path: of the picture (png, pdf or svg).
            metric: its name, for the axis.

        Raises:
            SurgicalError: no block was tuned alone, so there is no profile.
        """
        from .profile_plot import plot_profile

        plot_profile({f"{self.trainings} trainings by {self.procedure.partition('(')[0]}": self}, path, metric)


def source_loss_of(candidate: Candidate, trials: Sequence[SearchTrial]) -> str:
    """The mean rise of the loss on source data at the candidate's rate, or "-" where one of its trials has none."""
    rises = [trial.notes.get(SOURCE_LOSS_RISE) for trial in trials if trial.rate == candidate.rate]
    told = [rise for rise in rises if rise is not None]
    return f"{statistics.fmean(told):+.3f}" if told and len(told) == len(rises) else "-"


def state_of(trials: Sequence[SearchTrial]) -> str:
    """`complete`, or how many of a candidate's trainings were not."""
    states = [trial.state for trial in trials]
    if len(states) == 1 or set(states) == {"complete"}:
        return states[0]
    counts = [(states.count(state), state) for state in ("failed", "pruned") if state in states]
    return ", ".join(f"{count} of {len(states)} {state}" for count, state in counts)


def trial_of(values: dict[str, Any], reader: JsonReader = _JSON) -> SearchTrial:
    """The trial that plain data describe.

    Raises:
        SurgicalError: something is missing or of a wrong type.
    """
    lacks_metric = values.get("metric") is None and values.get("state") != "complete"
    trial = reader.read(SearchTrial, {**values, "metric": 0.0} if lacks_metric else values, "trials")
    if trial.state not in _STATES:
        raise SurgicalError(
            f"{_JSON.file} has a trial that is {trial.state!r}, not {', '.join(_STATES)}: search again."
        )
    return replace(trial, metric=math.nan) if lacks_metric else trial
