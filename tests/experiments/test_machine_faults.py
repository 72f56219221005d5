"""What the machine lacks ends a command in one line, and the same command again does what is left to be done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info
from transformers import ViTForImageClassification

from surgical_peft.experiments.tasks.image_classification import _Images
from surgical_peft.experiments.training.runner import Part
from tests.support.cli import run
from tests.support.tiny import write_recipe

KEYS: dict[str, Any] = {"blocks": [0, "head"], "methods": ["full"], "num_train_epochs": 1}
RESULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "train": ("report.json", lambda report: report["after"]),
    "search": ("search/search.json", lambda found: [trial["metric"] for trial in found["trials"]]),
    "compare": ("comparison/report.json", lambda report: [row["validation"] for row in report["methods"]]),
}


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the fourth batch that is trained on."""
    forward, calls = ViTForImageClassification.forward, []

    @wraps(forward)
    def failing(self: Any, *given: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if self.training and len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return forward(self, *given, **kwargs)

    monkeypatch.setattr(ViTForImageClassification, "forward", failing)


def loading_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (_Images, Part):  # of a training, and of those that share their examples

        def failing(self: Any, place: int, read: Any = kind.__getitem__) -> Any:
            if get_worker_info() is not None:
                os._exit(1)
            return read(self, place)

        monkeypatch.setattr(kind, "__getitem__", failing)


@pytest.mark.parametrize("command", RESULTS)
def test_out_of_memory(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _check(command, out_of_memory, "per_device_train_batch_size", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("command", ["train", "search"])  # the others train as a search does
def test_a_dead_loading_process(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fault = loading_process_ends
    _check(command, fault, "dataloader_num_workers: 0", tmp_path, monkeypatch, capsys, dataloader_num_workers=1)


def _check(
    command: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    remedy: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    **keys: Any,
) -> None:
    recipe = str(write_recipe(folder, **KEYS, **keys))
    with monkeypatch.context() as patch:
        fault(patch)
        assert run(monkeypatch, command, recipe, "--json") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and remedy in errors[0]
    result, numbers = RESULTS[command]
    assert not (folder / "run" / result).exists()
    for output in ("run", "fresh"):
        assert run(monkeypatch, command, recipe, "--json", "--output", str(folder / output)) == 0
    again, fresh = (json.loads((folder / output / result).read_text()) for output in ("run", "fresh"))
    assert numbers(again) == numbers(fresh)
