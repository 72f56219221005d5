"""Tests for the time and memory of training steps."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from surgical_peft.experiments.training.profiling import LiveTensors, step_costs


class Layers(nn.Module):
    """Two linear layers with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.second(self.first(x)).pow(2).mean()}


def trainer_of(model: nn.Module, callback: TrainerCallback, folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return Trainer(model, args, train_dataset=[{"x": torch.ones(64)}] * steps, callbacks=[callback])


def test_two_steps_tell_the_peak_of_many(tmp_path: Path) -> None:
    """The first step finds no state of the optimizer, and is smaller than all that follow."""

    class Whole(TrainerCallback):
        def __init__(self, model: nn.Module) -> None:
            self.tensors = LiveTensors()
            for weight in model.parameters():
                self.tensors.count(weight)

        def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
            self.tensors.__enter__()

        def on_train_end(self, *given: Any, **kwargs: Any) -> None:
            self.tensors.__exit__(None, None, None)

    model = Layers()
    whole = Whole(model)
    trainer_of(model, whole, tmp_path, steps=5).train()

    def two_steps(watch: Any) -> None:
        model = Layers()
        trainer_of(model, watch(model), tmp_path, steps=2).train()

    peak = step_costs({"full": two_steps}, planned_steps=0)["full"]["peak_bytes"]
    state = 2 * 2 * (64 * 64 + 64) * 4
    assert peak > state
    assert peak == pytest.approx(whole.tensors.peak, abs=1024)  # the batch is made before a step begins


def test_steps_that_train_other_weights_are_not_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a policy that trains one layer in three steps of four, the fastest step said what the cheap layer costs."""
    now = [0.0]
    monkeypatch.setattr("surgical_peft.experiments.training.profiling.time.perf_counter", lambda: now[0])

    def train(watch: Any) -> None:
        model = Layers()
        meter = watch(model)
        meter.on_train_begin()
        meter.on_epoch_begin()
        for step in range(16):
            is_cheap = step < 12
            meter.on_step_begin()
            now[0] += 1.0 if is_cheap else 5.0
            model.first.weight.grad = None if is_cheap else torch.zeros(64, 64)
            meter.on_pre_optimizer_step()
            meter.on_step_end()

    costs = step_costs({"policy": train}, planned_steps=0)["policy"]
    assert costs["ms"] == pytest.approx(1000 * statistics.fmean([1.0] * 12 + [5.0] * 4))
