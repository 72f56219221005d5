"""What every task must show; tasks are found by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from surgical_peft import BlockMap, SurgicalConfig
from surgical_peft.experiments import tasks
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.fit import fit
from surgical_peft.experiments.training.train import score
from tests.support.toy_tasks import SIZES, TOY_TASKS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BLOCKS = {"seq2seq": ["decoder.1"]}


@pytest.fixture(scope="module", params=tasks.__all__)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    assert request.param in TOY_TASKS, f"{request.param}: add a recipe to TOY_TASKS"
    made = TOY_TASKS[request.param](tmp_path_factory.mktemp(request.param))
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 0.01}
    return replace(made, blocks=BLOCKS.get(request.param, [-1]), training=training)


def equal(first: Any, second: Any) -> bool:
    pairs = [(torch.as_tensor(value), torch.as_tensor(second[name])) for name, value in first.items()]
    return first.keys() == second.keys() and all(one.equal(other) for one, other in pairs)


def test_examples_are_the_same_every_time(recipe: Recipe) -> None:
    first, second = load_task(recipe), load_task(recipe)
    assert {split: len(each) for split, each in first.splits.items()} == SIZES
    for split, size in SIZES.items():
        for index in reversed(range(size)):
            np.random.seed(index)  # whatever the state before
            assert equal(first.splits[split][index], second.splits[split][index])
            assert equal(first.splits[split][index], first.splits[split][index])


def test_a_batch_gives_the_model_its_loss_and_leaves_the_examples_as_they_were(recipe: Recipe) -> None:
    task = load_task(recipe, ("train",))
    examples = [task.splits["train"][index] for index in range(4)]
    copies = [task.splits["train"][index] for index in range(4)]
    batch = task.collate(examples)
    assert type(batch) is dict and all(len(value) == 4 for value in batch.values())
    assert all(map(equal, examples, copies))
    loss = task.load_model()(**batch).loss
    assert loss.isfinite() and loss.requires_grad


def test_the_model_is_the_same_every_time_and_another_object(recipe: Recipe) -> None:
    task = load_task(recipe, ("validation",))
    first, second = task.load_model(), task.load_model()
    assert first is not second and not first.training
    assert equal(first.state_dict(), second.state_dict())


def test_only_the_blocks_change_in_training(recipe: Recipe) -> None:
    task = load_task(recipe, ("train",))
    model = get_peft_model(task.load_model(), SurgicalConfig(blocks=recipe.blocks))
    fit(model, recipe.arguments(), task.splits["train"], collate=task.collate)
    source, tuned = task.load_model().state_dict(), model.merge_and_unload()
    moved = {name for name, value in tuned.state_dict().items() if not value.equal(source[name])}
    blocks = BlockMap.find(tuned)
    assert moved and {blocks.block_of(name) for name in moved} == set(blocks.parse(recipe.blocks))


def test_the_metric_is_repeatable_and_leaves_the_mode(recipe: Recipe) -> None:
    task = load_task(recipe, ("validation",))
    model = task.load_model().train()
    examples = task.splits["validation"]
    value = task.measure(model, examples)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert value == task.measure(model, [examples[index] for index in range(len(examples))])
    assert value <= 1


def test_a_wrapped_model_measures_the_same(recipe: Recipe) -> None:
    task = load_task(recipe, ("validation",))
    wrapped = get_peft_model(task.load_model(), SurgicalConfig(blocks=recipe.blocks))
    assert task.measure(wrapped, task.splits["validation"]) == task.measure(
        task.load_model(), task.splits["validation"]
    )


def test_a_better_model_measures_higher(recipe: Recipe) -> None:
    """Larger is better: after learning the training examples by heart, the metric on them is higher."""
    task = load_task(recipe, ("train",))
    model = task.load_model()
    before = task.measure(model, task.splits["train"])
    args = recipe.arguments(max_steps=60, learning_rate=0.02)
    fit(model, args, task.splits["train"], collate=task.collate)
    assert task.measure(model, task.splits["train"]) > before + 0.1


def test_its_blocks_can_be_scored(recipe: Recipe) -> None:
    scores = score(replace(recipe, criterion="rgn", num_batches=2))
    assert all(value >= 0 for value in scores.values.values())
