"""Two processes that find one another as a launcher's do, forked from one that has imported everything already."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping


def in_two_processes(run: Callable[[], None], environment: Mapping[str, str] | None = None) -> None:
    """Call `run` in both; ends this process where one of them fails."""
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
