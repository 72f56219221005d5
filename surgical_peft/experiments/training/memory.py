"""How much memory something takes at its highest."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

_EVERY = 0.02  # seconds between two looks at the process


class PeakMemory:
    """Measures the highest memory, in bytes, while it is entered.

    On an accelerator all that its allocator gave out. On the CPU the resident size of the whole process, looked at
    every 20 ms: its libraries and data count too, and freed memory that it has not given back, so trainings that
    follow each other in one process differ by little there.

    Attributes:
        bytes: what was found, once it is left.

    Example:
        >>> with PeakMemory() as peak:
        ...     trainer.train()
        >>> peak.bytes
        734003200
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        self._on_accelerator = torch.accelerator.is_available()
        if self._on_accelerator:
            torch.accelerator.reset_peak_memory_stats()
            return self
        self._process = psutil.Process()
        self._done = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_accelerator:
            self.bytes = torch.accelerator.max_memory_allocated()
            return
        self._look()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)
