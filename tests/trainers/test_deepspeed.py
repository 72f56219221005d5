"""DeepSpeed's ZeRO on two processes trains what one process trains, each block at its own rate, and can go back."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.launched import assert_same_adapter
from tests.support.launched_deepspeed import loss, train
from tests.support.toys import TOYS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None, reason="DeepSpeed on a CPU needs a C++ compiler"
)
@pytest.mark.parametrize(("stage", "keep_base"), [(1, "none"), (2, "device"), (3, "none")])
def test_zero_on_two_processes_equals_one_on_the_union(stage: int, keep_base: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    original = TOYS["llama"].model()
    original.save_pretrained(base)  # type: ignore[operator]
    one = train(base, tmp_path / "one", keep_base=keep_base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [
        *launch,
        "-m",
        "tests.support.launched_deepspeed",
        str(base),
        str(tmp_path / "two"),
        str(stage),
        keep_base,
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"'))
    assert (found["stage"], found["processes"]) == (stage, 2)
    assert found["tuned"] == pytest.approx(loss(one.model), abs=1e-4)
    if keep_base != "none":
        assert found["base"] == pytest.approx(loss(original), abs=1e-6)
    assert_same_adapter(tmp_path / "one", tmp_path / "two", atol=1e-4)
    history = (tmp_path / "two" / "surgical_history.jsonl").read_text()
    assert history == (tmp_path / "one" / "surgical_history.jsonl").read_text()
