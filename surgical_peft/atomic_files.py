"""Writing that is whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import getpass
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .errors import SurgicalError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path with the same suffix; when the block ends without an error it becomes `path`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        with _lock(target):
            _take_the_place_of(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_the_place_of(target: Path, new: Path) -> None:
    old = new.with_name(f"{new.name}.old")
    if target.is_dir():
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _lock(target: Path) -> FileLock:
    """Held while `target` is looked at or replaced, since the workers of a search end together; not kept beside it."""
    known = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"surgical_peft-{getpass.getuser()}-{known}.lock")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: float) -> float | None:
    """The value, or None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def digest_of(path: str | Path) -> str:
    """A digest of a file, or of all files in a folder with their names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:32]}"
