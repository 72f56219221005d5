"""`blocks="auto"`: score the blocks, decide which to take, and wrap the model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from . import criteria
from .blocks.block_map import BlockMap, blocks_in_words
from .criteria.budget import FORWARD, GRADIENTS, Budget, half_of
from .criteria.criterion import Criterion, needs_of, of_model
from .criteria.probe import PACE
from .criteria.short_training.context import ScoringContext
from .criteria.short_training.short_run import ShortRun, gains_and_loss
from .errors import SurgicalError
from .optim.of_trainer import training_of
from .scoring.batches import LossFunction
from .scoring.block_scores import BlockScores
from .scoring.convolutional import warn_of_convolutions
from .scoring.gradients import name_of
from .scoring.progress import Stages, counted
from .scoring.score import score_blocks
from .scoring.selection import best
from .tuner.config import SurgicalConfig
from .tuner.loading.compatibility import check_expressions
from .tuner.target_modules import block_map_for, modules_to_tune
from .validation import check_count, resolve

CRITERION = "probe"  # the lowest regret on the seen shifts of benchmarks/criteria
MOST = 4  # blocks that are tried together
FOR_JOINT = 0.25  # of a budget: reserved for joint trainings
AT_MOST = GRADIENTS + 2 * (1 + FORWARD)  # training steps for each batch: its gradients, and two joint trainings of all
LEAST = 0.1  # of the loss that is left: what one more block must take away


def get_surgical_model(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: Iterable[Any] | Trainer | None = None,
    *,
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    steps: float | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Choose the blocks if the config says `"auto"`, then wrap the model with `peft.get_peft_model`.

    Args:
        model: the model to tune; scoring leaves it untouched.
        config: with `blocks="auto"`, `criterion` (default `probe`) scores the blocks and the `num_blocks` highest that
            can be tuned are taken; without a number, short joint trainings decide how many. The caller's config is not
            changed; the model's holds the names and the record.
        dataloader: labeled batches of the new data, needed for `"auto"`; those of the training split, not of the
            test split. Or a Trainer of that model, such as TRL's `SFTTrainer`: its own training batches, and unless
            they are given its `compute_loss` and its number of steps. The tuned model goes into a new Trainer.
        num_batches: how many batches to score on; default is what the criterion asks for.
        loss_fn: `(model, batch) -> loss`; default is the model's own loss.
        steps: number of steps of the training, more than 0, each on a batch as large as those of `dataloader`; with
            gradient accumulation so many times more. Choosing then costs at most half of that training: on fewer
            batches, with fewer short trainings, or by gradients alone where that is all there is room for. Default:
            not known, and no limit.
        **kwargs: passed on to `get_peft_model` (`adapter_name`, ...).

    Raises:
        SurgicalError: `"auto"` without a dataloader or with a data set, `steps` that are no number above 0 or too few
            to choose anything by (says how many it takes), or anything that scoring or wrapping refuses.

    Example:
        >>> model = get_surgical_model(model, SurgicalConfig(blocks="auto"), dataloader)
        >>> model.peft_config["default"].blocks
        ['head']
    """
    budget = None if steps is None else half_of(steps)
    config = copy.deepcopy(config)
    if config.blocks == "auto":
        if isinstance(dataloader, Trainer):
            dataloader, own_loss, planned = training_of(dataloader)
            loss_fn = loss_fn or own_loss
            budget = half_of(planned) if planned is not None and budget is None else budget
        if dataloader is None or _is_data_set(dataloader):
            given = "" if dataloader is None else f", and a {type(dataloader).__name__} has examples, not batches"
            raise SurgicalError(
                f"blocks='auto' needs data to choose by, in labeled batches{given}: get_surgical_model(model, config, "
                "DataLoader(train, batch_size=8, shuffle=True, collate_fn=...)), or a Trainer in the place of the "
                "DataLoader, also one of TRL: get_surgical_model(trainer.model, config, trainer)."
            )
        config, _ = choose_blocks(model, config, dataloader, num_batches, loss_fn, budget)
    return get_peft_model(model, config, **kwargs)


def _is_data_set(data: Iterable[Any]) -> bool:
    """True for a data set with random access, of torch or of datasets; a list may be one of batches."""
    return isinstance(data, Dataset) or (hasattr(data, "features") and hasattr(data, "__getitem__"))


def choose_blocks(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: Iterable[Any],
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    budget: float | Budget | None = None,
    stages: Stages | None = None,
) -> tuple[SurgicalConfig, BlockScores]:
    """The config with block names in the place of `blocks="auto"`, and the scores that led to them.

    `config.criterion` (default `probe`) scores the blocks; those that cannot be tuned (tied weights) are left out; the
    `config.num_blocks` highest are taken. Without a number, short joint trainings decide it: of the best block, the
    best two and so on, judged on held-out batches as the probe does.

    Args:
        model, config, dataloader, num_batches, loss_fn: as for `get_surgical_model`.
        budget: how many training steps all this may cost, as for `score_blocks`. A quarter is for the joint trainings;
            where they have no room, one block is taken. The budget and the cost are in the record.
        stages: where to show the progress.

    Raises:
        SurgicalError: what scoring refuses, no block that can be tuned, or more blocks asked for than there are.
    """
    score = resolve(config.criterion, criteria) if isinstance(config.criterion, str) else config.criterion
    score = score or getattr(criteria, CRITERION)
    needs, joint = needs_of(score), needs_of(together)
    is_open = config.num_blocks is None
    wanted = needs.batches if num_batches is None else num_batches
    if num_batches is not None:
        check_count("blocks='auto'", "num_batches", num_batches, "batches to choose by")
    batches = list(islice(dataloader, max(wanted, joint.batches if is_open else 0)))
    if is_open:
        _check_enough(len(batches))
    blocks = block_map_for(model, config)
    unfit = _refused(model, config, blocks)
    loss: dict[str, float] = {}
    with counted(budget, "choosing blocks", stages) as spending:
        run = partial(score_blocks, model, batches, loss_fn=loss_fn, budget=spending, blocks=blocks)
        if is_open and (needs.what, wanted) == (joint.what, joint.batches):  # then gradients are computed once
            both = partial(_scores_and_loss, score=score, refused=tuple(unfit), loss=loss)
            scores = replace(run(both), criterion=_named(config.criterion or CRITERION))
        else:
            with spending.holding(_for_joint(spending) if is_open else 0.0):
                scores = run(config.criterion or CRITERION, num_batches=num_batches)
            if is_open and spending.left >= 2 * AT_MOST:
                ranking = _ranking(scores.values, unfit)
                loss |= {name: -minus for name, minus in run(partial(together, ranking=ranking)).values.items()}
    warn_of_convolutions(model, blocks)
    refused = {name: why for name, why in unfit.items() if name in scores.values}
    left = {name: value for name, value in scores.values.items() if name not in refused}
    candidates = replace(scores, values=left, unscored=(*scores.unscored, *refused))
    # by the last block of each joint training
    loss = {name: loss[name] for name in _ranking(left, ()) if name in loss}
    chosen = best(candidates, config.num_blocks or how_many(list(loss.values())))
    if below := [name for name in chosen.blocks if candidates.values[name] < 0]:
        warnings.warn(
            f'blocks="auto" takes {blocks_in_words(below)} with a {candidates.criterion} score below zero, for want '
            "of better ones: tuning may be worth nothing there. Score on more batches (num_batches), plan for a "
            "longer training, or name the blocks.",
            stacklevel=2,
        )
    record: dict[str, Any] = {**chosen.record, "scores": dict(scores.values)}
    if scores.basis:
        record["basis"] = dict(scores.basis)
    if refused:
        record["refused"] = refused
    if loss:
        record["joint_loss"] = loss
    if spending.is_given:
        record["cost"] = {"budget": spending.steps, "steps": spending.spent, "stages": spending.stages}
    return replace(config, blocks=list(chosen.blocks), selection=record, criterion=None, num_blocks=None), scores


@of_model(batches=16)
def _scores_and_loss(
    context: ScoringContext, *, score: Criterion, refused: tuple[str, ...], loss: dict[str, float]
) -> dict[str, float]:
    """The scores, and into `loss` what is left after joint trainings of the best."""
    with context.budget.holding(_for_joint(context.budget)):
        values: Any = score(context)
    if not isinstance(values, dict):  # `score_blocks` will say so
        return values
    minus = together(context, ranking=_ranking(context.agreed(values), refused))
    loss |= {name: -value for name, value in minus.items()}
    return values


def _named(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else name_of(criterion)


def _ranking(values: Mapping[str, float], refused: Collection[str]) -> tuple[str, ...]:
    """The blocks to train together, best first."""
    left = [name for name in values if name not in refused]
    return tuple(sorted(left, key=lambda name: -values[name])[:MOST])


def _for_joint(budget: Budget) -> float:
    """Steps to reserve for the joint trainings; none where they would not be enough."""
    return FOR_JOINT * budget.steps if 2 * AT_MOST <= budget.steps < math.inf else 0.0


def check_choice(model: nn.Module, config: SurgicalConfig, dataloader: Iterable[Any]) -> None:
    """Refuse what `choose_blocks` would refuse that takes no scores to see; reads no data.

    Raises:
        SurgicalError: no block that can be tuned, more blocks asked for than there are, or too few batches.
    """
    blocks = block_map_for(model, config)
    count = len(_with_weights(model, blocks)) - len(_refused(model, config, blocks))
    if config.num_blocks is None:
        _check_enough(length_hint(dataloader, 2))
    else:
        check_count("blocks='auto'", "num_blocks", config.num_blocks, "blocks that can be tuned", at_most=count)


@of_model(batches=16)
def together(context: ScoringContext, *, ranking: tuple[str, ...]) -> dict[str, float]:
    """Minus the held-out loss after a short training of the first block of `ranking`, the first two, and so on.

    Each stands under the name of the last block in it. It ends where a block more takes too little.
    """
    budget, room = context.budget, len(context.batches)
    if budget.is_given and "gains" not in context.known:
        room = min(room, int(budget.left / AT_MOST))
        if room < 2:
            return {}
        context.keep(room)
    gains, start = gains_and_loss(context, least=1 if budget.is_given else 2)
    if budget.is_given:  # at least two trainings: of one alone nothing follows
        room = int(budget.left / sum(context.cost(*ranking[:at]) for at in (1, 2)) * len(context.batches))
        if room < 2:
            return {}
    left: dict[str, float] = {}
    with context.only(room):
        for at, name in enumerate(ranking):
            names = ranking[: at + 1]
            cost = context.cost(*names)
            if cost > budget.left:
                break
            budget.stage(f"the best {at + 1} trained together" if at else "the best one trained, to compare", cost)
            gain = sum(gains.get(block, 0.0) for block in names)  # gains add up
            left[name] = ShortRun(names, PACE * start / gain, passes=1).train(context, 1) if gain else start
            if how_many(list(left.values())) <= at:
                break
    return {name: -loss for name, loss in left.items() if math.isfinite(loss)}  # else it diverged, and was the last


def how_many(left: list[float]) -> int:
    """Number of blocks to take, given the loss left by the first, by the first two, and so on."""
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


def _with_weights(model: nn.Module, blocks: BlockMap) -> list[str]:
    return [name for name, weights in blocks.parameters(model).items() if weights]


def _refused(model: nn.Module, config: SurgicalConfig, blocks: BlockMap) -> dict[str, str]:
    """The blocks that cannot be tuned, and why; some can."""
    check_expressions(model, config)  # once, and not for each block
    names = _with_weights(model, blocks)
    refused = {name: reason for name in names if (reason := _refusal(model, config, blocks, name))}
    if len(refused) == len(names):
        raise SurgicalError(f"no block of {blocks.model_name} can be tuned: {next(iter(refused.values()))}")
    return refused


def _refusal(model: nn.Module, config: SurgicalConfig, blocks: BlockMap, block: str) -> str | None:
    """Why a block cannot be tuned, if it cannot."""
    try:
        modules_to_tune(model, replace(config, blocks=[block], criterion=None, num_blocks=None), blocks)
    except SurgicalError as error:
        return str(error)
    return None
