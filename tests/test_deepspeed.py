"""DeepSpeed's ZeRO on two processes trains what one process trains, each block at its own rate."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .launched import assert_same_adapter
from .launched_deepspeed import train
from .toys import TOYS

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None, reason="DeepSpeed on a CPU needs a C++ compiler"
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_two_processes_equals_one_on_the_union(stage: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    TOYS["llama"].model().save_pretrained(base)  # type: ignore[operator]
    train(base, tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [*launch, "-m", "tests.launched_deepspeed", str(base), str(tmp_path / "two"), str(stage)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"zero {stage} 2\n" in done.stdout
    assert_same_adapter(tmp_path / "one", tmp_path / "two", atol=1e-4)
    history = (tmp_path / "two" / "surgical_history.jsonl").read_text()
    assert history == (tmp_path / "one" / "surgical_history.jsonl").read_text()
