"""Files and folders are written whole or not at all, and nothing is left beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgical_peft import SurgicalError, atomic_files
from surgical_peft.atomic_files import (
    check_replaceable,
    copy_file,
    lies_in,
    only_writer,
    whole_file,
    whole_folder,
    write_text,
)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.json", "é1")
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == "é1"
    write_text(tmp_path / "new" / "a.json", "2")
    assert tree(tmp_path) == {"new/a.json": "2"}


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "scores.png") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "scores.png").exists()
        assert temporary.suffix == ".png" and temporary.parent == tmp_path
    assert tree(tmp_path) == {"scores.png": "new"}


def test_after_an_error_the_old_file_stands(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="full"), whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert tree(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("old", [None, {}, {"x.txt": "old", "y.txt": "old"}])
def test_a_folder_takes_the_place_of_the_old_one(old: dict[str, str] | None, tmp_path: Path) -> None:
    target = tmp_path / "runs" / "adapter"
    if old is not None:
        target.mkdir(parents=True)
        for name, text in old.items():
            (target / name).write_text(text)
    with whole_folder(target, "x.txt") as temporary:
        (temporary / "x.txt").write_text("new")
        assert tree(target) == (old or {})
    assert tree(tmp_path) == {"runs/adapter/x.txt": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("old", [False, True])
def test_after_an_error_the_old_folder_stands(old: bool, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    if old:
        target.mkdir()
        (target / "x.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(target, "x.txt") as temporary:
        (temporary / "x.txt").write_text("new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == ({"adapter/x.txt": "old"} if old else {})
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if old else [])


def test_a_file_in_the_way_of_a_folder_is_kept(tmp_path: Path) -> None:
    """An empty folder with a dot in front was left beside it."""
    (tmp_path / "adapter").write_text("mine")
    with (
        pytest.raises(SurgicalError, match="cannot be replaced"),
        whole_folder(tmp_path / "adapter", "x.txt") as temporary,
    ):
        (temporary / "x.txt").write_text("new")
    assert tree(tmp_path) == {"adapter": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    """`quickstart --output ~/results` deleted whatever was in that folder."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("mine")
    with pytest.raises(SurgicalError, match=r"no x.txt"):
        check_replaceable(tmp_path / "results", "x.txt")
    assert tree(tmp_path) == {"results/thesis.txt": "mine"}


def test_the_current_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgicalError, match="cannot be replaced"):
        check_replaceable(".", "x.txt")


def test_threads_that_write_one_file_at_once(tmp_path: Path) -> None:
    """Temporary names were the process's number alone: half of the writes met a file that another had renamed."""

    def write(number: int) -> str:
        write_text(tmp_path / "scores.json", str(number) * 10_000)
        return (tmp_path / "scores.json").read_text()

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(write, [number % 10 for number in range(200)]))
    assert all(len(text) == 10_000 and len(set(text)) == 1 for text in texts)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize("days", [0, 2])
def test_what_a_killed_process_left_is_removed_once_nobody_can_be_writing_to_it(days: int, tmp_path: Path) -> None:
    file, folder, mine = (
        tmp_path / ".a.0123456789abcdef.txt",
        tmp_path / ".adapter.0123456789abcdef",
        tmp_path / ".a.txt",
    )
    folder.mkdir()
    (folder / "x.txt").write_text("half")
    for path in (file, mine):
        path.write_text("half")
    for path in (file, folder, mine):
        os.utime(path, times=(time.time() - days * 86_400,) * 2)
    write_text(tmp_path / "a.txt", "whole")
    with whole_folder(tmp_path / "adapter", "x.txt") as temporary:
        (temporary / "x.txt").write_text("whole")
    assert file.exists() == folder.exists() == (days == 0)
    assert mine.exists() and tree(tmp_path)["adapter/x.txt"] == "whole"


def test_a_user_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container; it was noticed when the training had ended."""
    monkeypatch.setattr("getpass.getuser", lambda: pytest.fail("asked for the user's name"))
    with whole_folder(tmp_path / "adapter", "x.txt") as temporary:
        (temporary / "x.txt").write_text("new")
    assert tree(tmp_path) == {"adapter/x.txt": "new"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_old_folder_or_the_new_one_is_in_place(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system cannot swap two folders; where it can there is no moment without one."""
    if not exchanges:
        monkeypatch.setattr(atomic_files, "_exchange", lambda one, other: False)
    moves: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        moves.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    for text in ("old", "new"):
        with whole_folder(tmp_path / "adapter", "x.txt") as temporary:
            (temporary / "x.txt").write_text(text)
    assert tree(tmp_path) == {"adapter/x.txt": "new"}
    assert moves[0] == "adapter" and len(moves) == (3 if not exchanges or sys.platform != "linux" else 1)


def test_a_folder_that_several_put_into_place_at_once_is_that_of_one_of_them(tmp_path: Path) -> None:
    def put(number: int) -> None:
        with whole_folder(tmp_path / "result", "marker") as folder:
            (folder / "marker").write_text(str(number))

    for _ in range(30):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, range(4)))
        assert [path.name for path in tmp_path.iterdir()] == ["result"]
        assert (tmp_path / "result" / "marker").read_text() in "0123"


def test_one_process_at_a_time_writes_results_to_a_folder(tmp_path: Path) -> None:
    """Of two trainings in one folder one ended with the adapter of the other."""
    script = f"""
from surgical_peft.atomic_files import only_writer
with only_writer({str(tmp_path / "run")!r}):
    print("writes", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "writes\n"
        with pytest.raises(SurgicalError, match="another process"), only_writer(tmp_path / "run"):
            pass
        other.kill()  # and a lock does not outlive its process
        other.wait()
        with only_writer(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.communicate()


def test_a_folder_without_results_is_removed_and_one_that_cannot_be_written_to_is_told_first(tmp_path: Path) -> None:
    with only_writer(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    with only_writer(tmp_path / "full"):
        (tmp_path / "full" / "x.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"), only_writer(tmp_path / "file"):
        pytest.fail("it cannot be written to")


def test_a_file_that_is_written_again_is_as_private_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    path.chmod(0o600)
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600


def test_what_is_copied_is_a_file_with_its_mode(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "a").chmod(0o640)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "none", "\0"):
        with pytest.raises(SurgicalError):
            copy_file(tmp_path / name, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_which_files_lie_in_a_folder(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (tmp_path / "secret").touch()
    (blobs / "1").touch()
    (snapshot / "own").touch()
    (snapshot / "cached").symlink_to("../../blobs/1")
    (snapshot / "led").symlink_to(tmp_path / "secret")
    assert lies_in(snapshot / "own", snapshot) and lies_in(snapshot / "cached", snapshot)
    assert not lies_in(snapshot / "led", snapshot) and not lies_in(snapshot / "none", snapshot)
    assert not lies_in(snapshot, snapshot)
