"""What a search procedure is: it proposes candidates, sets of blocks to tune, and is told their metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..validation import resolve

Candidate = tuple[str, ...]
Round = Sequence[Candidate]
# What is sent in are the metrics of a round, in its order, or the one metric of a single candidate.
Proposals = Generator[Round | Candidate, Any, Candidate | None]
Blocks = int | str | Sequence[int | str]


@dataclass(frozen=True, repr=False)
class Procedure:
    """Proposes what to train, and is told how it went; plain settings, no state.

    Called with a block map it gives a generator. That yields rounds: lists of candidates, each a tuple of block names
    in the map's order. It receives the metrics of the round in the same order, larger = better, NaN = the trial
    failed. It may also yield a single candidate, and then receives a single metric. What it returns is the candidate
    that it chose, or None for the best of all its trials; of equals the one proposed first is the best. The same
    metrics must lead to the same proposals, since a search is resumed by telling them again; so a procedure draws by a
    seed. Its text (`str`) says all its settings: a study knows its procedure by it.

    A candidate says what is searched. What is trained with every one of them, such as a new head, is for the objective
    to add: PEFT's `modules_to_save`, which takes no part in the search.

    Attributes:
        name: as it is found by: `"sweep"`, or `"package.module:name"` of the user's own.
        propose: the generator function, `(blocks, **settings)`.
        settings: what it is called with, plain data; None = not given.

    Example:
        >>> def mine(blocks):
        ...     metric = yield blocks.parse([0])
        ...     if metric < 0.9:
        ...         yield [blocks.parse(["0:2"]), blocks.parse(["0:3"])]
        >>> result = run_search(mine, objective)
    """

    name: str
    propose: Callable[..., Proposals]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, blocks: BlockMap) -> Proposals:
        """The generator for the blocks of one model."""
        return self.propose(blocks, **self.settings)

    def __repr__(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.settings.items() if value is not None)
        return f"{self.name}({told})"


def as_procedure(given: Procedure | Callable[..., Any] | str, settings: Mapping[str, Any] | None = None) -> Procedure:
    """The procedure that the user means.

    Args:
        given: a procedure; the user's own generator function `(blocks, **settings)`, also with `functools.partial`
            around it; or a name: one of ours, or `"package.module:name"` of either of those or of a function that
            makes a procedure.
        settings: what a name or a generator function is called with.

    Raises:
        SurgicalError: an unknown name, settings that do not fit, or something else than a procedure.

    Example:
        >>> as_procedure("windows", {"width": 3})
        windows(width=3, stride=1)
    """
    from .. import procedures

    settings, name = dict(settings or {}), given if isinstance(given, str) else ""
    found: Any = resolve(given, procedures) if isinstance(given, str) else given
    if isinstance(found, partial) and not found.args:
        found, settings = found.func, {**found.keywords, **settings}
    if isinstance(found, Procedure):
        if settings:
            raise SurgicalError(f"{settings} for {found}, which is made already: give them where it is made.")
        return found
    if inspect.isgeneratorfunction(found) and not isinstance(found, partial):
        try:
            inspect.signature(found).bind(None, **settings)
        except TypeError as error:
            raise SurgicalError(f"{found.__qualname__}(blocks, ...) does not take {settings}: {error}.") from error
        return Procedure(name or f"{found.__module__}:{found.__qualname__}", found, settings)
    if not name:
        raise SurgicalError(
            f"{given!r} is not a procedure: give one, such as procedures.sweep() with its brackets, a generator "
            "function such as `def mine(blocks): metric = yield blocks.parse([0])`, or a name."
        )
    try:
        made = found(**settings)
    except TypeError as error:
        raise SurgicalError(f"{settings} do not fit {name}: {error}.") from error
    if not isinstance(made, Procedure):
        raise SurgicalError(f"{name!r} makes a {type(made).__name__}, not a procedure.")
    return made


def layers(blocks: BlockMap, candidates: Blocks | None = None) -> Candidate:
    """The blocks to search among, in the map's order: `candidates`, or else the repeated layers of all stacks."""
    return blocks.layers if candidates is None else blocks.parse(candidates)


def plain(candidates: Blocks | None) -> Blocks | None:
    """As a setting: a list becomes a tuple, so that nobody changes it later."""
    return candidates if candidates is None or isinstance(candidates, int | str) else tuple(candidates)


def best_of(metrics: Sequence[float]) -> int | None:
    """Where the largest metric is: of equals the first, never a NaN; None if there are only NaNs."""
    told = [number for number, metric in enumerate(metrics) if not math.isnan(metric)]
    return max(told, key=metrics.__getitem__, default=None)


def falls_short(metric: float, reached: float, epsilon: float) -> bool:
    """Whether the gain is less than epsilon; 0.82 over 0.81 is a gain of 0.01, which floats alone would deny."""
    gain = metric - reached
    return gain < epsilon and not math.isclose(gain, epsilon)


def check_fits(owner: str, name: str, value: int, candidates: Sequence[str]) -> None:
    """Refuse a number that is larger than that of the blocks to search among."""
    if value > len(candidates):
        raise SurgicalError(
            f"{name}={value} is more than {owner} has to search among: {len(candidates)} blocks "
            f"({', '.join(candidates)})."
        )


def check_epsilon(owner: str, epsilon: float, low: float) -> None:
    """Refuse an epsilon that is no finite number, or one below `low`."""
    number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool) and math.isfinite(epsilon)
    if not number or epsilon < low:
        bound = f" from {low} upwards" if math.isfinite(low) else ""
        raise SurgicalError(
            f"epsilon={epsilon!r} is out of range for {owner}: a number{bound}, in the unit of the metric."
        )
