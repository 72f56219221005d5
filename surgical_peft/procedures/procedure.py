"""Search procedures: they propose candidates, sets of blocks to tune, and receive their metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..validation import call_with_options, immutable, resolve

Candidate = tuple[str, ...]
Round = Sequence[Candidate]
# What is sent in are the metrics of a round, in its order, or the one metric of a single candidate.
Proposals = Generator[Round | Candidate, Any, Candidate | None]
Blocks = int | str | Sequence[int | str]  # as `BlockMap.parse` takes them
Settings = ParamSpec("Settings")


@dataclass(frozen=True, repr=False)
class Procedure:
    """Proposes what to train and receives the metrics; plain settings, no state.

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
        propose: the generator function, `(blocks, **settings)`, or what `procedure` made of it.
        settings: what it is called with, plain data; None = not given.

    Example:
        >>> def mine(blocks):
        ...     metric = yield blocks.parse([0])
        ...     if metric < 0.9:
        ...         yield [blocks.parse(["0:2"]), blocks.parse(["0:3"])]
        >>> result = run_search(mine, objective)
    """

    name: str
    propose: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, blocks: BlockMap) -> Proposals:
        """The generator for the blocks of one model."""
        propose: Callable[..., Proposals] = getattr(self.propose, "proposals", self.propose)
        return propose(blocks, **self.settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.settings.items() if value is not None)
        return f"{self.name}({settings})"


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
    source: Any = resolve(given, procedures) if isinstance(given, str) else given
    if isinstance(source, partial) and not source.args:
        source, settings = source.func, {**source.keywords, **settings}
    if isinstance(source, Procedure):
        if settings:
            raise SurgicalError(f"{settings} for {source}, which is made already: give them where it is made.")
        return source
    if inspect.isgeneratorfunction(source) and not isinstance(source, partial):
        try:
            inspect.signature(source).bind(None, **settings)
        except TypeError as error:
            raise SurgicalError(f"{source.__qualname__}(blocks, ...) does not take {settings}: {error}.") from error
        return Procedure(name or f"{source.__module__}:{source.__qualname__}", source, settings)
    if not name:
        raise SurgicalError(
            f"{given!r} is not a procedure: give one, such as procedures.sweep() with its brackets, a generator "
            "function such as `def mine(blocks): metric = yield blocks.parse([0])`, or a name."
        )
    made: Procedure = call_with_options("procedure", name, source, settings, gives=Procedure)
    return made


def procedure(
    check: Callable[..., Mapping[str, Any] | None] | None = None,
) -> Callable[[Callable[Concatenate[BlockMap, Settings], Proposals]], Callable[Settings, Procedure]]:
    """Decorator that makes a generator function `(blocks, **settings)` take its settings first.

    Args:
        check: called with all settings by name when the procedure is made; it raises if they will not do, and may
            return those that are to be replaced.

    Example:
        >>> @procedure()
        ... def first(blocks, count=1):
        ...     yield blocks.names[:count]
        >>> result = run_search(first(count=2), objective)
    """

    def decorate(propose: Callable[Concatenate[BlockMap, Settings], Proposals]) -> Callable[Settings, Procedure]:
        signature = inspect.signature(propose)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=Procedure)

        @wraps(propose)
        def make(*args: Settings.args, **kwargs: Settings.kwargs) -> Procedure:
            signature.bind_partial(*args, **kwargs)  # an unknown setting is named before a missing one
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            settings = {key: immutable(value) for key, value in given.arguments.items()}
            if check is not None:
                settings |= check(**settings) or {}
            return Procedure(name, make, settings)

        is_ours = propose.__module__.startswith(f"{__package__}.")
        name = propose.__name__ if is_ours else f"{propose.__module__}:{propose.__qualname__}"
        make.__signature__ = signature  # type: ignore[attr-defined]
        make.proposals = propose  # type: ignore[attr-defined]  # by itself it would not be pickled: `make` has its name
        return make

    return decorate


def layers(blocks: BlockMap, candidates: Blocks | None = None) -> Candidate:
    """The blocks to search among, in the map's order: `candidates`, or else the repeated layers of all stacks."""
    return blocks.layers if candidates is None else blocks.parse(candidates)


def best_of(metrics: Sequence[float]) -> int | None:
    """The index of the largest metric: of equals the first, never a NaN; None if all are NaN."""
    numbers = [number for number, metric in enumerate(metrics) if not math.isnan(metric)]
    return max(numbers, key=metrics.__getitem__, default=None)


def falls_short(metric: float, reached: float, epsilon: float) -> bool:
    """True if the gain is less than epsilon; 0.82 over 0.81 counts as 0.01 in spite of rounding."""
    gain = metric - reached
    return gain < epsilon and not math.isclose(gain, epsilon)


def check_fits(owner: str, name: str, value: int, candidates: Sequence[str]) -> None:
    """Refuse a number that is larger than that of the blocks to search among."""
    if value > len(candidates):
        raise SurgicalError(
            f"{name}={value} is more than {owner} has to search among: {len(candidates)} blocks "
            f"({', '.join(candidates)})."
        )
