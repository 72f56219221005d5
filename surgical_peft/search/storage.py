"""The storage of a search, and the lock that its workers share.

All reading and writing is done under that lock: one of the kernel beside an SQLite or journal file, an advisory lock
in PostgreSQL. Both are freed when their holder dies. Optuna alone would not do: on SQLite two workers can claim the
same waiting trial (there is no SELECT FOR UPDATE), and the lock of its journal outlives a killed process by 30 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from ..errors import SurgicalError

JOURNAL = "journal:///"
SQLITE = "sqlite:///"
Lock = Callable[[], AbstractContextManager[Any]]


def lock_and_storage(url: str | None, name: str) -> tuple[Lock, Callable[[], BaseStorage]]:
    """The lock that all workers share, and what opens the storage once it is held.

    Raises:
        SurgicalError: `url` is of no kind that is supported.
    """
    if url is None:
        return nullcontext, InMemoryStorage
    if url.startswith(JOURNAL) and len(url) > len(JOURNAL):
        path = url.removeprefix(JOURNAL)
        lock = FileLock(f"{path}.guard")
        backend = cast(Any, lock)  # Optuna asks for acquire() and release(); this thread holds it whenever it writes
        return lambda: _beside(path, lock, mend=True), lambda: JournalStorage(JournalFileBackend(path, backend))
    if url.startswith(SQLITE) and ":memory:" not in url:
        path = url.removeprefix(SQLITE).partition("?")[0]
        lock = FileLock(f"{path}.guard")
        patient = {"connect_args": {"timeout": 60}}  # a dashboard may be reading
        return lambda: _beside(path, lock), lambda: RDBStorage(url, engine_kwargs=patient)
    if url.startswith("postgresql"):
        _check_url(url)
        engine = cache(lambda: create_engine(url))  # made when first used: its driver may be missing
        return lambda: _in_postgresql(engine(), name), lambda: RDBStorage(url)
    raise SurgicalError(
        f"storage={shown(url)!r} is not supported: use 'sqlite:///folder/study.db' (workers of one machine), "
        "'journal:///folder/study.log' (a folder that the workers share), 'postgresql+psycopg://user@host/database' "
        "(any workers), or None to keep nothing. A path after three slashes is relative to the working directory, "
        "after four it is absolute."
    )


def _check_url(url: str) -> None:
    """Refuse a URL that is read otherwise than it was meant, by which a part of its password may reach a message."""
    try:
        host = make_url(url).host or ""
    except (SQLAlchemyError, ValueError):
        host = "@"
    if "@" in host:
        raise SurgicalError(
            f"storage={shown(url)!r} is no URL that can be read: write "
            "postgresql+psycopg://user:password@host:5432/database, special characters of the password in percent, "
            "such as %40 for @."
        ) from None


@contextmanager
def _beside(path: str, lock: FileLock, mend: bool = False) -> Iterator[None]:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).exists() and not Path(path).is_file():  # a named pipe would be waited for
        raise OSError("it is no file")
    with lock.acquire(poll_interval=0.01):
        if mend:
            _mend(Path(path))
        yield


def _mend(journal: Path) -> None:
    """Cut off a last line that a full disk or a kill left unfinished: the next one would be written into it."""
    if not journal.exists() or not journal.stat().st_size:
        return
    with journal.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def _in_postgresql(engine: Engine, name: str) -> Iterator[None]:
    with engine.begin() as connection:  # the lock ends with the transaction, and that with the connection
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '60s'"))  # if a machine loses power
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"surgical_peft {name}"})
        yield


def shown(url: str | None) -> str:
    """The storage for a message, without its password."""
    return "memory" if url is None else re.sub(r"(//[^:/@]*):.*@", r"\1:***@", url)
