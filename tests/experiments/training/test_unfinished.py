"""Ctrl-C in a training keeps a checkpoint, and the same training again ends as one that was not interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from surgical_peft import SurgicalCallback
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.training import train as module
from surgical_peft.experiments.training.train import train
from surgical_peft.experiments.training.unfinished import Unfinished
from tests.support.tiny import write_recipe
from tests.support.toy_tasks import TOY_TASKS

Interrupt = Callable[[int], None]


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Interrupts are heard, also where a script has started the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path, learning_rate=1e-2, policy="layer_decay"))  # 12 steps


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    def at(step: int) -> None:
        class Pressed(SurgicalCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                super().on_step_end(args, state, control, **kwargs)
                if state.global_step == step:
                    os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(module, "SurgicalCallback", Pressed)

    return at


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def told(recipe: Recipe, folder: Path) -> str:
    out = io.StringIO()
    train(recipe, folder, Console(file=out))
    return out.getvalue()


def test_a_rerun_goes_on_and_ends_the_same(
    recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(recipe, tmp_path / "straight")
    interrupt_at(8)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-8"):
        train(recipe, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is handler and not (tmp_path / "stopped" / "adapter").exists()
    interrupt_at(-1)
    monkeypatch.setattr(module, "choose_blocks", None)  # is not to be called again
    text = told(recipe, tmp_path / "stopped")
    assert "checkpoint-8" in text and "trained 4 steps" in text
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    written = {path.name for path in (tmp_path / "straight").iterdir()}
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == written
    report = module.TrainingReport.from_json(module.json.loads((tmp_path / "stopped" / "report.json").read_text()))
    assert (report.before, report.after, report.blocks) == (straight.before, straight.after, straight.blocks)


def test_where_interrupts_are_ignored_it_goes_to_its_end(
    recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt
) -> None:
    """As in the background of a script, whose Ctrl-C is not for it."""
    interrupt_at(3)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert "trained 12 steps" in told(recipe, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_recipe_does_not_go_on_from_it(recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt) -> None:
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    interrupt_at(-1)
    other = replace(recipe, training={**recipe.training, "learning_rate": 1e-3})
    text = told(other, tmp_path / "run")
    assert "starts over" in text and "trained 12 steps" in text


def test_another_model_at_the_same_place_does_not_go_on_from_it(
    recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt
) -> None:
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    interrupt_at(-1)
    file = Path(recipe.model) / "model.safetensors"
    save_file({name: 1.01 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    text = told(recipe, tmp_path / "run")
    assert "starts over" in text and "trained 12 steps" in text


@pytest.mark.parametrize(
    "keys",
    [{"save_strategy": "steps", "save_steps": 2, "save_only_model": True}, {"max_steps": 8}],
    ids=["checkpoints without the optimizer", "interrupted at the last step"],
)
def test_it_ends_the_same_however_it_saves(
    recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt, keys: dict[str, Any]
) -> None:
    recipe = replace(recipe, training={**recipe.training, **keys})
    train(recipe, tmp_path / "straight")
    interrupt_at(keys.get("max_steps", 7))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "stopped")
    interrupt_at(-1)
    train(recipe, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")


def _stopping(folder: Path) -> Recipe:
    toy = TOY_TASKS["text_classification"](folder)
    training = {"use_cpu": True, "num_train_epochs": 12, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    training |= {"per_device_train_batch_size": 3}
    return replace(toy, character_noise=None, blocks=["1", "head"], training=training, early_stopping_patience=2)


@pytest.mark.parametrize("before", [0, 2, 4])  # steps: of an epoch there are 4
def test_early_stopping_counts_on(tmp_path: Path, interrupt_at: Interrupt, before: int) -> None:
    """Also where the interrupt comes at an epoch's end or amid one, which is then not evaluated."""
    recipe = _stopping(tmp_path / "texts")
    straight = train(recipe, tmp_path / "straight")
    assert 2 < straight.rates.epochs < 12 and straight.rates.steps / straight.rates.epochs == 4
    at = straight.rates.steps - before
    interrupt_at(at)
    with pytest.raises(KeyboardInterrupt, match=f"checkpoint-{at}"):
        train(recipe, tmp_path / "stopped")
    interrupt_at(-1)
    assert f"checkpoint-{at}" in told(recipe, tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    report = json.loads((tmp_path / "stopped" / "report.json").read_text())
    assert report["rates"]["steps"] == straight.rates.steps


def _emptied(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("")


def _half_deleted(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


@pytest.mark.parametrize("damage", [_emptied, _half_deleted])
def test_a_checkpoint_that_is_not_whole_is_left_aside(
    recipe: Recipe, tmp_path: Path, interrupt_at: Interrupt, damage: Callable[[Path], None]
) -> None:
    """As where a kill comes while Trainer deletes one, or a power cut after it has written one."""
    recipe = replace(recipe, training={**recipe.training, "save_strategy": "steps", "save_steps": 5})
    train(recipe, tmp_path / "straight")
    interrupt_at(8)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-8"):
        train(recipe, tmp_path / "stopped")
    interrupt_at(-1)
    damage(tmp_path / "stopped" / "checkpoint-8")
    text = told(recipe, tmp_path / "stopped")
    assert "checkpoint-5" in text and "trained 7 steps" in text
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")


def test_a_finished_training_begins_anew(recipe: Recipe, tmp_path: Path) -> None:
    """Also where its recipe saves checkpoints, which stay."""
    saving = replace(recipe, training={**recipe.training, "save_strategy": "epoch"})
    for _ in range(2):
        assert "trained 12 steps" in told(saving, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-12").exists()


def test_a_training_whose_adapter_cannot_be_saved_is_not_lost(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    saving = replace(recipe, training={**recipe.training, "save_strategy": "epoch"})
    monkeypatch.setattr(module, "whole_folder", full)
    with pytest.raises(OSError, match="space"):
        train(saving, tmp_path / "run")
    monkeypatch.undo()
    assert "trained 0 steps" in told(saving, tmp_path / "run")


def test_before_the_first_step_the_choice_is_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit", pressed)
    with pytest.raises(KeyboardInterrupt, match="same command"):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(module, "choose_blocks", None)
    assert "goes on" in told(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"5", b'{"identity": {"a": 1}}', b'{"identity": {"a": 1}, "known": 5}']
)
def test_damaged_notes_of_an_earlier_start_count_for_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_bytes(content)
    assert Unfinished(tmp_path, {"a": 1}).known == {}
