"""`misa` against a plain loop: importance, the order of the draws, and the share that is trained."""

from __future__ import annotations

import math
import random

import pytest
import torch

from surgical_peft import BlockMap, create_surgical_optimizer, policies
from tests.support.steps import backward
from tests.support.toys import Toy


@pytest.mark.parametrize(("eta", "hard"), [(1.0, True), (200.0, False)])
def test_misa_equals_a_plain_loop(eta: float, hard: bool, vit: Toy) -> None:
    every, share, seed = 3, 0.2, 5
    model = vit.model().train()
    blocks = BlockMap.find(model)
    sizes = {name: p.numel() for name, p in model.named_parameters() if blocks.block_of(name).isdigit() and p.ndim > 1}
    head = {name for name, _ in model.named_parameters() if blocks.block_of(name) == "head"}
    room = share * sum(p.numel() for p in model.parameters())
    policy = policies.misa(share=share, every=every, eta=eta, seed=seed, hard=hard)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policy)

    mean = dict.fromkeys(sizes, 0.0)
    times = dict.fromkeys(sizes, 0)
    importance = dict.fromkeys(sizes, 0.0)
    seen: dict[str, list[float]] = {}
    last = dict.fromkeys(sizes, -1)
    warm, draws = 0, 0
    for step in range(24):
        if step % every == 0 or -1 in last.values():
            warm += -1 in last.values()
            draws += 1
            for name, values in seen.items():
                mean[name] = 0.8 * mean[name] + 0.2 * sum(values) / len(values)
                times[name] += 1
                importance[name] = mean[name] / (1 - 0.8 ** times[name])
            seen, drawn, taken = {}, [], 0
            population = {name: math.exp(min(5.0, eta * g * g)) for name, g in importance.items()}
            chance = random.Random(f"{seed} {step}")
            queue = sorted(sizes, key=last.__getitem__)
            queue = [name for at, name in enumerate(queue) if last[name] == -1 or at < 2]
            while population:
                name = queue.pop(0) if queue else chance.choices(list(population), list(population.values()))[0]
                del population[name]
                if taken + sizes[name] <= room:
                    taken += sizes[name]
                    drawn.append(name)
            last |= dict.fromkeys(drawn, step)
        state = optimizer.block_rates.training_state(optimizer)  # type: ignore[attr-defined]
        assert state.scores == pytest.approx({name: g for name, g in importance.items() if g}, rel=1e-6)
        on = {group["unit"] for group in optimizer.param_groups if group["lr_multiplier"] > 0}
        assert on == {*drawn, *head}
        assert 0.5 * room < sum(sizes[name] for name in drawn) <= room
        backward(model, vit, step)
        for name in drawn:
            grad = model.get_parameter(name).grad
            assert grad is not None
            seen.setdefault(name, []).append(float(grad.double().norm()))
        optimizer.step()
    assert 4 < warm < draws < 20  # all were trained once, then every third step


def test_a_share_of_all_trains_every_matrix_and_no_vector(vit: Toy) -> None:
    model = vit.model().train()
    policy = policies.misa(share=1.0, always=["embeddings"])
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policy)
    blocks = BlockMap.find(model)
    for group in optimizer.param_groups:
        block = blocks.block_of(group["unit"])
        expected = block == "embeddings" or (block.isdigit() and group["params"][0].ndim > 1)
        assert (group["lr_multiplier"] > 0) is expected, group["unit"]
