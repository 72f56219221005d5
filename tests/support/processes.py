"""Fresh processes, and pairs of them that find one another as a launcher's do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def in_a_fresh_process(script: str, *arguments: object) -> dict[str, Any]:
    """What a script prints in its last line, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def in_two_processes(run: Callable[[], None], environment: Mapping[str, str] | None = None) -> None:
    """Call `run` in two processes forked from this one, which has imported everything; ends it where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.environ.update(environment or {})
                os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                run()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # now and then a thread of DeepSpeed's aborts a process that ends by itself
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
