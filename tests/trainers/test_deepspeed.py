"""DeepSpeed's ZeRO on two processes trains what one process trains, each block at its own rate, and can go back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.launched import assert_same_adapter
from tests.support.launched_deepspeed import loss, train
from tests.support.toys import TOYS

REPOSITORY = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None, reason="DeepSpeed on a CPU needs a C++ compiler"
)
CASES = [(1, "none"), (2, "device"), (3, "none")]  # the stage, and where the base is kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, and for each stage what two processes made of it."""
    folder = tmp_path_factory.mktemp("zero")
    TOYS["llama"].model().save_pretrained(folder / "base")  # type: ignore[operator]
    command = [sys.executable, "-m", "tests.support.launched_deepspeed", str(folder), json.dumps(CASES)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("stage", "keep_base"), CASES)
def test_zero_on_two_processes_equals_one_on_the_union(
    stage: int, keep_base: str, folder: Path, tmp_path: Path
) -> None:
    one = train(folder / "base", tmp_path, keep_base=keep_base)
    found = json.loads((folder / str(stage) / "found.json").read_text())
    assert (found["stage"], found["processes"]) == (stage, 2)
    assert found["tuned"] == pytest.approx(loss(one.model), abs=1e-4)
    if keep_base != "none":
        assert found["base"] == pytest.approx(loss(TOYS["llama"].model()), abs=1e-6)
    assert_same_adapter(tmp_path, folder / str(stage), atol=1e-4)
    history = (folder / str(stage) / "surgical_history.jsonl").read_text()
    assert history == (tmp_path / "surgical_history.jsonl").read_text()
