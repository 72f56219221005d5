"""`score_blocks`: scores the blocks of a model on labeled data, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from .. import criteria
from ..blocks.block_map import BlockMap
from ..blocks.unwrap import bare_parameter_name, idle_parameters, is_row, named_bare_modules, unwrap_model
from ..criteria.budget import FORWARD, READING, Budget
from ..criteria.criterion import (
    NO_GRADIENT,
    Criterion,
    Needs,
    can_train,
    is_zero,
    needs_of,
    not_finite,
    reshard,
    tell_unreached,
    whole,
)
from ..criteria.short_training.context import ScoringContext
from ..errors import SurgicalError
from ..validation import check_choice, check_count, resolve
from .batches import LossFunction, all_ignored, check_labeled, check_separable, examples_of, model_loss, to_device
from .block_scores import BlockScores
from .distributed import broadcast_from_first, is_sharded, size_of_union, split_batches, union_of_names, without_ddp
from .gradients import GradientReader, OverSamples, PerBatch, Units, as_finite_float, kind_of, name_of
from .leftovers import as_it_was
from .offload import Lent, lent_weights, stand_ins_kept
from .progress import counted

GRANULARITIES = ("block", "module", "tensor")
MEMORY = ("normal", "low")


def score_blocks(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    criterion: str | Criterion = "rgn",
    granularity: str = "block",
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    memory: str = "normal",
    budget: float | Budget | None = None,
    blocks: BlockMap | None = None,
) -> BlockScores:
    """Score every block of `model` on labeled data; the model comes back as it was.

    Gradients are read as the backward pass delivers them, reduced to one number a unit and freed at once: memory is
    weights + activations + one unit's gradients, and what the criterion itself keeps. The model runs in eval mode, as
    in the paper's code. Works on models placed by accelerate (several devices, weights offloaded to the CPU) and under
    DDP and FSDP2, where all processes must call it and get the scores of the union of their batches.

    Args:
        model: bare or wrapped; all its floating-point parameters in use are scored, frozen ones too.
        dataloader: batches as the model takes them, `{"pixel_values": ..., "labels": ...}`; None for a criterion that
            needs no data.
        criterion: a name from `criteria`, `"package.module:name"`, or a function `(weights, grads) -> float`.
        granularity: what is scored: `"block"`, `"module"` (each module that holds weights itself) or `"tensor"`.
        num_batches: how many batches to look at; fewer if the loader ends. Default: what the criterion asks for, 5 for
            most, as in the paper.
        loss_fn: `(model, batch) -> scalar loss`, any loss, also one without labels such as the entropy of the
            predictions; default `model(**batch).loss`.
        memory: `"low"` scores groups of units no larger than the largest one, a pass over the batches for each group:
            a criterion that keeps two numbers for each weight then keeps them for one group only.
        budget: how many training steps scoring may cost: forward and backward passes of the whole model on one batch,
            with an update of all weights; more than 0. It is counted, not timed: the choice is the same on every
            machine. Scoring takes fewer batches to stay within it, `probe` also fewer units and passes, or gradients
            alone; the plan and the cost are printed (`transformers.utils.logging.disable_progress_bar()`
            silences it). Default: no limit.
        blocks: the model's map; default `BlockMap.find(model)`.

    Returns:
        The scores, larger = tune it. Units that have none are left out (`scores.unscored`): those whose weights are
        all zero, those that the loss reaches in no batch, and those that the criterion does not define.

    Raises:
        SurgicalError: empty loader, a batch without labels or with none but ignored ones, a NaN or infinite loss or
            gradient (names the unit and batch); a criterion that cannot tell: no unit has a gradient, all scores are
            zero, too few samples for it, or single examples of a loss that exists over a batch only, a budget that
            is no number above 0, or too small for one batch (says what it would take).

    Example:
        >>> scores = score_blocks(model, DataLoader(dataset, batch_size=32), num_batches=5)
        >>> print(scores)
    """
    check_choice("score_blocks", "granularity", granularity, GRANULARITIES)
    check_choice("score_blocks", "memory", memory, MEMORY)
    score = resolve(criterion, criteria) if isinstance(criterion, str) else criterion
    if not callable(score):
        raise SurgicalError(f"criterion={criterion!r} is a {type(criterion).__name__}, not a name or a function.")
    needs = needs_of(score)
    wanted = needs.batches if num_batches is None else num_batches
    if num_batches is not None or needs.what != "model":
        check_count("score_blocks", "num_batches", wanted, "batches to score on")
    model = without_ddp(model)
    reshard(model)
    blocks = blocks or BlockMap.find(model)
    lent = lent_weights(model)
    is_told = budget is not None or needs.what == "model"  # callbacks score by gradients, many times
    told = counted(budget if is_told else Budget(), f"scores by {name_of(score)}")
    with as_it_was(model) as untouched, stand_ins_kept(model, lent), told as spending:

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            untouched.clear()  # what one forward pass leaves to the next is stale, or of a graph that is gone
            return (loss_fn or model_loss)(model, batch)

        batches = list(islice(dataloader, wanted)) if wanted and dataloader is not None else []
        ours, total = split_batches(batches, everywhere=needs.what == "model" or is_sharded(model))
        if wanted and not total:
            raise SurgicalError("the data loader is empty: scoring needs at least one batch of labeled examples.")
        if loss_fn is None:
            check_labeled(ours)
        units = _units(model, blocks, granularity, {each.name for each in lent if each.name != each.path})
        if not units:
            raise SurgicalError(
                f"{blocks.model_name} has no floating-point weight in use, so there is nothing to score: a quantized "
                "model has to be scored before it is quantized."
            )
        _check_loaded(blocks, units, lent)
        block_of = {
            name: name if granularity == "block" else blocks.block_of(next(iter(unit))) for name, unit in units.items()
        }
        zero = _zero_units(units, lent)
        scored = {name: unit for name, unit in units.items() if name not in zero}
        basis: dict[str, str] = {}
        for weight in (weight for name in zero for weight in units[name].values()):
            weight.requires_grad_(False)  # its gradient is not read
        if needs.what == "model":
            if lent and needs.batches:
                raise SurgicalError(
                    f"{name_of(score)} needs the whole model, and weights of {blocks.model_name} are offloaded by "
                    "accelerate: score with a criterion on gradients, such as 'adam_gain', or load the model without "
                    "offloading."
                )
            stored = {each.path: each for each in lent}
            at_hand = {
                name: {path: stored[path].loaded() if weight.is_meta else weight for path, weight in unit.items()}
                for name, unit in scored.items()
            }
            paths = {path for name in blocks.layers for path in blocks.modules[name]}
            layers = [layer for path, layer in named_bare_modules(unwrap_model(model)) if path in paths]
            on_device = [to_device(batch, model) for _, batch in ours]
            context = ScoringContext(
                model, at_hand, block_of, layers, on_device, loss_of, broadcast_from_first, spending
            )
            returned = _named_values(score(context), score, scored)
            values = broadcast_from_first(
                {name: as_finite_float(returned[name], score, name) for name in scored if name in returned}
            )
            basis = {name: context.basis[name] for name in values if name in context.basis}
            total = len(on_device)  # a budget may drop some of them
        else:
            values = {}
            groups = list(_groups(scored)) if memory == "low" else [scored]
            checking = 2 * FORWARD if needs.samples == "examples" and ours else 0.0
            costs = [len(groups) * _cost(batch, needs) for _, batch in ours]
            if spending.is_given and ours:
                spending.affordable(1, checking + costs[0], "one batch")
                sums = list(accumulate(costs, initial=checking))
                ours = [each for each, cost in zip(ours, sums[1:], strict=True) if cost <= spending.left]
                total = size_of_union(ours, everywhere=is_sharded(model))
            spending.stage(f"{name_of(score)} on {len(ours)} batches", checking + sum(costs[: len(ours)]))
            if checking:
                spending.spend(checking)
                check_separable(model, to_device(ours[0][1], model), loss_of)
            for group in groups:
                values |= _from_gradients(model, group, score, ours, loss_of, lent, spending)
            tell_unreached([name for name in scored if name not in values], scored)
    if not any(values.values()):
        fault = f"is zero for every {granularity}" if values else f"scores no {granularity}"
        raise SurgicalError(
            f"{name_of(score)} {fault} of {blocks.model_name}, so there is nothing to choose by. {NO_GRADIENT}"
        )
    return BlockScores(
        values=values,
        sizes={name: sum(weight.numel() for weight in scored[name].values()) for name in values},
        blocks={name: block_of[name] for name in values},
        unscored=tuple(name for name in units if name not in values),
        criterion=criterion if isinstance(criterion, str) else name_of(criterion),
        granularity=granularity,
        num_batches=total,
        model_name=blocks.model_name,
        layer_paths=blocks.layer_paths,
        basis=basis,
    )


def _from_gradients(
    model: nn.Module,
    units: Units,
    score: Criterion,
    batches: list[tuple[int, Any]],
    loss_of: LossFunction,
    lent: list[Lent],
    spending: Budget,
) -> dict[str, float]:
    """Scores of `units` by a criterion on gradients or their moments, from one pass over the batches."""
    needs = needs_of(score)
    reshard(model)
    inside = {id(weight) for unit in units.values() for weight in unit.values()}
    for parameter in model.parameters():
        if can_train(parameter):
            parameter.requires_grad_(id(parameter) in inside)
    receiver = PerBatch(score, units) if needs.what == "gradients" else OverSamples(score, needs, units)
    with GradientReader(units, receiver.take, lent, kind_of(needs)).watching() as reader:
        examples = 0
        for at, batch in batches:
            batch = to_device(batch, model)
            if needs.samples == "batches":
                spending.spend(_cost(batch, needs))
                reader.read(loss_of(model, batch), at)
                continue
            before = examples
            alone = list(examples_of(batch))
            for example in alone:
                spending.spend(_cost(batch, needs) / len(alone))
                loss = loss_of(model, example)
                if all_ignored(example) and not loss.isfinite():
                    continue  # it has no part in the loss of its batch either
                reader.read(loss, examples)
                examples += 1
            if examples == before:
                raise not_finite("loss", "batch", at)
    reached = union_of_names(reader.reached)
    values = receiver.result(alone=is_sharded(model))
    return {name: value for name, value in values.items() if name in reached}


def _cost(batch: Any, needs: Needs) -> float:
    """Cost of reading the gradients of a batch, in training steps on it."""
    if needs.what == "gradients":
        return 1.0
    return 1.0 + READING * (1 if needs.samples == "batches" else len(list(examples_of(batch))))


def _groups(units: Units) -> Iterator[Units]:
    """Runs of units, each run together no larger than the largest unit."""
    sizes = {name: sum(weight.numel() for weight in unit.values()) for name, unit in units.items()}
    run: dict[str, dict[str, nn.Parameter]] = {}
    for name, unit in units.items():
        if run and sum(sizes[other] for other in run) + sizes[name] > max(sizes.values()):
            yield run
            run = {}
        run[name] = unit
    yield run


def _units(model: nn.Module, blocks: BlockMap, granularity: str, tied: set[str]) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of `model` in use, by unit and by bare name; module and tensor units have bare names too."""
    units: dict[str, dict[str, nn.Parameter]] = {}
    idle = idle_parameters(model)
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if not parameter.requires_grad or id(parameter) in idle:
                continue
            path = bare_parameter_name(name)
            if path in tied or is_row(path):
                continue
            unit = {"block": block, "module": path.rpartition(".")[0], "tensor": path}[granularity]
            units.setdefault(unit, {})[path] = parameter
    return units


@torch.no_grad()
def _zero_units(units: Units, lent: list[Lent]) -> list[str]:
    """Units whose weights are all zero."""
    stored = {lent_weight.path: lent_weight for lent_weight in lent}

    def alive(path: str, weight: nn.Parameter) -> bool:
        return not is_zero(stored[path].stored() if weight.is_meta else whole(weight))

    return [name for name, unit in units.items() if not any(alive(path, weight) for path, weight in unit.items())]


def _named_values(values: Any, criterion: Criterion, units: Units) -> dict[str, Any]:
    if isinstance(values, Mapping) and set(values) <= set(units):
        return dict(values)
    shown = f"the units {', '.join(map(str, values))}" if isinstance(values, Mapping) else f"a {type(values).__name__}"
    raise SurgicalError(
        f"the criterion {name_of(criterion)} returned {shown}: it must return {{unit: score}} for units among "
        f"{', '.join(units)}."
    )


def _check_loaded(blocks: BlockMap, units: Units, lent: list[Lent]) -> None:
    stored = {lent_weight.path for lent_weight in lent}
    missing = [p for unit in units.values() for p, weight in unit.items() if weight.is_meta and p not in stored]
    if missing:
        raise SurgicalError(
            f"{len(missing)} weights of {blocks.model_name} are on the meta device, which holds no numbers, the first "
            f"is {missing[0]}: load them before scoring."
        )
