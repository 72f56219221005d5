"""What choosing costs: within its budget whatever that is, counted alike everywhere, told before and after."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError, criteria, get_surgical_model, score_blocks
from surgical_peft.auto import choose_blocks
from surgical_peft.criteria.budget import FORWARD, GRADIENTS, READING, Budget
from surgical_peft.criteria.criterion import of_model
from surgical_peft.criteria.short_training.context import ScoringContext
from surgical_peft.scoring.progress import Stages, counted
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Toy

AUTO = SurgicalConfig(blocks="auto")


def batches(toy: Toy, count: int = 16) -> list[dict[str, Tensor]]:
    return [toy.batch(seed) for seed in range(count)]


@contextmanager
def work(model: nn.Module) -> Iterator[list[float]]:
    """Counts, in training steps, the layers that run: a third of a step forward, and as much or more backward."""
    blocks = BlockMap.find(model)
    layers = [model.get_submodule(blocks.modules[name][0]) for stack in blocks.stacks.values() for name in stack]
    done = [0.0]

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        done[0] += (2 if output.requires_grad else 1) / 3 / len(layers)

    # A layer that is skipped is called all the same, what is in it is not.
    inner = [next(module for module in layer.modules() if isinstance(module, nn.Linear)) for layer in layers]
    hooks = [module.register_forward_hook(count) for module in inner]
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("budget", [GRADIENTS, 12.5, 40.0])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_choosing_stays_within_its_budget(name: str, budget: float) -> None:
    model, spending = TOYS[name].model(), Budget(budget)
    with work(model) as done:
        config, scores = choose_blocks(model, AUTO, batches(TOYS[name]), budget=spending)
    assert config.blocks and done[0] <= spending.spent <= budget * (1 + 1e-6)
    assert 1 <= scores.num_batches <= 16
    assert config.selection["cost"] == {"budget": budget, "steps": spending.spent, "stages": spending.stages}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_is_chosen_from_within_a_small_budget(name: str) -> None:
    toy, spending = FAMILIES[name], Budget(9.0)
    choose_blocks(toy.model(), AUTO, batches(toy, 4), budget=spending)
    assert spending.spent <= 9.0 * (1 + 1e-6)


@pytest.mark.parametrize("criterion", sorted(criteria.__all__))
def test_every_criterion_stays_within_a_budget(criterion: str, vit: Toy) -> None:
    spending = Budget(6.0)
    scores = score_blocks(vit.model(), batches(vit, 8), criterion, budget=spending)
    assert scores.values and spending.spent <= 6.0 * (1 + 1e-6)


def test_a_wide_budget_changes_nothing(vit: Toy) -> None:
    free, scores = choose_blocks(vit.model(), AUTO, batches(vit, 4))
    wide, others = choose_blocks(vit.model(), AUTO, batches(vit, 4), budget=1e6)
    assert scores == others and free.blocks == wide.blocks
    assert free.selection == {key: value for key, value in wide.selection.items() if key != "cost"}


def test_more_budget_never_means_fewer_batches(vit: Toy) -> None:
    used = [score_blocks(vit.model(), batches(vit), "adam_gain", budget=steps).num_batches for steps in (2, 5, 9, 50)]
    assert used == [1, 4, 7, 8]  # 8 are what it asks for
    assert [score_blocks(vit.model(), batches(vit), "rgn", budget=steps).num_batches for steps in (1, 3)] == [1, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_where_nothing_can_be_trained_gradients_decide(count: int, vit: Toy) -> None:
    config, scores = choose_blocks(vit.model(), AUTO, batches(vit), budget=count * GRADIENTS)
    gains = score_blocks(vit.model(), batches(vit), "depth_gain", num_batches=count).values
    assert scores.num_batches == count
    assert scores.values == pytest.approx({name: 0.25 * math.log(gain) for name, gain in gains.items()}, rel=1e-6)
    assert config.blocks == [max(gains, key=lambda name: gains[name])]


def test_a_race_on_fewer_batches_is_that_on_these_alone(vit: Toy) -> None:
    spending = Budget(20.0)
    scores = score_blocks(vit.model(), batches(vit), "probe", budget=spending)
    assert 8 <= scores.num_batches < 16 and any("trained alone" in stage for stage in spending.stages)
    again = score_blocks(vit.model(), batches(vit, scores.num_batches), "probe", budget=20.0)
    assert again == scores


@pytest.mark.parametrize("criterion", ["probe", "depth_gain", "rgn", "fisher", "angle"])
def test_a_budget_that_is_too_small_says_what_it_would_take(criterion: str, vit: Toy) -> None:
    needed = {"rgn": "1", "angle": "1", "fisher": "2.667"}.get(criterion, "1.25")
    with pytest.raises(SurgicalError, match=rf"0\.5 .* {needed}\. .*{math.ceil(2 * float(needed))} training steps"):
        score_blocks(vit.model(), batches(vit, 4), criterion, budget=0.5)


def test_what_is_kept_for_joint_trainings_gives_way_to_the_scores(vit: Toy) -> None:
    spending = Budget(4.0)
    data = [vit.batch(seed, 9) for seed in range(2)]  # 9 examples a batch, each a ninth of a step and its reading
    config, scores = choose_blocks(vit.model(), replace(AUTO, criterion="fisher"), data, budget=spending)
    assert scores.num_batches == 1 and len(config.blocks) == 1
    assert spending.spent == pytest.approx(2 / 3 + 1 + 9 * READING)


@pytest.mark.parametrize("criterion", ["fisher", "snr"])
@pytest.mark.parametrize("size", [2, 16])
def test_single_examples_cost_what_they_are_of_their_batch(criterion: str, size: int, vit: Toy) -> None:
    """A pass of one example is no step on a batch; the passes that look whether losses can be told apart count."""
    model, spending, rows = vit.model(), Budget(), {True: 0, False: 0}
    data = [vit.batch(seed, size) for seed in range(2)]

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        rows[output.requires_grad] += len(output)

    model.vit.embeddings.register_forward_hook(count)
    score_blocks(model, data, criterion, budget=spending)
    read = (rows[True] + FORWARD * rows[False]) / size
    assert spending.spent == pytest.approx(read + READING * 2 * size)


def test_a_criterion_of_the_user_cannot_go_beyond(vit: Toy) -> None:
    @of_model(batches=4)
    def greedy(context: ScoringContext) -> dict[str, float]:
        with context.training("head") as units:
            context.steps(torch.optim.SGD(units["head"], lr=0.1), range(4), range(1000), 0.1, 1000)
        return dict.fromkeys(context.units, 1.0)

    model = vit.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SurgicalError, match="budget of 3 "):
        score_blocks(model, batches(vit, 4), greedy, budget=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1.0, "50", True])
def test_what_is_no_number_of_steps_is_refused(value: Any, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match="budget="):
        score_blocks(vit.model(), batches(vit, 2), budget=value)
    with pytest.raises(SurgicalError, match="steps="):
        get_surgical_model(vit.model(), SurgicalConfig(blocks="auto"), batches(vit, 2), steps=value)


def test_half_of_the_planned_steps_is_the_budget_and_is_saved(vit: Toy, tmp_path: Any) -> None:
    model = get_surgical_model(vit.model(), AUTO, batches(vit), steps=30)
    cost = model.peft_config["default"].selection["cost"]
    assert cost["budget"] == 15.0 and 0 < cost["steps"] <= 15.0 * (1 + 1e-6)
    model.save_pretrained(tmp_path)
    assert SurgicalConfig.from_pretrained(tmp_path).selection["cost"] == cost


def test_joint_trainings_have_a_part_of_the_budget(vit: Toy) -> None:
    used = {}
    for number in (None, 2):
        spending = Budget(16.0)
        config = replace(AUTO, criterion="depth_gain", num_blocks=number)
        _, scores = choose_blocks(vit.model(), config, batches(vit), budget=spending)
        used[number] = scores.num_batches
        assert any("together" in stage for stage in spending.stages) is (number is None)
    assert used == {None: 9, 2: 12}  # of 12 and of 16 steps


@pytest.mark.parametrize("criterion", ["angle", "rgn", "weight_snr"])
def test_joint_trainings_that_have_no_room_are_left_out(criterion: str, vit: Toy) -> None:
    config, _ = choose_blocks(vit.model(), replace(AUTO, criterion=criterion), batches(vit), budget=5.0)
    assert len(config.blocks) == 1 and "joint_loss" not in config.selection


@pytest.mark.parametrize("is_terminal", [True, False])
def test_stages_are_told(is_terminal: bool, vit: Toy) -> None:
    out = io.StringIO()
    with Stages(Console(file=out, force_terminal=is_terminal, width=120)) as stages:
        choose_blocks(vit.model(), AUTO, batches(vit, 2), budget=40.0, stages=stages)
    text = out.getvalue()
    assert "at most 40" in text.splitlines()[0] and "took" in text.rstrip().splitlines()[-1]
    assert ("\x1b[" in text) is is_terminal and "gradients of 2 batches" in text


@pytest.mark.parametrize("is_on", [True, False])
def test_library_calls_follow_the_switch_of_transformers(
    is_on: bool, vit: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    (logging.enable_progress_bar if is_on else logging.disable_progress_bar)()
    try:
        with counted(3.0, "here") as budget:
            budget.stage("there", 1.0)
            budget.spend(1.0)
        score_blocks(vit.model(), batches(vit, 2), "rgn")  # as callbacks do in mid-training: nothing is told
    finally:
        logging.disable_progress_bar()
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(":")[0] for line in told.err.splitlines()] == (["here", "there", "here"] if is_on else [])


def test_what_costs_nothing_is_always_affordable() -> None:
    """Of several processes one may have no batch."""
    assert Budget(steps=5.0).affordable(3, 0.0, "one batch") == 3
