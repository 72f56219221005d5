"""`SurgicalCallback`: passes epochs and scores from `Trainer` to the policy, and logs its factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import has_length

from ..errors import SurgicalError
from ..policies.policy import Policy
from ..policies.stages import check_length
from ..precision.master_weights import forget_moments
from ..rendering import NO_FIGURES, can_draw
from ..scoring.batches import LossFunction, model_loss
from ..scoring.block_scores import BlockScores
from ..scoring.score import score_blocks
from .block_rates import BlockRates, find_rates
from .history import History
from .of_trainer import loss_of


class SurgicalCallback(TrainerCallback):
    """Tells the policy of epochs, scores the blocks for it where it asks to, and logs what it does.

    **Probes.** The batches are drawn from the training set by a generator of its own (seed + epoch or step), so
    training sees the same data in the same order as without it; a run resumed within an epoch does not score that
    epoch again. With several processes the batches are dealt out in turn, each of the size that one process trains on.

    **Log.** Under a policy, `surgical/lr_multiplier/<block>`, `surgical/score/<block>` and `surgical/selected` (how
    many blocks have a factor above 0) go into `trainer.state.log_history` with the loss. Where tensors have their own
    factors, a block has the mean over its entries. Trackers see them if they are called after this callback, and
    Trainer puts those of `report_to` before yours; so give `report_to="none"` and
    `callbacks=[SurgicalCallback(), TensorBoardCallback()]` (from `transformers.integrations`).

    **History.** `surgical_history.jsonl` in `output_dir` has a line for every step at which a factor changed; a
    resumed run continues it from its checkpoint's step. At the end of training it is drawn to `surgical_history.png`,
    and what the policy has frozen may be trained again.

    Args:
        loss_fn: `(model, batch) -> loss` to score by, for a Trainer whose `compute_loss` is of its own
            (SentenceTransformerTrainer, a subclass of yours); default is the model's own, `model(**batch).loss`, or
            that of the Trainer's `compute_loss_func` or label smoothing.

    Example:
        >>> Trainer(..., callbacks=[SurgicalCallback()])
    """

    def __init__(self, loss_fn: LossFunction | None = None) -> None:
        self.loss_fn = loss_fn
        self._history: History | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the masks in force, and open the history.

        Raises:
            SurgicalError: the training ends before the policy's last stage begins, or the policy scores on batches
                that the training set or the model's loss does not allow.

        Warns:
            UserWarning: the policy scores by another loss than a subclass of Trainer may train by.
        """
        optimizer, rates = _surgical(kwargs["optimizer"])
        if state.global_step < state.max_steps:  # else one that had stopped early is only ended
            check_length(rates.policy, state.num_train_epochs, state.max_steps)
        if rates.has_callback and state.global_step == 0:  # a loop of one's own begins again
            rates.restart(optimizer)
        else:
            rates.resume(optimizer)
        rates.has_callback = True
        if rates.policy.probe_batches:
            self._check_probe(optimizer, rates, args, state, kwargs)
        self._history = None
        if state.is_world_process_zero and rates.policy != Policy():
            if not can_draw():
                warnings.warn(f"the policy's history is kept without its picture: {NO_FIGURES}", stacklevel=2)
            self._history = History(Path(str(args.output_dir)) / "surgical_history.jsonl", state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the epoch, and score if it is time."""
        optimizer, rates = _surgical(kwargs["optimizer"])
        rates.begin_epoch(optimizer, state.global_step, _steps_an_epoch(kwargs["train_dataloader"], args))
        if rates.policy.probe_every == "epoch":
            epoch = optimizer.param_groups[0]["surgical"]["epoch"]
            self._probe(optimizer, rates, epoch, args, state, kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score if it is time."""
        optimizer, rates = _surgical(kwargs["optimizer"])
        rates.begin_step(optimizer, state.global_step)
        every = rates.policy.probe_every
        if isinstance(every, int) and state.global_step % every == 0:
            self._probe(optimizer, rates, state.global_step, args, state, kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the factors of the step."""
        if self._history is not None:
            _, rates = _surgical(kwargs["optimizer"])
            self._history.note(state.global_step, rates.by_block(rates.used))

    def on_log(  # type: ignore[override]  # Trainer gives it the logs
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the factors and scores to what is logged while training."""
        if "loss" not in logs:  # of an evaluation, which there may be before there is an optimizer
            return
        optimizer, rates = _surgical(kwargs["optimizer"])
        if rates.policy == Policy():
            return
        factors = rates.by_block(rates.used)
        scores = rates.by_block(rates.training_state(optimizer).scores)
        ours = {
            **{f"surgical/lr_multiplier/{block}": factor for block, factor in factors.items()},
            **{f"surgical/score/{block}": score for block, score in scores.items()},
            "surgical/selected": sum(factor > 0 for factor in factors.values()),
        }
        logs.update(ours)  # for the callbacks after this one
        state.log_history[-1].update(ours)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lift the masks, and draw the history."""
        _, rates = _surgical(kwargs["optimizer"])
        rates.release()
        if self._history is not None and self._history.rows and can_draw():
            self._history.plot(state.global_step, str(rates.policy).partition("(")[0])

    def _probe(
        self,
        optimizer: Optimizer,
        rates: BlockRates,
        at: int,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: dict[str, Any],
    ) -> None:
        policy, record = rates.policy, optimizer.param_groups[0]["surgical"]
        if not policy.probe_batches or record["probed"] == at:
            return
        scores = self._scores(rates, at, policy.probe_batches, args, state, kwargs)
        training = rates.training_state(optimizer)
        training.scores.clear()
        training.scores.update(
            {unit.name: scores.values[unit.name] for unit in training.units if unit.name in scores.values}
        )
        if (multipliers := policy.multipliers_from(scores, training)) is not None:
            rates.set_multipliers(optimizer, multipliers)
        if policy.reset_at_probe:
            forget_moments(optimizer, list(optimizer.state))
        record["probed"] = at

    def _check_probe(
        self,
        optimizer: Optimizer,
        rates: BlockRates,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: dict[str, Any],
    ) -> None:
        policy, data = rates.policy, kwargs["train_dataloader"].dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise SurgicalError(
                f"{policy} scores on training batches and needs a training set that can be indexed, not a stream "
                f"({type(data).__name__}): use a policy without a probe, such as auto_rgn(every='step')."
            )
        trainer = _trainer_of(self)
        if trainer and self.loss_fn is None and type(trainer).compute_loss is not Trainer.compute_loss:
            warnings.warn(
                f"{policy} scores by the model's own loss, and {type(trainer).__name__} trains by a compute_loss of "
                "its own: if they differ, give SurgicalCallback(loss_fn=...), a function (model, batch) -> loss.",
                stacklevel=2,
            )
        if optimizer.param_groups[0]["surgical"]["probed"] is not None:  # else its first probe precedes the first step
            self._scores(rates, state.global_step, 1, args, state, kwargs)

    def _scores(
        self,
        rates: BlockRates,
        at: int,
        count: int,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: dict[str, Any],
    ) -> BlockScores:
        policy, training = rates.policy, kwargs["train_dataloader"]
        size = args.per_device_train_batch_size if args.world_size > 1 else state.train_batch_size
        batches = _probe_batches(training, size, args.seed + at, count, args.process_index, args)
        trainer = _trainer_of(self)
        loss_fn = self.loss_fn or (trainer and loss_of(trainer)) or partial(_own_loss, policy)
        return score_blocks(
            kwargs["model"], batches, policy.criterion, policy.granularity, count, loss_fn, blocks=rates.blocks
        )


_trainers: WeakKeyDictionary[SurgicalCallback, ref[Trainer]] = WeakKeyDictionary()  # not in them: they are pickled


def note_trainer(trainer: Trainer) -> None:
    """Note whose callbacks ours are: they score by its loss."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SurgicalCallback):
            _trainers[callback] = ref(trainer)


def _trainer_of(callback: SurgicalCallback) -> Trainer | None:
    return _trainers[callback]() if callback in _trainers else None


def _own_loss(policy: Policy, model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes itself; where Trainer calls it in another way, this cannot work."""
    try:
        return model_loss(model, batch)
    except (SurgicalError, TypeError, AttributeError, KeyError) as error:
        raise SurgicalError(
            f"{policy} scores on training batches by the loss of model(**batch), which fails: {error} If the Trainer "
            "computes its loss in another way, give SurgicalCallback(loss_fn=...), a function (model, batch) -> loss."
        ) from error


def _steps_an_epoch(training: DataLoader, args: TrainingArguments) -> int | None:
    """As Trainer counts them; None for a stream."""
    return max(math.ceil(len(training) / args.gradient_accumulation_steps), 1) if has_length(training) else None


def _surgical(optimizer: Any) -> tuple[Optimizer, BlockRates]:
    optimizer, rates = find_rates(optimizer)
    if rates is None:
        raise SurgicalError(
            "SurgicalCallback found no surgical optimizer: give the Trainer "
            "optimizer_cls_and_kwargs=surgical_optimizer(args, policy) as well."
        )
    return optimizer, rates


def _probe_batches(
    training: DataLoader, batch_size: int | None, seed: int, count: int, rank: int, args: TrainingArguments
) -> Iterator[Any]:
    """This process's share of `count` batches, by a loader of their own: half-read, the Trainer's would change others.

    The seed is for what the data set or its collator draws (augmentation, masking): all processes make all batches, so
    that these draws are the same however many there are. `score_blocks`, which reads them, puts the random states
    back.
    """
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        training.dataset, batch_size, shuffle=True, generator=generator, collate_fn=training.collate_fn
    )
    for at, batch in enumerate(islice(loader, count)):
        if at % args.world_size == rank:
            yield batch
