"""Groups, rates and state of the optimizer; with Trainer, accelerate and plain loops."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator, trainer_optimizer
from transformers.training_args import OptimizerNames

from surgical_peft import (
    BlockMap,
    SurgicalCallback,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    policies,
    surgical_optimizer,
)
from surgical_peft.policies.auto_rgn import AutoRGN
from surgical_peft.policies.policy import Policy, TrainingState
from tests.support.steps import backward, used_rates
from tests.support.toys import TOYS, Toy

ADAMW = torch.optim.AdamW


class Scripted(Policy):
    """A policy that gives each step the factors that the test says."""

    def __init__(self, *script: dict[str, float]) -> None:
        super().__init__()
        object.__setattr__(self, "script", iter(script))

    def step_multipliers(self, run: TrainingState) -> dict[str, float] | None:
        return next(self.script)  # type: ignore[attr-defined]


class DecayedRGN(AutoRGN):
    """Constant factors and changing ones in one policy."""

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        return policies.layer_decay(0.9).base_multipliers(blocks)


def wrapped(toy: Toy) -> PeftModel:
    return get_peft_model(toy.model(), SurgicalConfig(blocks=[toy.first, toy.last]))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, toy: Toy, steps: int) -> nn.Module:
    model.train()
    for step in range(steps):
        backward(model, toy, step)
        optimizer.step()
    return model


def trainers_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the two groups that `Trainer.create_optimizer` makes."""
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return ADAMW(groups, lr=lr)


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    assert pairs
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name


def arguments(path: Any, **kwargs: Any) -> TrainingArguments:
    defaults = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 4, "logging_strategy": "no", "learning_rate": 1e-2}
    return TrainingArguments(output_dir=str(path), **{**defaults, **kwargs})


def examples(toy: Toy, count: int = 24) -> list[dict[str, torch.Tensor]]:
    batch = toy.batch(size=count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


# ---- all factors 1, and what is frozen


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
@pytest.mark.parametrize("make", [Toy.model, wrapped], ids=["bare", "wrapped"])
def test_factors_of_one_are_bitwise_adamw(make: Any, name: str, weight_decay: float) -> None:
    toy = TOYS[name]
    reference = make(toy)
    train(reference, trainers_adamw(reference, 1e-2, weight_decay), toy, 20)
    for policy in (None, policies.static(), policies.static({"all": 1.0})):
        model = make(toy)
        optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, weight_decay=weight_decay, policy=policy)
        assert_equal_weights(train(model, optimizer, toy, 20), reference)


def test_frozen_parameters_stay_and_have_no_state(toy: Toy) -> None:
    model = wrapped(toy)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, weight_decay=0.1, policy=policies.auto_rgn())
    train(model, optimizer, toy, 3)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert frozen and trained
    assert all(torch.equal(p, start[name]) for name, p in frozen.items())
    assert all(p.grad is None for p in frozen.values())
    assert set(optimizer.state) <= set(trained)
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_trainer_with_no_policy_ends_bitwise_as_without_us(vit: Toy, tmp_path: Any) -> None:
    ends = []
    for ours in (True, False):
        model = wrapped(vit)
        args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, weight_decay=0.1, warmup_steps=2)
        extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args)} if ours else {}
        Trainer(model=model, args=args, train_dataset=examples(vit), **extra).train()
        ends.append(model)
    assert_equal_weights(*ends)


def test_weight_decay_in_optim_args_means_what_it_means_to_trainer(vit: Toy, tmp_path: Any) -> None:
    """Trainer's groups set weight_decay themselves, so `optim_args` does not; ours once did."""
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9,weight_decay=0.5", weight_decay=0.1)
    plain = Trainer(model=vit.model(), args=args).create_optimizer()
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args)}
    ours = Trainer(model=vit.model(), args=args, **extra).create_optimizer()
    assert {g["weight_decay"] for g in ours.param_groups} == {g["weight_decay"] for g in plain.param_groups}
    assert {g["momentum"] for g in ours.param_groups} == {0.9}


# ---- groups


@pytest.mark.parametrize("granularity", ["block", "tensor"])
@pytest.mark.parametrize("make", [Toy.model, wrapped], ids=["bare", "wrapped"])
def test_groups_partition_what_is_trained(make: Any, granularity: str, toy: Toy) -> None:
    model = make(toy)
    policy = policies.auto_rgn(granularity=granularity)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, weight_decay=0.1, policy=policy)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(names)
    blocks, decayed = BlockMap.find(model), Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["block"] == blocks.block_of(name)
            tensor = name.removeprefix("base_model.model.")
            assert group["unit"] == (group["block"] if granularity == "block" else tensor)
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0)
    units = {(group["unit"], group["weight_decay"]) for group in optimizer.param_groups}
    assert len(units) == len(optimizer.param_groups)
    trained = {toy.first, toy.last} if make is wrapped else set(toy.blocks)
    assert {group["block"] for group in optimizer.param_groups} == trained


def test_nothing_to_train_is_refused(vit: Toy) -> None:
    with pytest.raises(SurgicalError, match="nothing to train"):
        create_surgical_optimizer(vit.model().requires_grad_(False), ADAMW, lr=1e-2)


@pytest.mark.parametrize("granularity", ["block", "tensor"])
@pytest.mark.parametrize("container", [torch.compile, nn.DataParallel])
def test_containers_do_not_change_the_groups(container: Any, granularity: str, vit: Toy) -> None:
    def described(model: nn.Module) -> list[tuple[Any, ...]]:
        policy = policies.auto_rgn(granularity=granularity)
        groups = create_surgical_optimizer(model, ADAMW, lr=1e-2, weight_decay=0.1, policy=policy).param_groups
        return [(g["unit"], g["block"], g["weight_decay"], [id(p) for p in g["params"]]) for g in groups]

    model = wrapped(vit)
    assert described(container(model)) == described(model)


# ---- the factor in a step, and the rate after it


def test_a_step_uses_rate_times_factor_and_puts_the_rate_back(vit: Toy) -> None:
    model = wrapped(vit)
    lr = 0.1 + 0.2  # not a short decimal: a quotient would show
    optimizer = create_surgical_optimizer(
        model, torch.optim.SGD, lr=lr, policy=Scripted({"0": 0.3, "11": 0.7}, {"11": 0.0})
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, factors in enumerate(({"0": 0.3, "11": 0.7}, {"0": 0.3, "11": 0.0})):
        backward(model, vit, step)
        blocks = BlockMap.find(model)
        trained = [(blocks.block_of(name), p) for name, p in model.named_parameters() if p.requires_grad]
        expected = [p.detach().add(p.grad, alpha=-lr * factors[block]) for block, p in trained]
        optimizer.step()
        assert all(torch.equal(p, q) for (_, p), q in zip(trained, expected, strict=True))
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))


def test_a_step_that_raises_does_not_scale_the_next(vit: Toy) -> None:
    """The post hook does not run then: factors of later steps were multiplied on top."""
    model = wrapped(vit)
    optimizer = create_surgical_optimizer(
        model, torch.optim.SGD, lr=0.5, policy=Scripted({"0": 0.5}, {"0": 0.5}, {"0": 0.5})
    )

    def broken() -> float:
        raise RuntimeError("no loss")

    backward(model, vit)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no loss"):
            optimizer.step(broken)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.extend(g["lr"] for g in o.param_groups if g["unit"] == "0"))
    optimizer.step()
    assert set(seen) == {0.25}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_a_rate_that_a_scheduler_set_after_a_failed_step_stays(vit: Toy) -> None:
    model = wrapped(vit)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.5, policy=Scripted({"0": 0.5}, {"0": 0.5}))
    backward(model, vit)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


def test_rates_that_are_tensors_work(vit: Toy) -> None:
    model = wrapped(vit)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=torch.tensor(1e-2), policy=policies.auto_rgn())  # type: ignore[arg-type]
    train(model, optimizer, vit, 2)
    assert all(torch.equal(group["lr"], torch.tensor(1e-2)) for group in optimizer.param_groups)


def test_masked_blocks_cost_no_call_and_factors_no_transfer(vit: Toy) -> None:
    def calls(optimizer: torch.optim.Optimizer) -> dict[str, int]:
        with torch.profiler.profile() as profile:
            optimizer.step()
        return {event.key: event.count for event in profile.key_averages()}

    model = vit.model().train()
    settings: dict[str, Any] = {"lr": torch.tensor(0.1), "fused": True}
    optimizer = create_surgical_optimizer(model, ADAMW, policy=policies.badam(always=[]), **settings)
    backward(model, vit, 0)
    ours = calls(optimizer)
    trained = [{"params": group["params"]} for group in optimizer.param_groups if group["lr_multiplier"]]
    plain = calls(ADAMW(trained, **settings))
    assert ours["aten::_fused_adamw_"] == len(trained) < len(optimizer.param_groups)
    for name in ("aten::_fused_adamw_", "aten::_local_scalar_dense"):
        assert ours[name] == plain[name]


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_a_factor_out_of_range_is_refused_and_changes_nothing(factor: float, vit: Toy) -> None:
    model = wrapped(vit)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=Scripted({"0": 0.5, "11": factor}))
    backward(model, vit)
    with pytest.raises(SurgicalError, match="'11'"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert {(group["lr"], group["lr_multiplier"]) for group in optimizer.param_groups} == {(1e-2, 1.0)}


def test_a_factor_for_a_unit_that_is_not_trained_is_refused(vit: Toy) -> None:
    """It was dropped without a word: a policy with the wrong names trained everything at the full rate."""
    model = wrapped(vit)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=Scripted({"3": 0.5}))
    backward(model, vit)
    with pytest.raises(SurgicalError, match=r"'3' .*0, 11"):
        optimizer.step()


def test_a_constant_factor_for_a_block_that_does_not_exist_is_refused(vit: Toy) -> None:
    class Misnamed(Policy):
        def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
            return {"layers.0": 0.5}

    with pytest.raises(SurgicalError, match=r"'layers.0'.*ViT.*embeddings, 0, 1"):
        create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2, policy=Misnamed())


def test_a_policy_that_was_not_called_is_refused(vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=r"policies.auto_rgn\(\)"):
        create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2, policy=policies.auto_rgn)  # type: ignore[arg-type]


# ---- checkpoints


def test_state_of_another_policy_is_refused(vit: Toy) -> None:
    saved = create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2, policy=policies.auto_rgn()).state_dict()
    other = create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2, policy=policies.layer_decay(0.5))
    with pytest.raises(SurgicalError, match=r"AutoRGN\(.*LayerDecay\(.*decay=0.5"):
        other.load_state_dict(saved)


def test_state_of_a_plain_optimizer_is_refused(vit: Toy) -> None:
    saved = trainers_adamw(wrapped(vit), 1e-2, 0.0).state_dict()
    with pytest.raises(SurgicalError, match="another optimizer"):
        create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2).load_state_dict(saved)


def test_state_of_other_blocks_is_refused(vit: Toy) -> None:
    """Blocks are of one shape, so torch loads the moments and the unit names of the wrong ones."""
    one, two = (
        create_surgical_optimizer(get_peft_model(vit.model(), SurgicalConfig(blocks=blocks)), ADAMW, lr=1e-2)
        for blocks in ([0, 1], [0, 2])
    )
    with pytest.raises(SurgicalError, match=r"blocks 0, 1,.*blocks 0, 2"):
        two.load_state_dict(one.state_dict())


def test_a_refused_state_changes_nothing(vit: Toy) -> None:
    optimizer = create_surgical_optimizer(wrapped(vit), ADAMW, lr=1e-2)
    before = optimizer.state_dict()
    with pytest.raises(SurgicalError):
        optimizer.load_state_dict(trainers_adamw(wrapped(vit), 1.0, 0.0).state_dict())
    assert optimizer.state_dict() == before


# ---- schedulers and loops


CONSTANT = {
    "static": policies.static({0: 0.1, -1: 3}),
    "layer_decay": policies.layer_decay(0.5),
    "discriminative": policies.discriminative(),
    "layer_decay and auto_rgn": DecayedRGN(),
}
SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=8),
    "cyclic": lambda o: CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=2),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=9),
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=3),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
    "by hand": lambda o: ByHand(o),
}


class ByHand:
    """No scheduler: the loop sets the rate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 / self.steps


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("policy", CONSTANT)
def test_a_constant_factor_holds_whatever_sets_the_rate(policy: str, scheduler: str, vit: Toy) -> None:
    model = wrapped(vit)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=CONSTANT[policy])
    plain = ADAMW([torch.zeros(1, requires_grad=True)], lr=1e-2)
    ours, reference = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
    base = CONSTANT[policy].base_multipliers(BlockMap.find(model))
    told = []
    for step in range(7):
        backward(model, vit, step)
        used = used_rates(optimizer)
        plain.step()
        rate = plain.param_groups[0]["lr"]
        told.append(rate)
        changing = {group["unit"]: group["lr_multiplier"] for group in optimizer.param_groups}
        assert used == pytest.approx({unit: rate * base[unit] * changing[unit] for unit in ("0", "11")}, rel=1e-12)
        assert optimizer.block_rates.used == pytest.approx({unit: used[unit] / rate for unit in used})  # type: ignore[attr-defined]
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        for each in (ours, reference):
            each.step(*((1.0,) if scheduler == "plateau" else ()))
    assert len(set(told)) > 2


def test_a_checkpoint_with_the_constant_factor_in_its_rates_goes_on_as_it_began(vit: Toy) -> None:
    """As versions before wrote them: `lr` and the scheduler's `base_lrs` held the factor."""

    def plain(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        own = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.static({0: 0.3}))
        groups = [{**group, "lr": 1e-2 * group["base_multiplier"]} for group in own.param_groups]
        optimizer = ADAMW(groups, lr=1e-2)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: range) -> None:
        for step in steps:
            backward(model, vit, step)
            optimizer.step()
            scheduler.step()

    reference = wrapped(vit)
    optimizer, scheduler = plain(reference)
    go(reference, optimizer, scheduler, range(3))
    model = wrapped(vit)
    model.load_state_dict(reference.state_dict())
    resumed = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.static({0: 0.3}))
    schedule = LambdaLR(resumed, lambda step: 1 / (1 + step))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("base_multiplier_at_step")
        group["surgical"] = {"step": 3, "epoch": None, "probed": None, "scores": {}, "state": {}}
    resumed.load_state_dict(state)
    schedule.load_state_dict(scheduler.state_dict())
    go(reference, optimizer, scheduler, range(3, 6))
    go(model, resumed, schedule, range(3, 6))
    assert_equal_weights(model, reference)
    assert resumed.block_rates.used == {"0": 0.3, "11": 1.0}  # type: ignore[attr-defined]
    again = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.static({0: 0.3}))
    again.load_state_dict(resumed.state_dict())
    assert used_rates(again) == pytest.approx({"0": 0.3e-2 / 7, "11": 1e-2 / 7})


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_one_cycle_sees_the_rates_it_would_see_without_a_policy(granularity: str, vit: Toy) -> None:
    def rates(policy: Policy | None) -> list[set[float]]:
        model, seen = wrapped(vit), []
        optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policy)
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=6)
        for step in range(6):
            backward(model, vit, step)
            optimizer.step()
            seen.append({group["lr"] for group in optimizer.param_groups})
            scheduler.step() if step < 5 else None
        return seen

    seen = rates(policies.auto_rgn(granularity=granularity))
    assert seen == rates(None)
    assert len({min(s) for s in seen}) == 6


def test_accelerate_loop_applies_the_policy_once_a_real_step(vit: Toy) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    calls: list[int] = []

    class Counted(AutoRGN):
        def step_multipliers(self, run: TrainingState) -> dict[str, float] | None:
            calls.append(len(run.units))
            return super().step_multipliers(run)

    model = wrapped(vit)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=Counted())
    loader = DataLoader(examples(vit), batch_size=4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert calls == [2, 2, 2]
    factors = {group["unit"]: group["lr_multiplier"] for group in optimizer.param_groups}
    assert max(factors.values()) == 1.0
    assert 0 < min(factors.values()) < 1.0
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


# ---- Trainer


def test_trainer_logs_what_it_would_log_without_a_policy(vit: Toy, tmp_path: Any) -> None:
    calls: list[int] = []

    class Counted(AutoRGN):
        def step_multipliers(self, run: TrainingState) -> dict[str, float] | None:
            calls.append(len(run.units))
            return super().step_multipliers(run)

    def logs(policy: Policy | None) -> list[dict[str, float]]:
        args = arguments(
            tmp_path,
            max_steps=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            warmup_steps=3,
            logging_strategy="steps",
            logging_steps=1,
        )
        extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)} if policy else {}
        trainer = Trainer(model=wrapped(vit), args=args, train_dataset=examples(vit), **extra)
        trainer.train()
        return [log for log in trainer.state.log_history if "grad_norm" in log]

    plain, ours = logs(None), logs(Counted())
    assert len(ours) == len(calls) == 8
    assert [log["learning_rate"] for log in ours] == [log["learning_rate"] for log in plain]
    assert len({log["learning_rate"] for log in ours}) > 4
    assert (ours[0]["grad_norm"], ours[0]["loss"]) == (plain[0]["grad_norm"], plain[0]["loss"])
    assert ours[-1]["loss"] != plain[-1]["loss"]


def test_every_optim_of_trainer_steps_or_is_refused_or_not_installed(vit: Toy, tmp_path: Any) -> None:
    ran, refused, unavailable = set(), set(), set()
    for name in OptimizerNames:
        model = wrapped(vit)
        args = arguments(tmp_path, optim=name, optim_target_modules="all-linear", weight_decay=0.1)
        extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policies.auto_rgn())}
        trainer = Trainer(model=model, args=args, **extra)
        try:
            optimizer = trainer.create_optimizer()
        except SurgicalError as error:
            assert repr(name.value) in str(error)
            refused.add(name.value)
            continue
        except (ImportError, ValueError):  # transformers' own words for a package that is not installed
            unavailable.add(name.value)
            continue
        if name.value.startswith("schedule_free"):
            optimizer.train()  # type: ignore[attr-defined]
        start = {key: p.detach().clone() for key, p in model.named_parameters()}
        for step in range(6 if "radam" in name.value else 2):  # RAdam rests for the first five
            backward(model, vit, step)
            optimizer.step()
        changed = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
        assert changed, name
        assert changed <= {key for key, p in model.named_parameters() if p.requires_grad}, name
        factors = {group["lr_multiplier"] for group in optimizer.param_groups}
        assert len(factors) == 2, name
        assert max(factors) == 1.0, name
        assert {round(float(group["lr"]), 6) for group in optimizer.param_groups} == {1e-2}, name
        ran.add(name.value)
    assert len(ran) + len(refused) + len(unavailable) == len(OptimizerNames)
    assert ran >= {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"}
    own_groups = {name.value for name in OptimizerNames if name.value.startswith(("galore", "apollo"))}
    assert not ran & (own_groups | {"lomo", "adalomo"})


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("galore_adamw", "galore_torch"),
        ("galore_adamw_layerwise", "galore_torch"),
        ("apollo_adamw", "apollo_torch"),
        ("lomo", "lomo_optim"),
    ],
)
def test_optims_with_groups_of_their_own_are_refused(
    optim: str, package: str, vit: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor", "APOLLOAdamW", "Lomo", "AdaLomo")
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**dict.fromkeys(classes, ADAMW)))  # type: ignore[arg-type]
    available = f"is_{package.removesuffix('_optim')}_available"
    monkeypatch.setattr(trainer_optimizer, available, lambda: True)
    args = arguments(tmp_path, optim=optim, optim_target_modules="all-linear")
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args)}
    with pytest.raises(SurgicalError, match=f"optim='{optim}'.*adamw_torch"):
        Trainer(model=wrapped(vit), args=args, **extra).create_optimizer()


def test_optimizer_factories_are_refused(vit: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, "sgd", lambda context: (object, {}))
    args = arguments(tmp_path, optim="sgd")
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args)}
    with pytest.raises(SurgicalError, match="parameter groups"):
        Trainer(model=wrapped(vit), args=args, **extra).create_optimizer()


def test_arguments_are_read_when_the_optimizer_is_built(vit: Toy, tmp_path: Any) -> None:
    """`Trainer.hyperparameter_search` changes `args` after the Trainer was made."""
    args = arguments(tmp_path, learning_rate=1.0, weight_decay=0.0)
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policies.static({0: 0.5}))}
    trainer = Trainer(model=wrapped(vit), args=args, **extra)
    args.learning_rate, args.weight_decay, args.optim = 2e-3, 0.3, OptimizerNames.SGD
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert used_rates(optimizer) == {"0": 1e-3, "11": 2e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_callback_without_our_optimizer_is_refused(vit: Toy, tmp_path: Any) -> None:
    args = arguments(tmp_path, max_steps=1)
    trainer = Trainer(
        model=wrapped(vit),
        args=args,
        train_dataset=examples(vit),
        callbacks=[SurgicalCallback()],  # type: ignore[arg-type]
    )
    with pytest.raises(SurgicalError, match="surgical optimizer"):
        trainer.train()


def test_the_trainers_optimizer_takes_no_name_of_a_policy(tmp_path: Any) -> None:
    with pytest.raises(SurgicalError, match="'lisa'"):
        surgical_optimizer(TrainingArguments(str(tmp_path)), policy="lisa")  # type: ignore[arg-type]
