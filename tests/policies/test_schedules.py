"""Policies that choose while training, against plain references; and what a mask is worth."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AlbertConfig,
    AlbertModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)
from transformers.utils import ModelOutput

from surgical_peft import (
    BlockMap,
    SurgicalCallback,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    policies,
    surgical_optimizer,
)
from surgical_peft.policies import ClassBalancedLoss, Stage
from surgical_peft.policies.policy import Policy
from surgical_peft.policies.progressive_freezing import settled
from tests.support.families import FAMILIES
from tests.support.plain import PLAIN, Net
from tests.support.steps import backward, used_rates
from tests.support.toys import TOYS, Toy

ADAMW = torch.optim.AdamW
LAYERS = tuple(map(str, range(12)))


def start(toy: Toy, policy: Policy, **kwargs: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = toy.model().train()
    return model, create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policy, **kwargs)


def on(optimizer: torch.optim.Optimizer) -> set[str]:
    """The units with a factor above 0."""
    return {group["unit"] for group in optimizer.param_groups if group["lr_multiplier"] > 0}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each block in float64, all entries in one vector."""
    groups = BlockMap.find(model).parameters(model)
    return {b: torch.cat([p.grad.double().flatten() for p in ps]) for b, ps in groups.items()}  # type: ignore[union-attr]


# ---- rates by depth


def test_discriminative_divides_by_its_factor_from_block_to_block(vit: Toy) -> None:
    _, optimizer = start(vit, policies.discriminative())
    rates = used_rates(optimizer)
    for below, above in zip(("embeddings", *LAYERS), (*LAYERS, "head"), strict=True):
        assert rates[above] / rates[below] == pytest.approx(2.6)
    assert rates["head"] == rates["final_norm"] == 1e-2


@pytest.mark.parametrize("factor", [0.9, 0, -2.6, math.nan, math.inf])
def test_discriminative_refuses_a_factor_below_one(factor: float) -> None:
    with pytest.raises(SurgicalError, match="factor="):
        policies.discriminative(factor)


# ---- bvg_ls


@pytest.mark.parametrize("num_selected", [1, 3])
def test_bvg_ls_selects_by_the_formula(num_selected: int, vit: Toy) -> None:
    model, optimizer = start(vit, policies.bvg_ls(alpha=0.8, num_selected=num_selected))
    m: dict[str, Any] = {}
    s: dict[str, Any] = {}
    picked = set()
    for t in range(1, 13):
        backward(model, vit, t)
        ratios = {}
        grads = gradients(model)
        grads["head"] = torch.cat([grads.pop("final_norm"), grads["head"]])  # one layer, as in the paper
        for block, g in grads.items():
            m[block] = 0.8 * m.get(block, 0) + 0.2 * g
            s[block] = 0.8 * s.get(block, 0) + 0.2 * g**2
            mean, square = m[block] / (1 - 0.8**t), s[block] / (1 - 0.8**t)
            bias, variance = (mean**2).sum().item(), (square - mean**2).sum().item()
            ratios[block] = bias / max(variance if t > 1 else 0.0, 1e-10)
        optimizer.step()
        scores = optimizer.block_rates.training_state(optimizer).scores  # type: ignore[attr-defined]
        assert scores == pytest.approx({**ratios, "final_norm": ratios["head"]}, rel=1e-3)
        expected = sorted(ratios, key=lambda block: -ratios[block])[:num_selected]
        assert on(optimizer) == {*expected, *({"final_norm"} if "head" in expected else ())}
        picked |= set(expected)
    assert len(picked) > num_selected


def test_bvg_ls_first_takes_the_largest_gradient_and_noise_has_the_known_floor() -> None:
    layers = nn.Module()
    layers.layers = nn.ModuleList([nn.Linear(100, 100, bias=False) for _ in range(2)])
    optimizer = create_surgical_optimizer(layers, torch.optim.SGD, lr=1e-3, policy=policies.bvg_ls())
    torch.manual_seed(0)
    for step in range(100):
        for layer, size in zip(layers.layers, (1.0, 2.0), strict=True):
            layer.weight.grad = size * torch.randn(100, 100)  # type: ignore[union-attr]
        optimizer.step()
        if step == 0:
            assert on(optimizer) == {"1"}
    scores = optimizer.block_rates.training_state(optimizer).scores  # type: ignore[attr-defined]
    floor = 0.1 / 1.8  # (1 - alpha) / (2 alpha): the mean of so many gradients of pure noise is not quite zero
    assert scores == pytest.approx({"0": floor, "1": floor}, rel=0.05)


@pytest.mark.parametrize("momentum", ["accumulate", "masked"])
def test_bvg_ls_momentum_of_resting_blocks(momentum: str, vit: Toy) -> None:
    model = vit.model()
    policy = policies.bvg_ls(momentum=momentum)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-3, policy=policy, momentum=0.9)
    groups = BlockMap.find(model).parameters(model)
    for step in range(4):
        before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters() if step}
        backward(model, vit, step)
        grads = {p: p.grad.clone() for p in model.parameters()}  # type: ignore[union-attr]
        optimizer.step()
        for block, parameters in groups.items():
            for p in parameters:
                buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
                if momentum == "masked" and block not in on(optimizer):
                    assert buffer is None or torch.equal(buffer, before[p])
                elif step and momentum == "accumulate":
                    torch.testing.assert_close(buffer, 0.9 * before[p] + grads[p])
        if momentum == "masked":
            break


def test_bvg_ls_skips_a_step_that_is_not_finite(vit: Toy) -> None:
    model, optimizer = start(vit, policies.bvg_ls())
    backward(model, vit)
    optimizer.step()
    before = on(optimizer), [mean.clone() for mean in optimizer.param_groups[0]["surgical"]["state"]["means"]]
    backward(model, vit, 1)
    model.get_parameter("vit.layers.3.mlp.fc1.weight").grad[0, 0] = math.inf  # type: ignore[index]
    optimizer.step()
    assert on(optimizer) == before[0]
    after = optimizer.param_groups[0]["surgical"]["state"]["means"]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after, strict=True))


# ---- drawn blocks


def drawn(policy: Policy, toy: Toy, steps: int) -> list[set[str]]:
    """What is trained at each step."""
    model, optimizer = start(toy, policy)
    seen = []
    for step in range(steps):
        seen.append({g["unit"] for g in optimizer.param_groups if all(p.requires_grad for p in g["params"])})
        assert seen[-1] == on(optimizer)
        backward(model, toy, step)
        optimizer.step()
    return seen


def test_lisa_draws_layers_uniformly_and_keeps_the_rest(vit: Toy) -> None:
    seen = drawn(policies.lisa(num_blocks=2, every=3), vit, 60)
    outside = {"embeddings", "final_norm", "head"}
    assert all(outside < chosen and len(chosen - outside) == 2 for chosen in seen)
    assert all(seen[step] == seen[step - step % 3] for step in range(60))
    assert {block for chosen in seen for block in chosen} == set(vit.blocks)
    assert seen == drawn(policies.lisa(num_blocks=2, every=3), vit, 60)
    assert seen != drawn(policies.lisa(num_blocks=2, every=3, seed=1), vit, 60)


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_badam_gives_each_layer_its_turn_each_round(order: str, vit: Toy) -> None:
    seen = drawn(policies.badam(every=2, order=order), vit, 48)
    turns = [seen[step] - {"head"} for step in range(0, 48, 2)]
    assert all("head" in chosen and len(chosen) == 2 for chosen in seen)
    assert all(seen[step] == seen[step + 1] for step in range(0, 48, 2))
    for cycle in (turns[:12], turns[12:]):
        assert set().union(*cycle) == set(LAYERS)
        if order != "random":
            assert cycle == [{name} for name in (LAYERS if order == "ascending" else LAYERS[::-1])]
    assert (turns[:12] != turns[12:]) == (order == "random")


def test_badam_always(vit: Toy) -> None:
    assert drawn(policies.badam(order="ascending", always=["embeddings", 0]), vit, 1) == [{"embeddings", "0", "1"}]
    assert drawn(policies.badam(order="ascending", always=[]), vit, 1) == [{"0"}]


def test_sample_by_score_explores_by_gradients_and_settles_on_what_it_drew(vit: Toy) -> None:
    explored = drawn(policies.sample_by_score(2, every=1, epsilon=1.0), vit, 30)
    assert all("head" in chosen and len(chosen) == 3 for chosen in explored)
    policy = policies.sample_by_score(1, every=1, epsilon=0.0)
    model, optimizer = start(vit, policy)
    for step in range(150):
        backward(model, vit, step % 3)
        optimizer.step()
    counts = optimizer.param_groups[0]["surgical"]["state"]["counts"]
    assert sum(counts.values()) == 151
    assert max(counts.values()) > 3 * 151 / 12  # the rich get richer


# ---- one after the other


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("last_to_first", [{"final_norm", "head"}, {"11"}, {"10"}]),
        ("first_to_last", [{"embeddings", "head"}, {"0"}, {"1"}]),
    ],
)
def test_gradual_unfreezing_adds_a_block_each_interval(direction: str, expected: list[set[str]], vit: Toy) -> None:
    seen = drawn(policies.gradual_unfreezing(direction, every=2), vit, 34)
    assert seen[0] == expected[0]
    assert [seen[step] - seen[step - 1] for step in (2, 4)] == expected[1:]
    assert all(one <= other for one, other in itertools.pairwise(seen))
    assert seen[-1] == set(vit.blocks)
    assert len({frozenset(chosen) for chosen in seen}) == 14


def test_progressive_freezing_is_autofreeze(vit: Toy) -> None:
    interval = 3
    model, optimizer = start(vit, policies.progressive_freezing(interval))
    movable = ["embeddings", *LAYERS]
    parameters = BlockMap.find(model).parameters(model)
    active, before, frozen = list(movable), {}, []
    sums: dict[str, list[torch.Tensor]] = {}
    for step in range(18):
        backward(model, vit, step)
        for block in active:
            held = sums.setdefault(block, [torch.zeros_like(p).double() for p in parameters[block]])
            sums[block] = [total + p.grad for total, p in zip(held, parameters[block], strict=True)]
        optimizer.step()
        if (step + 1) % interval == 0:
            now = {block: sum(total.abs().sum().item() for total in sums[block]) for block in active}
            if before:
                eta = {block: abs(before[block] - now[block]) / before[block] for block in active}
                bound = np.median(list(eta.values()))
                while eta[active[0]] < bound:
                    frozen.append(active.pop(0))
            before, sums = now, {}
            assert on(optimizer) == set(vit.blocks) - set(frozen)
        for block in frozen:
            assert all(not p.requires_grad and p not in optimizer.state for p in parameters[block])
    assert len(frozen) > 1
    assert active


def test_stages_follow_one_another_in_steps(vit: Toy) -> None:
    plan = [Stage("head", steps=2, lr_multiplier=4), {"blocks": ["-2:", "head"], "steps": 3}, Stage()]
    model, optimizer = start(vit, policies.stages(plan))
    seen = []
    for step in range(7):
        seen.append({g["unit"]: g["lr_multiplier"] for g in optimizer.param_groups if g["lr_multiplier"]})
        backward(model, vit, step)
        optimizer.step()
    second = dict.fromkeys(("10", "11", "head"), 1.0)
    assert seen == [{"head": 4.0}] * 2 + [second] * 3 + [dict.fromkeys(vit.blocks, 1.0)] * 2


def test_a_stages_loss_is_the_one_that_trains_and_evaluation_keeps_its_own(vit: Toy) -> None:
    loss = ClassBalancedLoss((6, 3, 1))
    model, optimizer = start(vit, policies.stages([Stage(steps=1, loss=loss), Stage()]))
    batch = vit.batch()

    def weighted(logits: torch.Tensor) -> torch.Tensor:
        each = cross_entropy(logits, batch["labels"], reduction="none")
        return (each * torch.tensor([10 / (3 * n) for n in (6, 3, 1)])[batch["labels"]]).mean()

    outputs = model(**batch)
    assert outputs.loss.item() == outputs["loss"].item() == pytest.approx(weighted(outputs.logits).item())
    assert loss(outputs, batch["labels"], num_items_in_batch=8).item() == pytest.approx(
        weighted(outputs.logits).item() / 2
    )
    assert model.eval()(**batch).loss != outputs.loss
    model.train()
    with pytest.raises(SurgicalError, match=r"labels.*compute_loss_func"):
        model(pixel_values=batch["pixel_values"])
    outputs.loss.backward()
    optimizer.step()
    outputs = model(**batch)
    assert outputs.loss.item() == pytest.approx(cross_entropy(outputs.logits, batch["labels"]).item())


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return 3 * cross_entropy(outputs.logits, labels)


def test_a_stages_loss_by_name_and_in_the_policys_text(vit: Toy) -> None:
    policy = policies.stages([Stage("head", steps=1, loss=f"{__name__}:own_loss"), Stage()])
    assert policy == policies.stages([Stage("head", steps=1, loss=own_loss), Stage()])
    assert f"Stage(blocks='head', steps=1, loss={__name__}:own_loss)" in str(policy)
    model, _ = start(vit, policy)
    outputs = model(**vit.batch())
    assert outputs.loss.item() == pytest.approx(3 * cross_entropy(outputs.logits, vit.batch()["labels"]).item())


# ---- what a mask is worth


def wrapped(toy: Toy) -> PeftModel:
    return get_peft_model(toy.model(), SurgicalConfig(blocks="all")).train()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    moments = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in moments if tensor.dim())


@pytest.mark.parametrize("state_policy", ["reset", "keep"])
def test_a_mask_frees_gradients_and_moments(state_policy: str, vit: Toy) -> None:
    model = wrapped(vit)
    policy = policies.badam(every=2, order="ascending", state_policy=state_policy)
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policy)
    sizes = {b: 4 * sum(p.numel() for p in ps) for b, ps in blocks_of(optimizer).items()}
    for step in range(6):
        model.zero_grad()
        model(**vit.batch(step)).loss.backward()
        held = {b for b, ps in blocks_of(optimizer).items() if any(p.grad is not None for p in ps)}
        assert held == {str(step // 2), "head"}
        optimizer.step()
        trained = sizes[str(step // 2)] + sizes["head"]
        if step % 2 == 0:
            kept = sum(sizes[str(n)] for n in range(step // 2)) if state_policy == "keep" else 0
            assert state_bytes(optimizer) == 2 * (trained + kept)
        elif state_policy == "reset":  # at the switch, before the next block has moments
            assert state_bytes(optimizer) == 2 * sizes["head"]


def blocks_of(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    found: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["block"], []).extend(group["params"])
    return found


def test_a_soft_policy_keeps_gradients_and_moments_and_decays_nothing(vit: Toy) -> None:
    model, optimizer = start(vit, policies.lisa(1, every=1, hard=False), weight_decay=0.5)
    backward(model, vit)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resting = set(vit.blocks) - on(optimizer)
    optimizer.step()
    assert len(resting) == 11
    for block, parameters in blocks_of(optimizer).items():
        assert all(p.requires_grad and p in optimizer.state for p in parameters), block
    blocks = BlockMap.find(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (blocks.block_of(name) in resting), name


def test_after_training_all_may_be_trained_again(vit: Toy, tmp_path: Any) -> None:
    model = wrapped(vit)
    candidates = [p for p in model.parameters() if p.requires_grad]
    batch = vit.batch(size=8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=3, save_strategy="no")
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policies.lisa(1, every=1))}
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[SurgicalCallback()], **extra)  # type: ignore[arg-type]
    trainer.create_optimizer()
    assert not all(p.requires_grad for p in candidates)
    trainer.train()
    assert all(p.requires_grad for p in candidates)


# ---- bad input, before the first step


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("auto_snr", {"threshold": 1.5}, "threshold=1.5"),
        ("auto_snr", {"threshold": math.nan}, "threshold=nan"),
        ("auto_snr", {"threshold": 0.5, "criterion": "snrr"}, "'snr'"),
        ("auto_snr", {"threshold": 0.5, "every": "step"}, "auto_snr.*epoch"),
        ("auto_rgn", {"every": 0}, "every=0.*auto_rgn"),
        ("auto_rgn", {"state": "reset"}, "every step"),
        ("badam", {"every": 0}, "every=0"),
        ("badam", {"order": "randm"}, "'random'"),
        ("badam", {"state_policy": "drop"}, "state_policy='drop'.*keep, reset, offload"),
        ("bvg_ls", {"alpha": 1.0}, "alpha=1.0"),
        ("bvg_ls", {"num_selected": 0}, "num_selected=0"),
        ("bvg_ls", {"momentum": "reset"}, "accumulate, masked"),
        ("grass", {"num_blocks": 0}, "num_blocks=0"),
        ("grass", {"refresh": 0}, "refresh=0"),
        ("grass", {"temperature": 0}, "temperature=0"),
        ("grass", {"alpha": 1.5}, r"alpha=1\.5"),
        ("gradual_unfreezing", {"direction": "up"}, "last_to_first, first_to_last"),
        ("gradual_unfreezing", {"every": 0}, "every=0"),
        ("lisa", {"num_blocks": 0}, "num_blocks=0"),
        ("lisa", {"every": True}, "every=True"),
        ("lp_ft", {"epochs": 0}, "epochs=0"),
        ("misa", {"share": 0}, "share=0"),
        ("misa", {"eta": -1}, "eta=-1"),
        ("misa", {"state_policy": "drop"}, "state_policy='drop'"),
        ("progressive_freezing", {"interval": 0}, "interval=0"),
        ("progressive_freezing", {"percentile": 101}, "percentile=101"),
        ("sample_by_score", {"epsilon": -0.1}, "epsilon=-0.1"),
        ("stages", {"plan": []}, "has no stage"),
        ("stages", {"plan": [{}, {}]}, "stage 1"),
        ("stages", {"plan": [{"epochs": 1}, {"steps": 1}]}, "epochs or in steps"),
        ("stages", {"plan": [{"epochs": 1, "steps": 1}]}, "one of the two"),
        ("stages", {"plan": [{"block": 0}]}, "'blocks'"),
        ("stages", {"plan": [{"lr_multiplier": -1.0}]}, "lr_multiplier=-1.0"),
        ("stages", {"plan": [{"lr_multiplier": math.nan}]}, "lr_multiplier=nan"),
        ("stages", {"plan": [{"loss": "no_such"}]}, "'no_such'.*losses"),
        ("stages", {"plan": ["head"]}, "'head'.*stage"),
        ("two_stage", {"counts": [5, 0], "epochs": 1}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SurgicalError, match=words):
        getattr(policies, name)(**settings)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "0.1", True, -1.0, [0.5]])
@pytest.mark.parametrize(
    "make",
    {
        "static": lambda bad: policies.static({"head": bad}),
        "layer_decay": policies.layer_decay,
        "discriminative": policies.discriminative,
        "stage": lambda bad: policies.stages([Stage(lr_multiplier=bad)]),
        "lp_ft": lambda bad: policies.lp_ft(epochs=1, lr_multiplier=bad),
        "two_stage": lambda bad: policies.two_stage([3, 2, 1], epochs=1, lr_multiplier=bad),
        "auto_snr": lambda bad: policies.auto_snr(bad),
        "bvg_ls": policies.bvg_ls,
        "progressive_freezing": lambda bad: policies.progressive_freezing(percentile=bad),
        "sample_by_score": lambda bad: policies.sample_by_score(epsilon=bad),
        "grass": lambda bad: policies.grass(temperature=bad),
        "misa": lambda bad: policies.misa(share=bad),
        "a user's own": lambda bad: Given({"head": bad}),
        "a user's own, constant": lambda bad: Given(base={"head": bad}),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_no_rate_is_refused(make: tuple[str, Any], bad: Any, vit: Toy) -> None:
    with pytest.raises(SurgicalError) as refused:
        start(vit, make[1](bad))
    assert repr(bad) in str(refused.value)


class Given(Policy):
    """Gives the factors that the test says."""

    def __init__(self, factors: Any = None, base: Any = None) -> None:
        super().__init__()
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "base", base)

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        return self.base or {}  # type: ignore[attr-defined]

    def plan(self, run: Any) -> dict[str, float] | None:
        return self.factors  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (policies.grass(num_blocks=13), "num_blocks=13.*grass.*12 repeated"),
        (policies.misa(share=0.01), r"share=0\.01.*layers\.\d+\..*0\.0\d+ or more"),
        (policies.misa(always=["0:"]), "misa"),
        (policies.lisa(num_blocks=13), "num_blocks=13.*lisa.*12 repeated"),
        (policies.sample_by_score(num_blocks=13), "num_blocks=13.*sample_by_score"),
        (policies.bvg_ls(num_selected=16), "num_selected=16.*14 blocks"),
        (policies.badam(always=["heads"]), "'heads'"),
        (policies.stages([Stage("head", steps=1), Stage([12])]), "block 12 "),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_refused_when_the_optimizer_is_made(
    policy: Policy, words: str, vit: Toy
) -> None:
    with pytest.raises(SurgicalError, match=words):
        start(vit, policy)


def test_a_stage_of_what_is_not_tuned_is_refused(vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 5]))
    with pytest.raises(SurgicalError, match=r"'head'.*0, 5"):
        create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.lp_ft(epochs=1))


def test_epochs_without_the_callback_are_refused_before_the_first_step(vit: Toy) -> None:
    model, optimizer = start(vit, policies.gradual_unfreezing())
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, vit)
    with pytest.raises(SurgicalError, match=r"counts epochs.*add SurgicalCallback\(\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("policy", "length", "words"),
    [
        (
            policies.lp_ft(epochs=2),
            {"num_train_epochs": 2},
            "blocks='head', epochs=2.*after 2 epochs",
        ),
        (policies.lp_ft(epochs=2), {"max_steps": 4}, "after 2 epochs"),
        (
            policies.two_stage([2, 3, 1], epochs=9),
            {"num_train_epochs": 3},
            "begins after 9 epochs.*Shorten the stages",
        ),
        (policies.stages([Stage("head", steps=6), Stage()]), {"num_train_epochs": 3}, "after 6 steps"),
    ],
)
def test_a_stage_that_would_never_be_reached(
    policy: Policy, length: dict[str, int], words: str, vit: Toy, tmp_path: Any
) -> None:
    """LP-FT was the head alone then, and everything said that the whole model had been tuned."""
    batch = vit.batch(size=8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]

    def train(**length: Any) -> None:
        args = TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, save_strategy="no", per_device_train_batch_size=4, **length
        )
        extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)}
        model = vit.model()
        before = [p.detach().clone() for p in model.parameters()]
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[SurgicalCallback()], **extra)  # type: ignore[arg-type]
        try:
            trainer.train()
        except SurgicalError:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            raise

    with pytest.raises(SurgicalError, match=words):
        train(**length)
    name, number = next(iter(length.items()))
    train(**{name: 10 if policy.own_loss else number + 1})


def test_a_threshold_that_freezes_everything_names_the_highest_score(vit: Toy, tmp_path: Any) -> None:
    batch = vit.batch(size=8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=3, save_strategy="no")
    policy = policies.auto_snr(1e6, criterion="grad_norm", granularity="block", normalized=None)
    extra = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)}
    model = wrapped(TOYS["vit"])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(SurgicalError, match=r"threshold=1000000.0 .*grad_norm is [\d.]+ \("):
        Trainer(model=model, args=args, train_dataset=data, callbacks=[SurgicalCallback()], **extra).train()  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_mask_outlives_a_look_at_the_disabled_adapter() -> None:
    """PEFT sets `requires_grad` anew when an adapter is enabled again, e.g. after DPO's reference."""
    toy = TOYS["llama"]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0, 1, 2])).train()
    optimizer = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.lisa(num_blocks=1, every=100))
    masked = [
        parameter for group in optimizer.param_groups if not group["lr_multiplier"] for parameter in group["params"]
    ]
    for seed in range(2):
        with model.disable_adapter(), torch.no_grad():
            model(**toy.batch(seed))
        backward(model, toy, seed)
        optimizer.step()
        assert masked and not any(parameter.requires_grad or parameter in optimizer.state for parameter in masked)


# ---- heads that a loss does not reach

BERT = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**BERT, "image_size": 8, "patch_size": 4}
ENCODERS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**BERT)),
    "albert": lambda: AlbertModel(AlbertConfig(**BERT, embedding_size=8)),
    "vit": lambda: ViTModel(ViTConfig(**VISION)),
    "beit": lambda: BeitModel(BeitConfig(**VISION)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_channels=3)
    ),
    "sentence": lambda: Sentences(),
}


class Sentences(nn.Module):
    """As a SentenceTransformer: takes a dict of features, and pools itself."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = BertModel(BertConfig(**BERT))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        hidden = self.auto_model(input_ids=features["input_ids"]).last_hidden_state
        return {"sentence_embedding": hidden.mean(1)}


def encoded(model: nn.Module) -> Any:
    if isinstance(model, Sentences):
        return model({"input_ids": torch.tensor([[3, 4, 5]])})
    images = hasattr(model.config, "num_channels")  # type: ignore[union-attr]
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)} if images else {"input_ids": torch.tensor([[3, 4, 5]])}
    return model(**inputs)


@pytest.mark.parametrize("direction", ["last_to_first", "first_to_last"])
@pytest.mark.parametrize("output", ["last_hidden_state", "pooler_output"])
@pytest.mark.parametrize("name", ENCODERS)
def test_gradual_unfreezing_of_a_bare_encoder_trains_what_the_loss_reaches(
    name: str, output: str, direction: str
) -> None:
    model = ENCODERS[name]().train()
    optimizer = create_surgical_optimizer(
        model, ADAMW, lr=1e-3, policy=policies.gradual_unfreezing(direction, every=1, hard=True)
    )
    seen = []
    for _ in range(5):
        seen.append(on(optimizer))
        encoded(model)["sentence_embedding" if name == "sentence" else output].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(one <= other for one, other in itertools.pairwise(seen))
    assert seen[0] != seen[-1] == {group["unit"] for group in optimizer.param_groups}


@pytest.mark.parametrize("policy", [policies.lp_ft(epochs=1), policies.stages([Stage("head", steps=1), Stage()])])
@pytest.mark.parametrize("name", ["bert", "vit", "sentence"])
def test_a_pooler_is_no_head_to_train_alone(name: str, policy: Policy) -> None:
    with pytest.raises(SurgicalError, match="pooler"):
        create_surgical_optimizer(ENCODERS[name](), ADAMW, lr=1e-3, policy=policy)


def test_a_pooler_beside_a_block_or_before_a_classifier_is_trained() -> None:
    policy = policies.stages([Stage([-1, "head"], steps=1), Stage()])
    assert on(create_surgical_optimizer(ENCODERS["bert"](), ADAMW, lr=1e-3, policy=policy)) == {"2", "head"}
    classifier, optimizer = start(TOYS["bert"], policies.gradual_unfreezing(every=1))
    assert on(optimizer) == {"head"}
    backward(classifier, TOYS["bert"])
    clip = FAMILIES["clip"]
    model, optimizer = start(clip, policies.gradual_unfreezing(every=1))
    assert on(optimizer) == {"vision_model.final_norm", "head"}  # which is its projections
    backward(model, clip)
    optimizer.step()


def test_a_loss_that_reaches_nothing_that_a_stage_trains_is_told() -> None:
    class Cut(Net):
        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
            hidden = self.layers[0](self.stem(inputs))
            logits = self.head(hidden.mean(1))
            return ModelOutput(logits=logits, loss=cross_entropy(logits, labels))

    model = Cut(*[nn.Linear(8, 8) for _ in range(3)]).train()
    batch = PLAIN["lstm"].batch()
    optimizer = create_surgical_optimizer(
        model, ADAMW, lr=1e-3, policy=policies.stages([Stage([1, 2], steps=1), Stage()])
    )
    with pytest.raises(SurgicalError, match="does not depend"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    del optimizer
    model.train()(**batch).loss.backward()


def test_a_loss_of_a_later_stage_is_missed_before_the_first_step(vit: Toy) -> None:
    """The first stage was trained, and the labels were missed when the second began."""
    model, _optimizer = start(vit, policies.stages([Stage(steps=1), Stage(loss=own_loss)]))
    with pytest.raises(SurgicalError, match="labels"):
        model(pixel_values=vit.batch()["pixel_values"])
    with pytest.raises(SurgicalError, match="tuple"):
        model(**vit.batch(), return_dict=False)


def test_a_mask_is_not_lifted_off_an_adapter_that_is_parked() -> None:
    toy = TOYS["llama"]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0, 1, 2])).train()
    first: Any = create_surgical_optimizer(model, ADAMW, lr=1e-2, policy=policies.lisa(num_blocks=1, every=1))
    masked = [p.requires_grad for group in first.param_groups for p in group["params"]]
    model.add_adapter("other", SurgicalConfig(blocks=[0]))
    model.set_adapter("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    second = create_surgical_optimizer(model, ADAMW, lr=1e-2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert sum(len(group["params"]) for group in second.param_groups) == len(trained)
    model.set_adapter("default")
    assert [p.requires_grad for group in first.param_groups for p in group["params"]] == masked
    model.set_adapter("other")
    first.block_rates.release()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("default")
    assert all(p.requires_grad for group in first.param_groups for p in group["params"])


def test_a_reference_pass_with_the_adapter_disabled_is_let_through(vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 1, "head"])).train()
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(1))
    loss = model(**vit.batch()).loss
    with model.disable_adapter():
        reference = model(**vit.batch()).loss
    assert not reference.requires_grad
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_the_model_is_none_of_the_policys(through: Any, vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 1, "head"])).train()
    policy = policies.two_stage(counts=[3, 2, 1], epochs=1)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policy)
    copied = through(model).requires_grad_(False)
    batch = {**vit.batch(), "labels": None}
    assert copied(**batch).loss is None  # whose loss would need the labels
    with pytest.raises(SurgicalError, match="labels"):
        model(**batch)
    del optimizer


def test_progressive_freezing_freezes_nothing_by_a_gradient_that_is_no_number() -> None:
    """It ended in StopIteration."""
    changes = {"0": 0.1, "1": float("nan"), "2": 0.3}
    assert settled(changes, 50) == []
    assert settled({**changes, "1": 0.2}, 50) == ["0"]
