"""What a search maximizes: one training is what it would be by itself, whatever was trained before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from surgical_peft import Selection, SurgicalConfig, SurgicalError, get_surgical_model, procedures, run_search
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.search.objective import RecipeObjective, folds_of
from surgical_peft.experiments.search.search import search_markdown
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training import profiling
from surgical_peft.experiments.training import runner as module
from surgical_peft.experiments.training.fit import fit
from surgical_peft.experiments.training.source_data import SourceData
from surgical_peft.search.result import SOURCE_LOSS_RISE, SearchResult, SearchTrial
from tests.support.tiny import write_data, write_recipe

BLOCKS = ("embeddings", "0", "1", "final_norm", "head")


def objective_of(folder: Path, **keys: Any) -> RecipeObjective:
    return RecipeObjective(load_recipe(write_recipe(folder, **keys)))


@pytest.mark.parametrize("blocks", [("embeddings",), ("1",), ("head",), BLOCKS])
def test_the_same_as_a_training_from_scratch(blocks: tuple[str, ...], tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    assert objective.blocks.names == BLOCKS
    recipe = objective.recipe
    task = load_task(recipe)
    model = get_surgical_model(task.load_model(), SurgicalConfig(blocks=list(blocks)))
    trainer = fit(model, recipe.arguments(learning_rate=3e-2, seed=7), task.splits["train"], collate=task.collate)
    losses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", lambda *each: losses.append(_loss(fit(*each))))
        selection = Selection(blocks)
        metric = objective(selection, 3e-2, 7)
    assert losses[0] == pytest.approx(_loss(trainer), rel=1e-4)
    assert metric == pytest.approx(task.measure(model, task.splits["validation"]), abs=1 / 48 + 1e-9)
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert selection.record["tuned_parameters"] == tuned
    assert selection.record["peak_memory"] > 0


def _loss(trainer: Any) -> float:
    return float(trainer.state.log_history[-1]["train_loss"])


def test_what_was_trained_before_leaves_no_trace(tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    before = {key: value.clone() for key, value in objective._runner.model.state_dict().items()}
    first = objective(Selection(("1",)), 3e-2, 0)
    objective(Selection(BLOCKS), 3e-2, 1)
    assert objective(Selection(("1",)), 3e-2, 0) == first
    for key, value in objective._runner.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not (tmp_path / "run").exists()  # many workers train at once: none writes there


def test_under_bf16_the_frozen_start_is_skipped_and_it_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(tmp_path, bf16=True, use_cpu=True)
    runner = objective._runner
    assert runner.outputs is not None and runner.outputs.held > 0
    losses, ran = list[float](), list[bool]()
    monkeypatch.setattr(module, "fit", lambda *given: losses.append(_loss(fit(*given))))

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        first = model.get_submodule(runner.blocks.modules["0"][0])
        first.get_submodule("attention").register_forward_hook(lambda *_: ran.append(True))
        return get_surgical_model(model, SurgicalConfig(blocks=["1"]))

    counts = []
    for skips in (False, True):
        ran.clear()
        runner.train(wrap, skips=skips)
        counts.append(len(ran))
    assert counts[1] < counts[0]  # only where it is tried out, and compared
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_without_the_prefix_cache_it_learns_the_same(tmp_path: Path) -> None:
    shared, alone = objective_of(tmp_path), objective_of(tmp_path, frozen_eval=False)
    assert shared._runner.outputs is not None and alone._runner.outputs is None
    for blocks in (("0",), ("head",)):
        assert shared(Selection(blocks), 3e-2, 0) == pytest.approx(
            alone(Selection(blocks), 3e-2, 0), abs=1 / 48 + 1e-9
        )


def test_examples_are_made_once(tmp_path: Path) -> None:
    objective = objective_of(tmp_path)
    train = objective._runner.examples["train"]
    assert train[3] is train[3]


def test_beyond_its_room_nothing_is_kept(tmp_path: Path) -> None:
    train = module.Remembered(objective_of(tmp_path)._runner.task.splits["train"], room=700)
    assert train[0] is train[0]
    assert train[1] is not train[1]
    assert torch.equal(train[1]["pixel_values"], train[1]["pixel_values"])


def test_the_test_split_is_not_even_there(tmp_path: Path) -> None:
    write_data(tmp_path / "data", ("train", "validation"))
    assert 0 <= objective_of(tmp_path)(Selection(("head",)), 1e-2, 0) <= 1


@pytest.mark.parametrize(("count", "folds"), [(10, 5), (11, 3), (7, 7), (500, 2)])
def test_folds_are_a_partition(count: int, folds: int) -> None:
    found = folds_of(count, folds, seed=3)
    assert sorted(place for fold in found for place in fold) == list(range(count))
    sizes = [len(fold) for fold in found]
    assert len(sizes) == folds and max(sizes) - min(sizes) <= 1
    assert found == folds_of(count, folds, seed=3) != folds_of(count, folds, seed=4)


def test_each_fold_is_measured_on_what_it_was_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data", ("train",))
    objective = objective_of(tmp_path, folds=4)
    assert objective.seeds == (0, 1, 2, 3)
    seen: list[set[int]] = []

    def watch(model: Any, args: Any, train: Any, *others: Any) -> Any:
        seen.append(set(train._places))
        return fit(model, args, train, *others)

    monkeypatch.setattr(module, "fit", watch)
    measured: list[int] = []
    for fold in objective.seeds:
        assert 0 <= objective(Selection(("head",)), 1e-2, fold) <= 1
        measured += objective._folds[fold]
        assert seen[-1] == set(range(48)) - set(objective._folds[fold])
    assert sorted(measured) == list(range(48))
    result = run_search("prefix", objective, rates=objective.rates, seeds=objective.seeds)
    assert result.trainings == 4 * len(result.candidates)


@pytest.mark.parametrize("folds", [49, 1000, 2**31 - 1])
def test_more_folds_than_examples(folds: int, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=f"folds={folds} .*48 training examples.*2 to 48"):
        objective_of(tmp_path, folds=folds)


def test_without_a_validation_split_some_of_train_are_held_out(tmp_path: Path) -> None:
    write_data(tmp_path / "data", ("train",))
    objective = objective_of(tmp_path)
    assert len(objective._validation(0)) + len(objective._runner.examples["train"]) == 48
    assert any("20 % of train" in line for line in objective.summary)


def test_a_new_head_is_trained_with_every_candidate(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, modules_to_save=["classifier"])
    selection, alone = Selection(("0",)), Selection(("0",))
    objective(selection, 1e-2, 0)
    objective_of(tmp_path)(alone, 1e-2, 0)
    assert selection.record["tuned_parameters"] == alone.record["tuned_parameters"] + 17 * 3


def test_a_policy_steers_the_training(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, policy="auto_rgn", policy_options={"every": "epoch", "num_batches": 1})
    assert 0 <= objective(Selection(BLOCKS), 1e-2, 0) <= 1
    assert not (tmp_path / "run").exists()


def test_a_report_after_every_epoch_but_the_last(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, num_train_epochs=3)
    told: list[tuple[float, int]] = []
    last = objective(Selection(("1",)), 3e-2, 0, lambda *each: told.append(each))
    assert [step for _, step in told] == [6, 12]
    assert all(0 <= metric <= 1 for metric, _ in told)
    assert last == objective(Selection(("1",)), 3e-2, 0)  # measuring on the way changes nothing


def test_a_pruner_ends_trainings(tmp_path: Path) -> None:
    keys = {"pruner": "ThresholdPruner", "pruner_options": {"lower": 1.1}}
    objective = objective_of(tmp_path, **keys)
    with pytest.raises(SurgicalError, match="pruned at step 6"):
        run_search("prefix", objective, rates=objective.rates, pruner=objective.recipe.make_pruner(), seeds=[0])


def test_the_time_of_a_training_is_told_from_a_few_steps(tmp_path: Path) -> None:
    timing = objective_of(tmp_path).timing()
    assert 0 < timing.step < timing.whole < 60 and 0 < timing.measure < timing.whole and timing.memory > 10**6


def test_what_only_the_first_training_of_a_process_does_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took longer than the five times as many steps after it, which so seemed to cost nothing."""
    clock, begun = [0.0], list[int]()

    def train(
        runner: module.RecipeRunner, *args: Any, max_steps: int, watch: Any = None, **kwargs: Any
    ) -> tuple[None, int]:
        callback = watch(None) if watch else TrainerCallback()
        callback.on_train_begin(runner.args, TrainerState(), TrainerControl())
        clock[0] += 7 + (0 if begun else 100)
        for _ in range(max_steps):
            clock[0] += 1
            callback.on_step_end(runner.args, TrainerState(), control := TrainerControl())
            if control.should_training_stop:
                break
        begun.append(max_steps)
        return None, 0

    monkeypatch.setattr(module.RecipeRunner, "train", train)
    for timed in (module, profiling):
        monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    runner = module.RecipeRunner(load_recipe(write_recipe(tmp_path)))
    assert runner.seconds(lambda model: model) == 7 + runner.steps()
    assert begun[0] == 1 and len(begun) == 2


def test_parts_of_layers_are_searched_like_blocks(tmp_path: Path) -> None:
    objective = objective_of(tmp_path, divide=["attention", "mlp"])
    assert objective.blocks.names == (
        "embeddings", "0/attention", "0/mlp", "1/attention", "1/mlp", "final_norm", "head"
    )  # fmt: skip
    assert objective.settings["divide"] == ["attention", "mlp"]
    result = run_search(procedures.segments(parts=4), objective, rates=objective.rates, seeds=objective.seeds)
    assert [each.blocks for each in result.candidates] == [("1/mlp",), ("1/attention",), ("0/mlp",), ("0/attention",)]
    sizes = {trial.blocks[0]: trial.notes["tuned_parameters"] for trial in result.trials}
    attention, mlp = 4 * (16 * 16 + 16), 2 * 16 * 32 + 32 + 16
    assert sizes == {"0/attention": attention, "0/mlp": mlp, "1/attention": attention, "1/mlp": mlp}
    block, _, part = result.best.blocks[0].partition("/")
    assert SurgicalConfig.from_selection(result.best).target_modules == {block: [part]}


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="attentoin"):
        objective_of(tmp_path, divide=["attentoin"])


def test_more_examples_than_fit_are_not_made_to_ask_whether_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = objective_of(tmp_path)._runner
    monkeypatch.setattr(module, "ROOM", 1000)
    assert runner.outputs is not None and runner.outputs.held == 0
    assert len(runner.examples["train"]._made) == 2


def test_settings_say_what_a_training_is_and_not_what_is_searched(tmp_path: Path) -> None:
    one = objective_of(tmp_path, rates=[1e-2, 1e-3]).settings
    assert one == objective_of(tmp_path, procedure="windows", seeds=[1], output_dir="elsewhere").settings
    assert one != objective_of(tmp_path, num_train_epochs=5).settings
    assert one != objective_of(tmp_path, folds=5).settings
    assert one["model"].startswith("model float32:")  # no path: the same on every machine


def test_the_rise_of_the_source_loss_is_noted(tmp_path: Path) -> None:
    """And a study goes on when it is asked for, but not with that on other data."""
    write_data(tmp_path / "source", ("train", "test"), count=12)
    objective = objective_of(tmp_path, source_data="source", max_steps=2)
    selection = Selection(("0",))
    losses: dict[bool, float] = {}

    def loss(source: SourceData, model: Any) -> float:
        is_tuned = hasattr(model, "peft_config")
        return losses.setdefault(is_tuned, measured(source, model))

    with pytest.MonkeyPatch.context() as patch:
        measured = SourceData.loss
        patch.setattr(SourceData, "loss", loss)
        objective(selection, 3e-2, 7)
    assert selection.record[SOURCE_LOSS_RISE] == losses[True] - losses[False] != 0
    plain = objective_of(tmp_path, max_steps=2)
    assert plain.settings == objective.settings and plain.measured == {}
    shifted = {"data": "source", "label_map": [1, 0, 2]}
    others = [objective_of(tmp_path, source_data=source, max_steps=2) for source in ("data", shifted)]
    assert len({str(each.measured) for each in (objective, *others)}) == 3


def test_a_search_shows_the_rise_of_the_source_loss() -> None:
    """The mean over the seeds at the best rate; what an earlier version trained has none."""

    def trial(block: str, rate: float, seed: int, metric: float, **notes: float) -> SearchTrial:
        return SearchTrial((block,), metric, 1.0, rate=rate, seed=seed, notes=notes)

    trials = [trial("0", 0.1, seed, 0.9, source_loss_rise=0.2 * (1 + seed)) for seed in (0, 1)]
    trials += [trial("0", 0.2, seed, 0.5, source_loss_rise=9.0) for seed in (0, 1)]
    trials += [trial("1", 0.1, seed, 0.8) for seed in (0, 1)]
    result = SearchResult(Selection(("0",)), 0.9, tuple(trials), ("0", "1"), "sweep()")
    for shown in (str(result.table()), search_markdown(result, "accuracy")):
        first, second = (line for line in shown.splitlines() if ("0.9" in line or "0.8" in line))
        assert "+0.300" in first and "+" not in second and "source loss" in shown
    bare = replace(result, trials=tuple(replace(each, notes={}) for each in trials))
    assert "source loss" not in str(bare.table()) + search_markdown(bare, "accuracy")


def test_where_not_all_blocks_fit_a_training_keeps_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = objective_of(tmp_path)._runner
    row = 5 * 16 * 4
    monkeypatch.setattr(module, "ROOM", 48 * row)  # of one place
    ran = list[bool]()

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        first = model.get_submodule(runner.blocks.modules["0"][0])
        first.get_submodule("attention").register_forward_hook(lambda *_: ran.append(True))
        return get_surgical_model(model, SurgicalConfig(blocks=["1"]))

    counts = []
    for seed in (0, 1):
        ran.clear()
        runner.train(wrap, seed=seed)
        counts.append(len(ran))
    assert runner.outputs is not None and runner.outputs.held == 48 * row
    assert counts[0] - counts[1] == 48 // 8  # the second training has the outputs of the first one


def test_an_empty_validation_split(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_data(tmp_path / "data", ("validation",), count=0)
    with pytest.raises(SurgicalError, match="validation"):
        objective_of(tmp_path)
