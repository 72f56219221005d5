"""Rows of tensors by their keys: in memory up to a number of bytes, beyond it in memory-mapped safetensors files."""

from __future__ import annotations

import secrets
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..atomic_files import whole_file
from .outputs import Row

SEGMENT = 64 * 2**20  # bytes of rows that one file gets


class Store:
    """Where the rows of any number of caches are kept; several processes may share one folder.

    A file is written under another name and renamed when it is whole, so what a kill cuts off is never read; each has
    a name of its own, so nobody writes into another's. Where the folder is full or read-only, one warning tells so,
    and further rows are not kept.

    Args:
        memory: bytes of rows that may be held in memory.
        folder: for the files; None for none: rows beyond `memory` are not kept.

    Attributes:
        held, written: bytes of the rows in memory, and of those that were written to files.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory, self.folder = memory, folder
        self.held = self.written = 0
        self._spaces: dict[str, Rows] = {}

    def rows(self, space: str) -> Rows:
        """The rows of one place in one model, known by `space`."""
        if space not in self._spaces:
            self._spaces[space] = Rows(self, space)
        return self._spaces[space]

    def flush(self) -> None:
        """Write what waits to be written."""
        for rows in self._spaces.values():
            rows.flush()

    def clear(self) -> None:
        """Hold nothing any more; files stay."""
        self._spaces, self.held = {}, 0

    def give_up(self, error: Exception) -> None:
        """Write no more."""
        warnings.warn(
            f"the prefix cache cannot write to {str(self.folder)!r} ({error}): examples that it does not have by now "
            "are computed at every step.",
            stacklevel=2,
        )
        self.folder = None


class Rows:
    """The rows of one place in one model."""

    def __init__(self, store: Store, space: str) -> None:
        self._store, self._space = store, space
        self._held: dict[bytes, Row] = {}
        self._waiting: dict[bytes, Row] = {}
        self._waiting_bytes = 0
        self._files: dict[bytes, tuple[Any, int]] = {}
        self._opened: set[str] = set()
        self._seen = 0

    def __len__(self) -> int:
        return len(self._held) + len(self._waiting) + len(self._files)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or key in self._waiting or key in self._files

    def get(self, key: bytes) -> Row | None:
        """The row, or None."""
        row = self._held.get(key) or self._waiting.get(key)
        if row is None and key in self._files:
            file, count = self._files[key]
            row = [file.get_tensor(f"{key.hex()}.{number}") for number in range(count)]
        return row

    def put(self, key: bytes, row: Row) -> None:
        """Keep a row, where there is room."""
        if key in self:
            return
        size = sum(tensor.nbytes for tensor in row)
        if self._store.held + size <= self._store.memory:
            self._held[key] = row
            self._store.held += size
        elif self._store.folder is not None:
            self._waiting[key] = row
            self._waiting_bytes += size
            if self._waiting_bytes >= SEGMENT:
                self.flush()

    def flush(self) -> None:
        """Write what waits to a file."""
        if not self._waiting or self._store.folder is None:
            return
        name = f"{secrets.token_hex(8)}.safetensors"
        tensors = {f"{k.hex()}.{at}": tensor for k, row in self._waiting.items() for at, tensor in enumerate(row)}
        try:
            (self._store.folder / self._space).mkdir(parents=True, exist_ok=True)
            with whole_file(self._store.folder / self._space / name) as temporary:
                save_file(tensors, temporary)
            self._open(name)
            self._store.written += self._waiting_bytes
        except (OSError, SafetensorError) as error:
            self._store.give_up(error)
        self._waiting, self._waiting_bytes = {}, 0

    def refresh(self) -> None:
        """Read what other runs, or other processes of this one, have written."""
        if self._store.folder is None:
            return
        folder = self._store.folder / self._space
        try:
            changed = folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            names = [path.name for path in folder.glob("[!.]*.safetensors")]
        except OSError:
            return
        self._seen = changed
        for name in set(names) - self._opened:
            try:
                self._open(name)
            except (OSError, SafetensorError) as error:
                warnings.warn(f"{str(folder / name)!r} is damaged ({error}) and is not used.", stacklevel=2)

    def _open(self, name: str) -> None:
        self._opened.add(name)
        assert self._store.folder is not None
        file = safe_open(self._store.folder / self._space / name, framework="pt")
        counts: dict[str, int] = {}
        for entry in file.keys():  # noqa: SIM118  # not a mapping
            key, _, _ = entry.partition(".")
            counts[key] = counts.get(key, 0) + 1
        self._files.update({bytes.fromhex(key): (file, count) for key, count in counts.items()})
