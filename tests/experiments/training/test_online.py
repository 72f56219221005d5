"""Adaptation to a stream without labels: one step an image, before it is predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset

from surgical_peft import Selection, SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.experiments.advise.advise import advise
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.search.objective import RecipeObjective
from surgical_peft.experiments.tasks.evaluation import Measure
from surgical_peft.experiments.tasks.marginal_entropy import marginal_entropy
from surgical_peft.experiments.training.online import adapt_online
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.experiments.training.train import score, train
from tests.support.tiny import write_data, write_recipe

RATE = 0.05


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("online")
    write_data(folder / "data", count=16)
    once = dict.fromkeys(("num_train_epochs", "per_device_train_batch_size"))
    keys = {"unlabelled": "online", "copies": 3, "optim": "sgd", "learning_rate": RATE, "blocks": [0]}
    return load_recipe(write_recipe(folder, **once, **keys, rates=[RATE]))


@pytest.fixture(scope="module")
def runner(recipe: Recipe) -> RecipeRunner:
    return RecipeRunner(recipe)


def tuning(blocks: Any) -> Any:
    return lambda model: get_surgical_model(model, SurgicalConfig(blocks=blocks))


def read_logits(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    return list(model(pixel_values=batch["pixel_values"]).logits)


def test_a_stream_is_what_a_plain_loop_makes_of_it(runner: RecipeRunner) -> None:
    """Step, then predict, image by image, with plain torch; the frozen blocks stay as they were."""
    model = runner.task.load_model().eval()
    predicted = []
    tuned = [weight for name, weight in model.named_parameters() if ".layers.0." in name]
    for example in (runner.examples["validation"][index] for index in range(16)):
        logits = model(pixel_values=example["copies"]).logits
        gradients = torch.autograd.grad(marginal_entropy(logits[None]).sum(), tuned)
        with torch.no_grad():
            for weight, gradient in zip(tuned, gradients, strict=True):
                weight -= RATE * gradient
        predicted.append(model(pixel_values=example["pixel_values"][None]).logits[0])
    logits_of: Any = Measure(lambda predictions, _: predictions, lambda model, batch: (read_logits(model, batch), []))
    adapted = tuning([0])(runner.task.load_model())
    along: Any = adapt_online(adapted, runner.part("validation"), runner.args, logits_of)
    torch.testing.assert_close(torch.stack(along), torch.stack(predicted))
    assert not adapted.training
    state, source = adapted.state_dict(), runner.model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(state[f"base_model.model.{name}"], weight)
        assert torch.equal(weight, source[name]) == (".layers.0." not in name)


def test_everything_and_the_head_adapt_differently(runner: RecipeRunner) -> None:
    stream = runner.part("validation")
    states = [runner.adapt(tuning(blocks), stream)[0].state_dict() for blocks in ("all", ["head"])]
    name = next(name for name in states[0] if name.endswith("classifier.weight"))
    assert not torch.equal(states[0][name], states[1][name])


def test_labels_of_the_stream_are_for_the_metric_alone(runner: RecipeRunner) -> None:
    stream = [runner.part("validation")[index] for index in range(8)]
    others = [{**example, "labels": (example["labels"] + 1) % 3} for example in stream]
    (one, _, first), (two, _, second) = (runner.adapt(tuning([0]), examples) for examples in (stream, others))
    assert all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())
    assert first != second


def test_images_may_come_several_at_once_and_stop_being_adapted_to(runner: RecipeRunner) -> None:
    stream = runner.part("validation")
    whole, _, _ = runner.adapt(tuning([0]), stream, per_device_train_batch_size=8)
    short, _, _ = runner.adapt(tuning([0]), stream, per_device_train_batch_size=8, max_steps=1)
    first, _, _ = runner.adapt(tuning([0]), runner.part("validation", range(8)), per_device_train_batch_size=8)
    states = [model.state_dict() for model in (whole, short, first)]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_train_tells_the_metric_along_each_stream(recipe: Recipe, runner: RecipeRunner, tmp_path: Path) -> None:
    report = train(recipe, tmp_path / "run")
    assert report.before["validation"] == runner.task.measure(runner.model, runner.part("validation"))
    assert report.after["validation"] == runner.adapt(tuning([0]), runner.part("validation"))[2]
    assert report.after.keys() == {"validation", "test"}
    rates = report.rates
    assert (rates.steps, rates.batch_size, rates.epochs, rates.schedule) == (16, 1, 1.0, "constant")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "no label is trained on" in card and "along the stream" in card


def test_blocks_are_scored_by_the_entropy_of_training_images(recipe: Recipe) -> None:
    scores = score(replace(recipe, criterion="rgn", num_batches=2))
    assert set(scores.values) >= {"0", "1"} and all(value > 0 for value in scores.values.values())


def test_a_search_measures_along_the_validation_stream(recipe: Recipe, runner: RecipeRunner) -> None:
    objective = RecipeObjective(recipe)
    assert objective(Selection(("0",)), RATE, 0) == runner.adapt(tuning([0]), runner.part("validation"), seed=0)[2]


def test_advice_is_not_for_streams(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="online"):
        advise(recipe, tmp_path)


def compared(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ComparisonReport:
    costs = {"ms": 1.0, "peak_bytes": 0.0}
    monkeypatch.setattr(
        "surgical_peft.experiments.compare.jobs.step_costs", lambda trainings, steps: dict.fromkeys(trainings, costs)
    )
    compare(recipe, folder)
    return ComparisonReport.from_json(json.loads((folder / "comparison" / "report.json").read_text()))


def test_compare_chooses_rates_on_the_validation_stream_and_tells_that_of_the_test_split(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stream is begun with the source model; the better rate on the other split does not count."""
    told = {("validation", 0.01): 0.2, ("validation", 0.05): 0.9, ("validation", 0.25): 0.3}
    told |= {("test", 0.01): 1.0, ("test", 0.05): 0.4, ("test", 0.25): 1.0}
    source = RecipeRunner(recipe).model.state_dict()

    def adapt(model: nn.Module, stream: Any, args: Any, *given: Any) -> float:
        tuned = model.state_dict()
        prefix = "base_model.model." * any(name.startswith("base_model.") for name in tuned)
        assert all(torch.equal(weight, tuned[prefix + name]) for name, weight in source.items())
        next(weight for weight in model.parameters() if weight.requires_grad).data.add_(1)
        return told["test" if isinstance(stream, ConcatDataset) else "validation", args.learning_rate]

    monkeypatch.setattr("surgical_peft.experiments.training.runner.adapt_online", adapt)
    methods = ["nothing", "full", {"blocks": {"names": [0]}}]
    own = replace(recipe, methods=methods, rates=[0.01, 0.05, 0.25], source_data=recipe.data)
    report = compared(own, tmp_path, monkeypatch)
    assert [row.rate for row in report.methods] == [None, 0.05, 0.05]
    assert [row.test for row in report.methods[1:]] == [[0.4], [0.4]]
    assert all(row.forgotten is not None for row in report.methods)
    assert "No label of the streams" in " ".join(report.sentences)


def test_compare_says_that_training_labels_were_not_used(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(recipe, unlabelled=True, methods=["full"], training={**recipe.training, "max_steps": 1})
    assert "No label of the training split" in " ".join(compared(own, tmp_path, monkeypatch).sentences)


def test_a_dry_run_counts_the_steps_of_the_stream(runner: RecipeRunner) -> None:
    assert runner.steps() == 16
