"""The candidates that a procedure proposes: read from a proposal, and counted before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import procedures
from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..procedures.procedure import Procedure, as_procedure


def count_trainings(
    procedure: Procedure | Callable[..., Any] | str,
    blocks: BlockMap,
    *,
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (),
    max_trials: int = 10_000,
) -> int | None:
    """How many trainings `run_search` would do, at most: if each candidate were better than all before it.

    Nothing is trained. Searches such as `greedy_forward` end sooner once nothing gains any more. How many a procedure
    of the user's own would do is not known: it may go by the metrics in any way.

    Raises:
        SurgicalError: as `run_search` for the procedure's proposals.

    Example:
        >>> count_trainings("greedy_forward", BlockMap.find(model), rates=[1e-3, 3e-3])
        42
    """
    times = (len(rates) or 1) * (len(seeds) or 1)
    candidates = planned_candidates(procedure, blocks, times=times, max_trials=max_trials)
    return None if candidates is None else len(candidates) * times


def planned_candidates(
    procedure: Procedure | Callable[..., Any] | str, blocks: BlockMap, *, times: int = 1, max_trials: int = 10_000
) -> list[tuple[str, ...]] | None:
    """The candidates that `run_search` would train, at most, each `times` times; see `count_trainings`.

    Example:
        >>> planned_candidates("sweep", BlockMap.find(model))[0]
        ('0',)
    """
    procedure = as_procedure(procedure)
    if procedure.name not in procedures.__all__:
        return None
    title = title_of(procedure)
    proposals, answer = procedure(blocks), None
    metrics: dict[tuple[str, ...], float] = {}
    while True:
        try:
            proposal = proposals.send(answer)
        except StopIteration:
            return list(metrics)
        single, candidates = candidates_in(proposal, blocks, title)
        for candidate in candidates:
            metrics.setdefault(candidate, float(len(metrics)))
        if len(metrics) * times > max_trials:
            raise endless(title, max_trials)
        answers = [metrics[candidate] for candidate in candidates]
        answer = answers[0] if single else answers


def endless(title: str, max_trials: int) -> SurgicalError:
    """The error of a procedure that proposes too much."""
    return SurgicalError(
        f"procedure {title} asked for more than {max_trials} trainings and was stopped: raise max_trials if it is "
        "meant to, else see that it ends. Finished trials are kept."
    )


def title_of(procedure: Procedure) -> str:
    """A procedure as its study knows it: its text without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(procedure))


def candidates_in(proposal: Any, blocks: BlockMap, title: str) -> tuple[bool, list[tuple[str, ...]]]:
    """True if a procedure proposed one candidate alone; and its candidates, in the order of the map."""
    if isinstance(proposal, str) or not isinstance(proposal, Sequence):
        raise SurgicalError(
            f"procedure {title} proposed {proposal!r}: yield a tuple of block names, or a list of such tuples."
        )
    single = bool(proposal) and all(isinstance(part, str | int) for part in proposal)
    if not proposal:
        raise SurgicalError(f"procedure {title} proposed {proposal!r}, nothing: let it end instead.")
    try:
        return single, [blocks.parse(part) for part in ([proposal] if single else proposal)]
    except SurgicalError as error:
        raise SurgicalError(f"procedure {title} proposed {proposal!r}: {error}") from error
