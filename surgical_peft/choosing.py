"""`blocks="auto"`: score the blocks, leave out what cannot be tuned, and decide how many to take."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

from torch import nn

from . import criteria
from .batches import LossFunction
from .blocks import BlockMap
from .config import SurgicalConfig
from .criteria.criterion import needs_of, of_model
from .criteria.probe import PACE
from .criteria.short_run import ShortRun, gains_and_loss
from .criteria.trial import Trial
from .errors import SurgicalError
from .names import resolve
from .scores import BlockScores
from .scoring import score_blocks
from .selection import check_k, top_k
from .targets import modules_to_tune

CRITERION = "probe"  # the lowest regret on the seen shifts of benchmarks/criteria
MOST = 4  # blocks that are tried together
LEAST = 0.1  # what one more block must take of the loss that is left


def choose_blocks(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: Iterable[Any],
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
) -> tuple[SurgicalConfig, BlockScores]:
    """The config with block names in the place of `blocks="auto"`, and the scores that led to them.

    `config.criterion` (default `probe`) scores the blocks; those that cannot be tuned (tied weights) are left out; the
    `config.num_blocks` highest are taken. Without a number, short joint trainings decide it: of the best block, the
    best two and so on, judged on held-out batches as the probe does.

    Raises:
        SurgicalError: what scoring refuses, no block that can be tuned, or more blocks asked for than there are.
    """
    score = resolve(config.criterion, criteria) if isinstance(config.criterion, str) else config.criterion
    score = score or getattr(criteria, CRITERION)
    wanted = needs_of(score).batches if num_batches is None else num_batches
    batches = list(islice(dataloader, max(wanted, needs_of(together).batches if config.num_blocks is None else 0)))
    scores = score_blocks(model, batches, config.criterion or CRITERION, num_batches=num_batches, loss_fn=loss_fn)
    refused = _refused(model, config, scores.values)
    left = {name: value for name, value in scores.values.items() if name not in refused}
    candidates = replace(scores, values=left, unscored=(*scores.unscored, *refused))
    count, loss = config.num_blocks, None
    if count is None:
        _check_enough(len(batches))
        ranking = sorted(left, key=lambda name: -left[name])[:MOST]
        minus = score_blocks(model, batches, partial(together, ranking=tuple(ranking)), loss_fn=loss_fn).values
        loss = {name: -minus[name] for name in ranking if name in minus}  # by the last block of each trial
        count = how_many(list(loss.values()))
    chosen = top_k(candidates, count)
    record: dict[str, Any] = {**chosen.record, "scores": dict(scores.values)}
    if refused:
        record["refused"] = refused
    if loss:
        record["joint_loss"] = loss
    return replace(config, blocks=list(chosen.blocks), selection=record, criterion=None, num_blocks=None), scores


def check_choice(model: nn.Module, config: SurgicalConfig, dataloader: Iterable[Any]) -> None:
    """Refuse what `choose_blocks` would refuse that takes no scores to see; reads no data.

    Raises:
        SurgicalError: no block that can be tuned, more blocks asked for than there are, or too few batches.
    """
    names = [name for name, weights in BlockMap.find(model).parameters(model).items() if weights]
    left = len(names) - len(_refused(model, config, names))
    if config.num_blocks is None:
        _check_enough(length_hint(dataloader, 2))
    else:
        check_k(config.num_blocks, left)


@of_model(batches=16)
def together(trial: Trial, *, ranking: tuple[str, ...]) -> dict[str, float]:
    """Minus the held-out loss after a short training of the first block of `ranking`, the first two, and so on.

    Each stands under the name of the last block in it. It ends where a block more takes too little.
    """
    gains, start = gains_and_loss(trial)
    left: dict[str, float] = {}
    for at, name in enumerate(ranking):
        names = ranking[: at + 1]
        gain = sum(gains.get(each, 0.0) for each in names)  # gains add up
        left[name] = ShortRun(names, PACE * start / gain, passes=1).train(trial, 1) if gain else start
        if how_many(list(left.values())) <= at:
            break
    return {name: -loss for name, loss in left.items()}


def how_many(left: list[float]) -> int:
    """How many blocks to take, given the loss left by the first, by the first two, and so on."""
    count = 1
    while count < len(left) and left[count] < (1 - LEAST) * left[count - 1]:
        count += 1
    return count


def _check_enough(batches: int) -> None:
    if batches < 2:
        raise SurgicalError(
            f"num_blocks=None lets short trainings decide how many blocks to take, which needs 2 batches or more, "
            f"and there are {batches}: give num_blocks, or more and smaller batches."
        )


def _refused(model: nn.Module, config: SurgicalConfig, names: Collection[str]) -> dict[str, str]:
    """The blocks that cannot be tuned, and why; some can."""
    refused = {name: reason for name in names if (reason := _refusal(model, config, name))}
    if len(refused) == len(names):
        raise SurgicalError(
            f"no block of {BlockMap.find(model).model_name} can be tuned: {next(iter(refused.values()))}"
        )
    return refused


def _refusal(model: nn.Module, config: SurgicalConfig, block: str) -> str | None:
    """Why a block cannot be tuned, if it cannot."""
    try:
        modules_to_tune(model, replace(config, blocks=[block], criterion=None, num_blocks=None))
    except SurgicalError as error:
        return str(error)
    return None
