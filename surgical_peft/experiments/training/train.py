"""One training: a recipe in, a tuned adapter and its report out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ...atomic_files import check_replaceable, only_writer, whole_folder, write_text
from ...auto import CRITERION, choose_blocks, get_surgical_model
from ...criteria.budget import GRADIENTS, half_of
from ...errors import SurgicalError
from ...export.processor import fits_pipeline, processor_of
from ...optim.callback import SurgicalCallback
from ...policies.policy import Policy
from ...scoring.block_scores import BlockScores
from ...scoring.progress import Stages, TrainingStage, counted
from ...scoring.score import score_blocks
from ...tuner.config import SurgicalConfig
from ...tuner.loading.fingerprint import fingerprint
from ..recipe.code import check_code
from ..recipe.recipe import Recipe
from ..tasks import Task, load_task
from ..tasks.source_model import modules_to_save
from .card import write_card
from .fit import PREFIX_CACHE, fit
from .make_report import Trained, make_report, start
from .measuring import further_report, measurements, source_measurements, source_report
from .online import adapt_to_streams
from .report import REPORT, TrainingReport
from .unfinished import StopAtStep, Unfinished, stopped_early

_ADAPTER = "adapter_config.json"  # by which the adapter of an earlier run is known


def score(recipe: Recipe, console: Console | None = None) -> BlockScores:
    """Score the blocks of a recipe's model on its training data, untouched; by `probe` unless the recipe says.

    It costs at most half of the planned training; `console` is where to tell of it, as for `train`.
    """
    check_code(recipe)
    args = recipe.arguments()
    criterion = recipe.make_criterion() or CRITERION
    with Stages(console) as stages:
        stages.begin("load the data")
        task = load_task(recipe, ("train",))
        stages.end()
        task.summary.show(stages.console)
        model = task.load_model().to(args.device)
        batches = loader(task, args)
        with counted(budget_of(args, batches), "scoring blocks", stages) as spending:
            return score_blocks(model, batches, criterion, num_batches=recipe.num_batches, budget=spending)


def budget_of(args: TrainingArguments, batches: Iterable[Any]) -> float:
    """The budget for choosing blocks: half of the batches that the training will go through.

    One or two steps are for trying a recipe out; then the gradients of one batch are allowed, which is more.
    """
    if args.max_steps > 0:
        planned = args.max_steps * args.gradient_accumulation_steps
    else:
        planned = math.ceil(length_hint(batches) * args.num_train_epochs / args.world_size)
    return max(half_of(max(planned, 1)), GRADIENTS)


def loader(task: Task, args: TrainingArguments) -> DataLoader[Any]:
    """Shuffled batches of the training split, the same at every call."""
    return DataLoader(
        task.splits["train"],  # type: ignore[arg-type]
        batch_size=args.train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),
        collate_fn=task.collate,
    )


def train(recipe: Recipe, output: str | Path | None = None, console: Console | None = None) -> TrainingReport:
    """Choose the blocks, tune them, measure, and save the adapter with its report.

    Choosing the blocks costs at most half of the training. Interrupted by Ctrl-C, it saves a checkpoint after the step
    at hand; called again with the same recipe, model, data and folder, it goes on from there.

    Args:
        recipe: what to do.
        output: folder to write to; default is the recipe's `output_dir`. It gets `adapter/`, with a model card in it,
            `report.json`, and with `blocks: auto` also `scores.json` and `scores.png`; each whole or not at all.
        console: where to tell what is done: on a terminal with the time left, elsewhere a line for each stage. Default
            is the standard error, and nowhere if transformers' progress bars are off.

    Returns:
        The report: blocks, numbers of parameters, the metric on validation and test (where there is such a split), and
        on `source_data` with the loss there, before and after, and all else that `surgical-peft card` says.

    Raises:
        SurgicalError: what the recipe says does not fit, the training ended in NaN, or another process writes to the
            folder; nothing is saved then.
        KeyboardInterrupt: it was interrupted; its message says what is kept.
    """
    args = recipe.arguments(**_losses(recipe), **({} if output is None else {"output_dir": str(output)}))
    folder = Path(str(args.output_dir))
    recipe.check_run(output)
    policy = recipe.make_policy()
    check_replaceable(folder / "adapter", _ADAPTER)
    with only_writer(folder):
        return _train(recipe, args, policy, folder, console)


def _train(
    recipe: Recipe, args: TrainingArguments, policy: Policy | None, folder: Path, console: Console | None
) -> TrainingReport:
    with Stages(console) as stages:
        if (folder / REPORT).is_file():
            stages.say(f"{folder} has the report of a training that is done: this one takes its place at its end.")
        stages.begin("load the data")
        task, beginning = load_task(recipe), start(recipe)
        processor = task.processor or processor_of(recipe.model)
        (own, further), of_source = measurements(recipe, task), source_measurements(recipe)
        stages.end()
        task.summary.show(stages.console)
        stages.begin("load the model")
        model = task.load_model().to(args.device)
        weights = fingerprint(model.state_dict().values())
        unfinished = Unfinished(folder, {"recipe": recipe.keys(), "data": beginning.data, "model": weights})
        unfinished.tell(stages.say)
        if unfinished.checkpoint:
            args.restore_callback_states_from_checkpoint = True  # early stopping counts on
            args.max_steps = stopped_early(unfinished.checkpoint) or args.max_steps
        stopper = StopAtStep(unfinished, stages.say)
        try:
            size = sum(parameter.numel() for parameter in model.parameters())
            config, scores = _choose(recipe, task, args, model, unfinished, stages)
            wrapped = get_surgical_model(model, config)
            tuned = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)

            def measured(when: str) -> tuple[dict[str, float], dict[str, float]]:
                values = {entry.split: entry.of(wrapped, when, stages) for entry in own}
                return values, {entry.metric: entry.of(wrapped, when, stages) for entry in further}

            if "before" not in unfinished.known:
                values, others = measured("before")
                unfinished.keep(before=values, others_before=others)
            if "source_before" not in unfinished.known:
                unfinished.keep(source_before=[entry.of(wrapped, "before", stages) for entry in of_source])
            before, others_before = unfinished.known["before"], unfinished.known.get("others_before", {})
            trainer: Trained
            callbacks: list[TrainerCallback] = [
                SurgicalCallback(),
                *([TrainingStage(stages)] if args.disable_tqdm else []),
                stopper,
            ]
            if recipe.early_stopping_patience is not None:
                callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
            judged = task.splits["validation"] if args.eval_strategy != "no" else None
            if recipe.is_online:
                trainer, after = adapt_to_streams(wrapped, task, args, policy, stages)
                others_after: dict[str, float] = {}
            else:
                with stopper.listening():
                    trainer = fit(
                        wrapped,
                        args,
                        task.splits["train"],
                        policy,
                        callbacks,
                        task.collate,
                        judged,
                        unfinished.checkpoint,
                        folder / PREFIX_CACHE if recipe.prefix_cache else None,
                    )
                after, others_after = measured("after")
            source_after = [entry.of(wrapped, "after", stages) for entry in of_source]
        except KeyboardInterrupt:
            raise KeyboardInterrupt(unfinished.interrupted()) from None
    beginning = replace(beginning, clock=time.monotonic() - unfinished.seconds)
    keeps_checkpoints = args.save_strategy != SaveStrategy.NO
    try:
        told = {f"{task.metric} on {split}": value for split, value in after.items()}
        told |= dict(zip(("the loss on source data", "the metric there"), source_after, strict=False))
        _check_finite(wrapped, args, {**told, **others_after})
    except SurgicalError:
        unfinished.finished(keeps_checkpoints)
        raise
    with whole_folder(folder / "adapter", _ADAPTER) as temporary:
        wrapped.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        if (folder / "adapter").exists():  # what an earlier run said of its adapter goes with it
            for stale in ("report.json", "scores.json", "scores.png"):
                (folder / stale).unlink(missing_ok=True)
    if scores is not None:
        scores.save(folder / "scores.json")
        scores.plot(folder / "scores.png")
    scored, plot = (None, None) if scores is None else (list(scores.values), "scores.png")
    report = replace(
        make_report(recipe, task, trainer, beginning, (before, after), (tuned, size), folder, scored, plot),
        in_pipeline=fits_pipeline(wrapped, processor),
        test_metrics=further_report(further, others_before, others_after),
        source=source_report(of_source, unfinished.known["source_before"], source_after),
    )
    write_text(folder / REPORT, json.dumps(report.to_json(), indent=2) + "\n")
    write_card(folder)
    unfinished.finished(keeps_checkpoints)
    return report


def _losses(recipe: Recipe) -> dict[str, Any]:
    """Arguments for about twenty losses in a training, unless the recipe says when to log."""
    is_told = any(key.startswith("logging_st") for key in recipe.training)
    return {} if is_told else {"logging_strategy": "steps", "logging_steps": 0.05}  # of all steps


def _choose(
    recipe: Recipe, task: Task, args: TrainingArguments, model: nn.Module, unfinished: Unfinished, stages: Stages
) -> tuple[SurgicalConfig, BlockScores | None]:
    """The adapter's config with the blocks chosen, and their scores; as before if this was done before."""
    config = recipe.config()
    config.modules_to_save = modules_to_save(recipe, model)
    if config.blocks != "auto":
        return config, None
    if "scores" in unfinished.known:
        chosen = {key: unfinished.known[key] for key in ("blocks", "selection")}
        return replace(config, criterion=None, num_blocks=None, **chosen), BlockScores.from_json(
            unfinished.known["scores"]
        )
    batches = loader(task, args)
    budget = budget_of(args, batches)
    config, scores = choose_blocks(model, config, batches, recipe.num_batches, budget=budget, stages=stages)
    config.selection = {**(config.selection or {}), "seed": args.seed}
    unfinished.keep(blocks=config.blocks, selection=config.selection, scores=scores.to_json())
    return config, scores


def _check_finite(model: nn.Module, args: TrainingArguments, metrics: Mapping[str, float]) -> None:
    """Raise if training diverged (NaN, inf); accuracy does not tell, since NaN has a largest logit too."""
    tuned = [weight for weight in model.parameters() if weight.requires_grad]
    broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    broken += [] if all(bool(weight.isfinite().all()) for weight in tuned) else ["tuned weights are NaN or infinite"]
    if broken:
        raise SurgicalError(
            f"after training at learning_rate={args.learning_rate}, {broken[-1]}: lower the rate. Nothing was saved."
        )
