"""What each policy makes of the rates, against plain references."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from surgical_peft import (
    BlockMap,
    SurgicalCallback,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    criteria,
    policies,
    score_blocks,
    surgical_optimizer,
)
from surgical_peft.policies.gradient_norms import _norms_in_one_call, _norms_on_cpu, gradient_ratios
from surgical_peft.policies.policy import Policy, TrainingState, Unit
from surgical_peft.scoring.block_scores import BlockScores
from tests.support.steps import backward, used_rates
from tests.support.toys import TOYS, Toy

ADAMW = torch.optim.AdamW


def rates(model: nn.Module, policy: Policy, lr: float = 1.0) -> dict[str, float]:
    """The rate of each block at the first step."""
    optimizer = create_surgical_optimizer(model, ADAMW, lr=lr, policy=policy)
    return used_rates(optimizer)


def factors(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["unit"]: group["lr_multiplier"] for group in optimizer.param_groups}


# ---- policies without effect


@pytest.mark.parametrize(
    ("policy", "blocks", "is_idle"),
    [
        (policies.auto_rgn(), [3, "head"], True),
        (policies.auto_rgn(), [3, 4, "head"], False),
        (policies.auto_rgn(granularity="tensor"), [3, "head"], False),
        (policies.auto_rgn(), ["head"], True),
        (policies.layer_decay(0.8), ["head"], True),
        (policies.layer_decay(0.8), [3, "head"], False),
        (None, ["head"], False),
    ],
)
def test_a_policy_that_changes_nothing_says_so(policy: Policy | None, blocks: list[Any], is_idle: bool) -> None:
    model = get_peft_model(TOYS["vit"].model(), SurgicalConfig(blocks=blocks))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        create_surgical_optimizer(model, ADAMW, lr=1.0, policy=policy)
    assert ["no effect" in str(each.message) for each in told if each.category is UserWarning] == [True] * is_idle


# ---- static


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"0": 0.1, 2: 3, -1: 0.5}, {"0": 0.1, "2": 3.0, "11": 0.5}),
        ({"0:2": 0.1, "-2:": 2.0, "head": 10}, {"0": 0.1, "1": 0.1, "10": 2.0, "11": 2.0, "head": 10.0}),
        ({"all": 0.5}, dict.fromkeys(TOYS["vit"].blocks, 0.5)),
    ],
)
def test_static_rates_by_block(given: dict[int | str, float], expected: dict[str, float], vit: Toy) -> None:
    assert rates(vit.model(), policies.static(given), lr=0.25) == {
        block: 0.25 * expected.get(block, 1.0) for block in vit.blocks
    }


def test_static_understands_stacks() -> None:
    found = rates(TOYS["t5"].model(), policies.static({"decoder[-1]": 0.5, "encoder[0:2]": 0.1}))
    assert found == dict.fromkeys(TOYS["t5"].blocks, 1.0) | {
        "decoder.1": 0.5,
        "encoder.0": 0.1,
        "encoder.1": 0.1,
    }


def test_static_puts_the_highest_rate_first_for_the_log(vit: Toy) -> None:
    optimizer = create_surgical_optimizer(vit.model(), ADAMW, lr=1.0, policy=policies.static({5: 3.0, 0: 0.1}))
    assert optimizer.param_groups[0]["block"] == "5"
    assert optimizer.param_groups[-1]["block"] == "0"


@pytest.mark.parametrize("factor", [0, -1.0, math.nan, math.inf])
def test_static_refuses_factors_that_are_not_above_zero(factor: float, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match="multipliers"):
        rates(vit.model(), policies.static({3: factor}))


@pytest.mark.parametrize("block", ["12", 12, "layer3", "encoder[0]"])
def test_static_refuses_blocks_that_do_not_exist(block: int | str, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=r"12 repeated blocks|does not exist|no stack"):
        rates(vit.model(), policies.static({block: 0.5}))


def test_static_refuses_a_block_under_two_keys(vit: Toy) -> None:
    """The later key won without a word."""
    with pytest.raises(SurgicalError, match=r"'3'.*twice"):
        rates(vit.model(), policies.static({"0:6": 0.1, 3: 0.5}))


# ---- layer decay


@pytest.mark.parametrize("name", [name for name in TOYS if name != "t5"])
def test_layer_decay_is_timms_rule(name: str) -> None:
    toy = TOYS[name]
    count = sum(block.isdigit() for block in toy.blocks)
    layer_ids = {"embeddings": 0, "final_norm": count + 1, "head": count + 1}
    layer_ids |= {str(k): k + 1 for k in range(count)}
    expected = {block: 0.7 ** (count + 1 - layer_ids[block]) for block in toy.blocks}
    assert rates(toy.model(), policies.layer_decay(0.7)) == pytest.approx(expected, rel=1e-12)


def test_layer_decay_counts_the_encoder_before_the_decoder() -> None:
    depths = {"embeddings": 0, "encoder.0": 1, "encoder.1": 2, "encoder.final_norm": 3}
    depths |= {"decoder.0": 3, "decoder.1": 4, "decoder.final_norm": 5}
    expected = {block: 0.5 ** (5 - depth) for block, depth in depths.items()}
    assert rates(TOYS["t5"].model(), policies.layer_decay(0.5)) == expected


def test_layer_decay_counts_frozen_blocks_too(vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, -1]))
    assert rates(model, policies.layer_decay(0.5)) == {"0": 0.5**12, "11": 0.5}


@pytest.mark.parametrize("decay", [0, -0.5, 1.01, math.nan])
def test_layer_decay_out_of_range(decay: float) -> None:
    with pytest.raises(SurgicalError, match="decay="):
        policies.layer_decay(decay)


# ---- auto_rgn, every step


def reference(model: nn.Module, granularity: str, normalized: str) -> dict[str, float]:
    """Auto-RGN by its formula, from `parameter.grad`, in float64."""
    blocks = BlockMap.find(model)
    squares: dict[str, list[float]] = {}
    inside = set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            block = blocks.block_of(name)
            tensor = name.removeprefix("base_model.model.")
            unit = block if granularity == "block" else tensor
            total = squares.setdefault(unit, [0.0, 0.0])
            total[0] += 0.0 if p.grad is None else p.grad.double().square().sum().item()
            total[1] += p.detach().double().square().sum().item()
            inside |= {unit} if block != "head" else set()
    ratios = {u: math.sqrt(g) / math.sqrt(w) for u, (g, w) in squares.items() if u in inside and w > 0}
    low = min(ratios.values()) if normalized == "minmax" else 0.0
    high = max(ratios.values())
    return {u: (ratios[u] - low) / (high - low) if u in ratios else 1.0 for u in squares}


@pytest.mark.parametrize("normalized", ["max", "minmax"])
@pytest.mark.parametrize("granularity", ["block", "tensor"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_auto_rgn_factors_are_those_of_the_formula(name: str, granularity: str, normalized: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    policy = policies.auto_rgn(granularity=granularity, normalized=normalized)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policy)
    for step in range(3):
        backward(model, toy, step)
        expected = reference(model, granularity, normalized)
        optimizer.step()
        assert factors(optimizer) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert len(expected) == (len(toy.blocks) if granularity == "block" else len(list(model.parameters())))
        heads = [unit for unit in expected if unit == "head" or unit.startswith(("classifier.", "lm_head."))]
        assert heads
        assert {expected[unit] for unit in heads} == {1.0}


def test_auto_rgn_of_a_wrapped_model_compares_what_is_trained(toy: Toy) -> None:
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[toy.first, toy.last]))
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.auto_rgn())
    backward(model, toy)
    expected = reference(model, "block", "max")
    optimizer.step()
    assert set(expected) == {toy.first, toy.last}
    assert factors(optimizer) == pytest.approx(expected, rel=1e-5)


def test_tensors_that_are_all_zero_stay_outside(vit: Toy) -> None:
    model = vit.model()
    zeroed = "vit.layers.3.mlp.fc1.bias"
    nn.init.zeros_(model.get_parameter(zeroed))
    policy = policies.auto_rgn(granularity="tensor")
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policy)
    backward(model, vit)
    expected = reference(model, "tensor", "max")
    optimizer.step()
    assert factors(optimizer)[zeroed] == 1.0
    assert factors(optimizer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_auto_rgn_steps_are_adams_at_the_scaled_rate(granularity: str, vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 5, "head"]))
    lr, betas, eps, weight_decay = 3e-3, (0.9, 0.99), 1e-8, 0.1
    policy = policies.auto_rgn(granularity=granularity)
    optimizer = create_surgical_optimizer(
        model, ADAMW, lr=lr, weight_decay=weight_decay, policy=policy, betas=betas, eps=eps
    )
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    blocks = BlockMap.find(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().double() for name, p in trained.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, 5):
        backward(model, vit, step)
        scale = reference(model, granularity, "max")
        for name, p in trained.items():
            tensor = name.removeprefix("base_model.model.")
            rate = lr * scale[blocks.block_of(name) if granularity == "block" else tensor]
            gradient = p.grad.double()  # type: ignore[union-attr]
            weights[name] *= 1 - rate * (weight_decay if name in decayed else 0.0)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            moment = second[name] / (1 - betas[1] ** step)
            weights[name] -= rate * first[name] / (1 - betas[0] ** step) / (moment.sqrt() + eps)
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {lr}
        for name, p in trained.items():
            torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_auto_rgn_works_in_other_precisions(dtype: torch.dtype, vit: Toy) -> None:
    """In float64 the norms asked for float32, which torch refuses to narrow to."""
    model = vit.model().to(dtype)
    batch = vit.batch()
    model(pixel_values=batch["pixel_values"].to(dtype), labels=batch["labels"]).loss.backward()
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.auto_rgn())
    expected = reference(model, "block", "max")
    optimizer.step()
    assert factors(optimizer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_factors_stay_where_a_gradient_is_not_finite(bad: float, vit: Toy) -> None:
    """An infinite gradient was taken for a unit that is all zero, and the others were scaled without it."""
    model = vit.model()
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.auto_rgn())
    backward(model, vit)
    optimizer.step()
    before = factors(optimizer)
    assert len(set(before.values())) > 5
    backward(model, vit, 1)
    model.get_parameter("vit.layers.3.mlp.fc1.weight").grad[0, 0] = bad  # type: ignore[index]
    optimizer.step()
    assert factors(optimizer) == before


def test_factors_stay_where_no_gradient_is(vit: Toy) -> None:
    model = vit.model()
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.auto_rgn())
    optimizer.step()
    assert set(factors(optimizer).values()) == {1.0}


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_auto_rgn_reads_from_the_device_once_a_step(
    granularity: str, vit: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    tolist = torch.Tensor.tolist

    class Items(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:  # item(), float(), bool(), if tensor
                reads.append("item")
            return func(*args, **kwargs or {})

    def counted(tensor: torch.Tensor) -> Any:
        reads.append("tolist")
        return tolist(tensor)

    model = vit.model()
    policy = policies.auto_rgn(granularity=granularity)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-2, policy=policy)
    backward(model, vit)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with Items():
        optimizer.step()
    assert reads == ["tolist"]
    assert len(set(factors(optimizer).values())) > 5


@pytest.mark.parametrize(
    "kwargs",
    [{"every": "batch"}, {"granularity": "module"}, {"normalized": "sum"}, {"every": "epoch", "num_batches": 0}],
)
def test_auto_rgn_refuses_unknown_settings(kwargs: dict[str, Any]) -> None:
    with pytest.raises(SurgicalError, match="auto_rgn"):
        policies.auto_rgn(**kwargs)


# ---- auto_rgn, every epoch


@dataclass(frozen=True)
class Ones(Policy):
    """Asks for a probe and leaves every rate as it is."""

    probe_batches: int = 2

    def multipliers_from(self, scores: BlockScores, training: TrainingState) -> dict[str, float]:
        return {unit.name: 1.0 for unit in training.units}


class Noisy:
    """A collator that draws random numbers, as one that masks or augments does."""

    def __call__(self, features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(features)
        batch["pixel_values"] = batch["pixel_values"] + 0.1 * torch.randn_like(batch["pixel_values"])
        return batch


class Recorded(Trainer):
    """Keeps the batches that it trains on."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), inputs["pixel_values"].clone()]
        return super().training_step(model, inputs, *args, **kwargs)


def examples(toy: Toy, count: int = 24) -> list[dict[str, torch.Tensor]]:
    batch = toy.batch(size=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def wrapped_with_dropout(toy: Toy) -> PeftModel:
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0, 5, 9, "head"]))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


def trainer_for(model: nn.Module, policy: Policy | None, path: Any, data: Any, **kwargs: Any) -> Recorded:
    args = TrainingArguments(
        output_dir=str(path),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_steps=15,
        seed=5,
    )
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)}
    return Recorded(model=model, args=args, train_dataset=data, **extra, **kwargs)


def test_probing_changes_neither_batches_nor_weights(vit: Toy, tmp_path: Any) -> None:
    runs = []
    for policy, callbacks in ((Ones(), [SurgicalCallback()]), (None, [])):
        model = wrapped_with_dropout(vit)
        trainer = trainer_for(
            model,
            policy,
            tmp_path,
            examples(vit),
            callbacks=callbacks,
            data_collator=Noisy(),  # type: ignore[arg-type]
        )
        trainer.train()
        runs.append((trainer.seen, [p.detach() for p in model.parameters()]))
    for one, other in zip(*runs, strict=True):
        assert len(one) == len(other) >= 15
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(runs[0][0][0], runs[0][0][6])  # an epoch has 6 batches, shuffled anew


@pytest.mark.parametrize("normalized", ["max", "minmax"])
@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_epoch_factors_are_score_blocks_on_the_documented_batches(
    granularity: str, normalized: str, vit: Toy, tmp_path: Any
) -> None:
    data = examples(vit)
    epochs: list[int] = []
    steps: list[dict[str, float]] = []

    class Check(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epoch = len(epochs)
            generator = torch.Generator().manual_seed(args.seed + epoch)
            loader = DataLoader(
                data,  # type: ignore[arg-type]
                batch_size=4,
                shuffle=True,
                generator=generator,
                collate_fn=default_data_collator,
            )
            model = copy.deepcopy(kwargs["model"])
            scores = score_blocks(model, loader, "rgn", granularity, num_batches=3)
            found = factors(kwargs["optimizer"])
            inside = {unit: scores.values[unit] for unit in found if scores.blocks[unit] != "head"}
            low = min(inside.values()) if normalized == "minmax" else 0.0
            high = max(inside.values())
            expected = {u: (inside[u] - low) / (high - low) if u in inside else 1.0 for u in found}
            assert found == expected
            assert len(inside) == (3 if granularity == "block" else 48)
            epochs.append(epoch)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(factors(kwargs["optimizer"]))

    policy = policies.auto_rgn("epoch", granularity, normalized, num_batches=3)
    callbacks = [SurgicalCallback(), Check()]
    trainer_for(wrapped_with_dropout(vit), policy, tmp_path, data, callbacks=callbacks).train()
    assert epochs == [0, 1, 2]
    assert all(steps[i] == steps[6 * (i // 6)] for i in range(15))
    assert steps[0] != steps[6] != steps[12]


def test_probing_without_the_callback_stops_before_the_first_step(vit: Toy, tmp_path: Any) -> None:
    model = wrapped_with_dropout(vit)
    start = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_for(model, policies.auto_rgn("epoch"), tmp_path, examples(vit))
    with pytest.raises(SurgicalError, match=r"add SurgicalCallback\(\).*auto_rgn\(every='step'\)"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_probing_resumed_without_the_callback_is_refused(vit: Toy) -> None:
    """The epoch of the last probe came back from the checkpoint, and the factors were never renewed."""
    model = wrapped_with_dropout(vit)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.auto_rgn("epoch"))
    state = optimizer.state_dict()
    state["param_groups"][0]["surgical"]["probed"] = 1
    optimizer.load_state_dict(state)
    backward(model, vit)
    with pytest.raises(SurgicalError, match=r"add SurgicalCallback\(\)"):
        optimizer.step()


class Stream(IterableDataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def test_probing_a_stream_is_refused_before_the_first_step(vit: Toy, tmp_path: Any) -> None:
    """torch's IterableDataset has `__getitem__` by inheritance and failed inside DataLoader."""
    model = wrapped_with_dropout(vit)
    start = [p.detach().clone() for p in model.parameters()]
    policy = policies.auto_rgn("epoch")
    trainer = trainer_for(model, policy, tmp_path, Stream(examples(vit)), callbacks=[SurgicalCallback()])
    with pytest.raises(SurgicalError, match=r"\(Stream\).*probe"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_the_callback_leaves_policies_alone_that_do_not_probe(vit: Toy, tmp_path: Any) -> None:
    policy, callbacks = policies.static({0: 0.5}), [SurgicalCallback()]
    trainer = trainer_for(wrapped_with_dropout(vit), policy, tmp_path, examples(vit), callbacks=callbacks)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {group["lr_multiplier"] for group in groups} == {1.0}
    assert groups[0]["surgical"]["probed"] is None


def test_ratios_read_off_the_gradients_are_rgn_of_each_unit(toy: Toy) -> None:
    model = toy.model()
    model(**toy.batch()).loss.backward()
    modules = [module for module in model.modules() if list(module.parameters())]
    units = [Unit(str(at), "0", list(module.parameters())) for at, module in enumerate(modules)]
    for got, unit in zip(gradient_ratios(units), units, strict=True):
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in unit.parameters]
        assert got == pytest.approx(criteria.rgn(unit.parameters, grads), rel=1e-6)


def test_ratios_of_large_units_are_exact() -> None:
    """In one piece, the float32 norm of so many is 0.1 % wrong on the CPU."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(25_000_000))
    weight.grad = torch.randn(25_000_000)
    expected = (weight.grad.double().norm() / weight.double().norm()).item()
    assert gradient_ratios([Unit("0", "0", [weight])])[0] == pytest.approx(expected, rel=1e-6)


def far_apart(dtype: torch.dtype) -> list[Unit]:
    """Two units, one above the size from which the CPU reads tensors in pieces; some gradients strided or missing."""
    torch.manual_seed(0)
    units = []
    for name, width in (("0", 16), ("1", 512)):
        weights = [torch.nn.Parameter(torch.randn(width, 256, dtype=dtype).t()) for _ in range(3)]
        weights[0].grad, weights[1].grad = torch.randn_like(weights[0]), torch.randn(256, width, dtype=dtype)
        units.append(Unit(name, "0", weights))
    units.append(Unit("2", "0", [torch.nn.Parameter(torch.ones(3, dtype=dtype))]))  # no gradient at all
    return units


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("norms_of", [_norms_on_cpu, _norms_in_one_call])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_ways_to_read_norms_are_exact(
    norms_of: Any, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    units = far_apart(dtype)
    near = 1e-6 if dtype.itemsize > 2 else 1e-5
    expected = []
    for unit in units:
        for tensors in (unit.parameters, [p.grad for p in unit.parameters if p.grad is not None]):
            expected.append(math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors)))
    with torch.no_grad():
        assert norms_of(units) == pytest.approx(expected, rel=near)


@pytest.mark.parametrize("sizes", [[], [3], [2**15 - 1], [2**15], [2**14] * 5, [1, 2**16, 1, 2, 2**15 - 3, 1]])
def test_runs_are_short_and_hold_everything_in_order(sizes: list[int]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    runs = Unit("0", "0", parameters).runs
    assert [id(each) for run in runs for each in run] == [id(each) for each in parameters]
    assert all(len(run) == 1 or sum(each.numel() for each in run) < 2**15 for run in runs)
    assert all(sum(each.numel() for each in one + other[:1]) >= 2**15 for one, other in itertools.pairwise(runs))


def test_units_of_several_precisions_are_read_together() -> None:
    units = far_apart(torch.float64)[:1] + far_apart(torch.bfloat16)[1:]
    alone = [gradient_ratios([unit])[0] for unit in units]
    assert gradient_ratios(units) == pytest.approx(alone, rel=1e-6)
    assert gradient_ratios(units[::-1]) == pytest.approx(alone[::-1], rel=1e-6)
    assert alone[-1] == 0.0


def test_ratios_follow_a_parameter_whose_data_is_replaced() -> None:
    unit = far_apart(torch.float32)[0]
    before = gradient_ratios([unit])[0]
    for weight in unit.parameters:
        weight.data = 2 * weight.data
    assert gradient_ratios([unit])[0] == pytest.approx(before / 2, rel=1e-6)
    assert torch.is_grad_enabled()
