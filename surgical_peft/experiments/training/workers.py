"""Worker processes: they share the machine's threads, are quiet, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from rich.console import Console

from ...errors import SurgicalError
from ...quiet import quieten
from ...rendering import clock
from ...scoring.progress import Stages
from ...threads import in_background
from .job_progress import telling

SPAWN = multiprocessing.get_context("spawn")  # a forked process would share torch's threads and locks


@contextmanager
def shared_threads(jobs: int) -> Iterator[None]:
    """Each of several processes gets its share of the threads inside, one alone keeps what it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


_EVERY = 0.5  # seconds between two looks at what the workers have done
_done: Any = None  # shared with the parent: the number of its run, and the jobs and parts of jobs that are done in it


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside never hear Ctrl-C, also while they import; this one hears it at the end."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(threads: int, setup: Callable[..., None] | None = None, *settings: Any) -> None:
    """Begin a worker process: limit its threads, end it with its parent, call `setup(*settings)`, then silence it.

    All that is imported by then is out of the garbage collection with which Trainer begins, see `quieten`: it took as
    long as half of a training of 40 small steps.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but its parent ends it
    in_background(_leave_with_parent)
    torch.set_num_threads(threads)
    if setup:
        setup(*settings)
    quieten()


def _leave_with_parent() -> None:
    """End this process once its parent was killed, which could not end it: it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_in_pool(done: Any, *arguments: Any) -> None:
    global _done
    _done = done
    start_worker(*arguments)


def _add(run: float, share: float) -> None:
    with _done.get_lock():
        if _done[0] == run:  # of a run that failed the last jobs may end during the next one
            _done[1] += share


def _do(run: float, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    with telling(partial(_add, run)):
        return function(*given)


class WorkerPool:
    """Runs jobs in this process, or shares them among several, and shows how many are done.

    Args:
        jobs: processes; 1: this one, without any worker.
        console: where to show progress.
        setup: called as `setup(*settings)` in each worker when it starts, not in this process.
        settings: for `setup`.

    Example:
        >>> with WorkerPool(2, Console()) as pool:
        ...     pool.run("train", train_once, [(1e-3,), (1e-2,)])
    """

    def __init__(self, jobs: int, console: Console, setup: Callable[..., None] | None = None, *settings: Any) -> None:
        self._console = console
        self._pool = None
        if jobs > 1:
            self._done = SPAWN.Array("d", 2)
            initargs = (self._done, torch.get_num_threads(), setup, *settings)
            self._pool = ProcessPoolExecutor(jobs, SPAWN, _start_in_pool, initargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What `function` gives for each of the arguments; they are begun in their order.

        Raises:
            SurgicalError: a worker was killed. What a job raises goes through, and no further one is begun.
        """
        began = time.perf_counter()
        with Stages(self._console) as stages:
            stages.begin(title, len(arguments))
            run = self._here if self._pool is None else partial(self._shared, self._pool)
            results = run(function, arguments, stages)
            stages.say(f"{title}: {len(arguments)} in {clock(time.perf_counter() - began)}")
        return results

    def _here(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], stages: Stages) -> list[Any]:
        results = []
        for given in arguments:
            with telling(stages.advance):
                results.append(function(*given))
        return results

    def _shared(
        self,
        pool: ProcessPoolExecutor,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        stages: Stages,
    ) -> list[Any]:
        futures = []
        try:
            run = self._done[0] + 1
            with self._done.get_lock():
                self._done[:] = [run, 0.0]
            with deaf_to_interrupts():
                futures += [pool.submit(_do, run, function, given) for given in arguments]
            left = set(futures)
            while left:
                finished, left = wait(left, _EVERY, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                stages.reach(self._done[1])
        except BrokenProcessPool as error:
            raise SurgicalError(
                "a worker process was killed, perhaps for want of memory: free some, or let fewer processes share "
                "the work, and run the same again. A comparison keeps what is finished."
            ) from error
        except KeyboardInterrupt:
            for process in list(pool._processes.values()):  # what they do may take minutes, and is written whole
                process.terminate()
            raise
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]
