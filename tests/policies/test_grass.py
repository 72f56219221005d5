"""`grass` against a plain loop: mean gradient norms, their refreshing, and the draws."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from surgical_peft import BlockMap, SurgicalError, create_surgical_optimizer, policies, score_blocks
from surgical_peft.policies.grass import in_order_of_draws
from tests.support.steps import backward
from tests.support.toys import Toy


def mean_square_root(parameters: list[nn.Parameter], grads: list[torch.Tensor]) -> float:
    squares = sum(float(grad.double().square().sum()) for grad in grads)
    return math.sqrt(squares / sum(parameter.numel() for parameter in parameters))


@pytest.mark.parametrize("hard", [True, False])
def test_grass_equals_a_plain_loop(hard: bool, vit: Toy) -> None:
    every, refresh, alpha, tau, seed = 2, 3, 0.3, 0.5, 7
    policy = policies.grass(
        num_blocks=3, every=every, refresh=refresh, alpha=alpha, temperature=tau, seed=seed, hard=hard
    )
    model = vit.model().train()
    layers = {name: ps for name, ps in BlockMap.find(model).parameters(model).items() if name.isdigit()}
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policy)
    assert all(parameter.requires_grad for parameter in model.parameters())

    batches = [vit.batch(50 + at) for at in range(policy.num_batches)]
    probed: dict[str, list[float]] = {name: [] for name in layers}
    for batch in batches:
        loss = model.eval()(**batch).loss
        for name, parameters in layers.items():
            probed[name].append(mean_square_root(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)))
    norms = {name: sum(values) / len(values) for name, values in probed.items()}

    rates = optimizer.block_rates  # type: ignore[attr-defined]
    rates.has_callback = True  # whose part in this is played here
    scores = score_blocks(model.train(), batches, policy.criterion, num_batches=policy.num_batches)
    rates.set_multipliers(optimizer, policy.multipliers_from(scores, rates.training_state(optimizer)))

    seen: dict[str, list[float]] = {}
    for step in range(12):
        if step % refresh == 0:
            for name, values in seen.items():
                norms[name] = alpha * sum(values) / len(values) + (1 - alpha) * norms[name]
            seen = {}
        if step % every == 0:
            mean = sum(norms.values()) / 12
            left = {name: math.exp(norm / (tau * mean)) for name, norm in norms.items()}
            chance, drawn = random.Random(f"{seed} {step}"), []
            for _ in range(3):
                drawn += chance.choices(list(left), list(left.values()))
                del left[drawn[-1]]
        assert rates.training_state(optimizer).state["norms"] == pytest.approx(norms, rel=1e-6)
        on = {group["unit"] for group in optimizer.param_groups if group["lr_multiplier"] > 0}
        assert on == {*drawn, "embeddings", "final_norm", "head"}
        backward(model, vit, step)
        for name in drawn:
            grads = [parameter.grad for parameter in layers[name]]
            assert all(grad is not None for grad in grads)
            seen.setdefault(name, []).append(mean_square_root(layers[name], grads))  # type: ignore[arg-type]
        optimizer.step()


def test_a_training_that_goes_on_without_the_first_norms_is_refused(vit: Toy) -> None:
    model = vit.model().train()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policies.grass())
    backward(model, vit)
    with pytest.raises(SurgicalError, match="SurgicalCallback"):
        optimizer.step()
    optimizer.block_rates.has_callback = True  # type: ignore[attr-defined]
    with pytest.raises(SurgicalError, match="optimizer's state"):
        optimizer.step()


def test_what_is_too_small_to_tell_apart_is_drawn_all_the_same() -> None:
    orders = [in_order_of_draws({"a": 1.0, "b": 0.0, "c": 0.0}, random.Random(seed)) for seed in range(20)]
    assert all(order[0] == "a" and sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[1] for order in orders} == {"b", "c"}
    firsts = [in_order_of_draws({"a": 3.0, "b": 1.0}, random.Random(seed))[0] for seed in range(400)]
    assert 270 < firsts.count("a") < 330
