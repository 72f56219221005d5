"""Writing that is whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import SurgicalError

_ABANDONED = 24 * 3600.0  # seconds after which nobody writes to a temporary any more
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path with the same suffix; when the block ends without an error it becomes `path`."""
    target = Path(path)
    temporary = _temporary(target, target.suffix)
    try:
        yield temporary
        _flush(temporary)
        if is_plain_file(target):  # as private as the one that it replaces
            temporary.chmod(stat.S_IMODE(target.lstat().st_mode))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_plain_file(path: str | Path) -> bool:
    """True for a file that is there itself: no link, no folder, no pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):  # none, or a name that none can have
        return False


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """True for a file of a folder, also through a link that stays there, or in the repository in the Hub's cache."""
    root, file = Path(folder).resolve(), Path(path).resolve()
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    root = cache or root  # which keeps the files of all snapshots beside them
    return file.is_file() and file.is_relative_to(root)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file, whole or not at all; with its mode, where the target has none.

    Raises:
        SurgicalError: the source is a link, which may lead anywhere, or no file.
    """
    if not is_plain_file(source):
        raise SurgicalError(f"{str(source)!r} is no file, or a link to one: put the file itself there.")
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary, follow_symlinks=False)
        shutil.copymode(source, temporary)


def _temporary(target: Path, suffix: str) -> Path:
    """A name beside `target` that no other process or thread has; what killed ones left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = target.name.removesuffix(suffix)
    left = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{16}}{re.escape(suffix)}(\.old)?")
    for path in target.parent.glob(f".{glob.escape(stem)}.*"):
        with suppress(FileNotFoundError):  # another process or thread has finished with it
            if left.fullmatch(path.name) and path.lstat().st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    return target.with_name(f".{stem}.{secrets.token_hex(8)}{suffix}")


def _flush(path: Path) -> None:
    """Have what was written reach the disk: after a power cut a name must not stand for an empty file."""
    if os.name != "posix":
        return
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())


def check_replaceable(path: str | Path, marker: str) -> None:
    """Make sure that `path` may be replaced: it is absent, empty, or an earlier result, known by a file `marker`.

    Raises:
        SurgicalError: it holds something else, is a file, or is the current folder.
    """
    target = Path(path)
    if target.resolve() == Path.cwd() or (target.exists() and not target.is_dir()):
        raise SurgicalError(f"{str(target)!r} cannot be replaced by a folder of results: give a new or empty folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise SurgicalError(
            f"{str(target)!r} holds something other than an earlier result (there is no {marker}) and would be lost: "
            "give a new or empty folder."
        )


@contextmanager
def whole_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Gives an empty temporary folder; when the block ends without an error it takes the place of `path`.

    Raises:
        SurgicalError: what is there is not an earlier result, see `check_replaceable`.
    """
    target = Path(path)
    with _lock(target):
        check_replaceable(target, marker)
    temporary = _temporary(target, "")
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        with _lock(target):
            check_replaceable(target, marker)
            _take_the_place_of(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_the_place_of(target: Path, new: Path) -> None:
    if not target.exists():
        new.replace(target)
    elif not _exchange(target, new):
        old = new.with_name(f"{new.name}.old")
        target.replace(old)
        try:
            new.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can: a kill between two would leave no folder in place."""
    if sys.platform != "linux":
        return False
    try:
        exchange = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library without it
        return False
    return bool(
        exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0
    )


def _lock(target: Path, kind: str = "", timeout: float = -1) -> FileLock:
    """Held while `target` is looked at or replaced, since the workers of a search end together; not kept beside it.

    The user is in its name by number: in a container the number may have no name.
    """
    user = os.getuid() if os.name == "posix" else os.environ.get("USERNAME", "")
    known = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"surgical_peft-{user}-{known}{kind}.lock", timeout=timeout)


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Make a folder of results, see that it can be written to, and keep the other processes of this machine from it.

    One that is still empty at the end is removed.

    Raises:
        SurgicalError: another process is writing to it.
        OSError: it cannot be written to.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        with _lock(folder, "-run", timeout=0):
            yield
    except Timeout as error:
        raise SurgicalError(
            f"another process is writing its results to {str(folder)!r}: wait until it has ended, or give another "
            "folder (--output, or output_dir in the recipe)."
        ) from error
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: float) -> float | None:
    """The value, or None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def all_finite(values: Any) -> Any:
    """Plain data with None for each number that JSON has no word for.

    Example:
        >>> all_finite({"losses": [0.5, math.nan]})
        {'losses': [0.5, None]}
    """
    if isinstance(values, dict):
        return {key: all_finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [all_finite(value) for value in values]
    return finite(values) if isinstance(values, float) else values


def digest_of(path: str | Path) -> str:
    """A digest of a file, or of all files in a folder with their names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:32]}"
