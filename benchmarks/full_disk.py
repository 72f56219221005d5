"""Every command that writes: on a full disk, in a read-only folder, beside a second one of its kind, interrupted.

    python benchmarks/full_disk.py             # about 20 minutes on one core; goes on where it stopped

The table in `benchmarks/full_disk.md` says how each command ended, whether what it left where results stand is whole,
and whether the same command again, once there is room, leaves what an undisturbed one does. A disk is full in two
ways: files may not grow beyond some bytes (`RLIMIT_FSIZE`), or the file system of the output, a tmpfs, has so many
bytes left. Mounting needs root; without it only the first way is tried, and the table says so. `work/full_disk.jsonl`
has a line for each try.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kills import (
    HERE,
    Case,
    Ended,
    contents,
    differences,
    fingerprint,
    forked,
    heard,
    import_all,
    left_of,
    ran,
    scratch,
)
from kills import write_case as write_toy

from surgical_peft.__main__ import main as run_command
from surgical_peft.cli.main import app
from surgical_peft.experiments.training.provenance import machine, today, versions

WORK = HERE / "work" / "full_disk.jsonl"
OUT = "disk/out"
KEYS = {"blocks": "auto", "criterion": "rgn", "learning_rate": 1e-2, "seed": 3, "num_train_epochs": 2, "rates": [1e-2]}
KEYS |= {"save_strategy": "epoch", "methods": ["full", "head", {"lora": {"rank": 4}}]}
KEYS |= {"tiny": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}}
CASE = Case("", "train", "text_classification", KEYS)
COMMANDS = {
    "start": ["toy/model", "toy/data", "--recipe", f"{OUT}/recipe.yaml"],
    "score": ["recipe.yaml", "--plot", f"{OUT}/scores.png"],
    "train": ["recipe.yaml", "--output", OUT],
    "train --tiny": ["recipe.yaml", "--output", OUT],
    "search": ["recipe.yaml", "--output", OUT],
    "compare": ["recipe.yaml", "--output", OUT],
    "advise": ["recipe.yaml", "--output", OUT],
    **{f"export --format {kind}": ["made/adapter", OUT] for kind in ("peft", "merged", "delta", "lora")},
    "export --format adapter": ["delta", OUT],
    "card": [OUT],
    "quickstart": ["--output", OUT, "--epochs", "0.1"],
}
WRITE_NOTHING = {"blocks", "recipe", "predict", "push"}  # on this machine
LONG = {"quickstart"}  # takes minutes: disturbed where that ends it soon, and not run again
SHORT = 20.0  # seconds in which it is interrupted
ENDS_IT_SOON = ("read-only", "0 bytes left", "SIGINT, moment 1", "SIGINT, moment 2", "SIGINT, moment 3")
UNFINISHED = ("study", "runs", "weights", "choices", "checkpoint-", "unfinished.json")  # what a rerun goes on from
ROOM = 64  # MB of the tmpfs
MARGINS = (0, 4_096, 16_384)  # bytes that a disk has left
LIMITS = (0, 1_000, 10_000)  # bytes of a file


@dataclass
class Try:
    """A command that was disturbed, and the same again.

    Attributes:
        command, how: which, and by what it was disturbed.
        code: its exit code; of two at once both.
        words: its last line.
        half: files where results stand that are other than of a command that nobody disturbed.
        left: children that outlive it.
        hidden: temporary files that stay.
        rerun: the exit code of the same command again.
        differs: files that it then leaves otherwise.
        faults: what is wrong with that.
    """

    command: str
    how: str
    code: list[int | None] = field(default_factory=list)
    words: str = ""
    half: list[str] = field(default_factory=list)
    left: int = 0
    hidden: list[str] = field(default_factory=list)
    rerun: int | None = None
    differs: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def line_of(command: str) -> list[str]:
    """A command as it is typed."""
    name, *options = command.split()
    return [name, *COMMANDS[command], *options]


def work_of(command: str, limit: int | None = None) -> Callable[[], int]:
    """The command, to be called in a process of its own; with a limit of the size of a file, in bytes."""

    def work() -> int:
        sys.argv = ["surgical-peft", *line_of(command)]
        if limit is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            run_command()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return work


class Disk:
    """The folder that holds the output: a small tmpfs, where mounting is allowed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(folder)]
        self.is_mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def empty(self, command: str) -> None:
        """As before the command; a card is written for a run that is there."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if command == "card":
            shutil.copytree(self.folder.parent / "made", self.folder / "out")
            (self.folder / "out" / "adapter" / "README.md").unlink()
        elif command in ("start", "score"):  # they take the name of a file
            (self.folder / "out").mkdir()

    def fill(self, margin: int) -> None:
        """Leave so many bytes."""
        stat = os.statvfs(self.folder)
        with (self.folder / ".ballast").open("wb") as ballast:
            ballast.write(bytes(max(0, stat.f_bavail * stat.f_frsize - margin)))

    def free(self) -> None:
        """Give the room back."""
        (self.folder / ".ballast").unlink(missing_ok=True)

    def set_read_only(self, is_read_only: bool) -> None:
        """Forbid writing, or allow it."""
        mode = "ro" if is_read_only else "rw"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True, capture_output=True)

    def close(self) -> None:
        """Unmount it."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def disturbed(command: str, disk: Disk, seconds: float) -> Iterator[tuple[str, Callable[[], list[Ended]]]]:
    """The ways to disturb a command: what each is called, and what does it."""
    folder, dice = disk.folder.parent, random.Random(command)
    for limit in LIMITS:
        yield f"files of {limit:,} bytes at most", lambda limit=limit: [ran(work_of(command, limit), folder)]
    if disk.is_mounted:
        for margin in MARGINS:

            def full(margin: int = margin) -> list[Ended]:
                disk.fill(margin)
                ended = ran(work_of(command), folder)
                disk.free()
                return [ended]

            yield f"{margin:,} bytes left", full

        def read_only() -> list[Ended]:
            disk.set_read_only(True)
            try:
                return [ran(work_of(command), folder)]
            finally:
                disk.set_read_only(False)

        yield "read-only", read_only

    yield "two at once", lambda: two(command, folder)
    for number in range(3):
        after = dice.uniform(0, seconds)
        yield (
            f"SIGINT, moment {number + 1}",
            lambda after=after: [ran(work_of(command), folder, after, signal.SIGINT)],
        )
    yield "SIGINT, from the start of Python", lambda: [from_the_start(command, folder, dice.uniform(0, 5 + seconds))]


def two(command: str, folder: Path) -> list[Ended]:
    """Two of the same, a tenth of a second apart."""
    began, pids = time.monotonic(), []
    for _ in range(2):
        pids.append(forked(work_of(command), folder))
        time.sleep(0.1)
    ended = []
    for pid, ear in pids:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        ended.append(Ended(code, heard(ear), time.monotonic() - began, left_of(pid), False))
    return ended


def from_the_start(command: str, folder: Path, after: float) -> Ended:
    """The command as a shell starts it, interrupted, also while it imports what it needs."""
    began = time.monotonic()
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "surgical_peft", *line_of(command)],
            cwd=folder,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        was_killed = False
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            was_killed = True
        code = process.wait(120)
    return Ended(
        code,
        (folder / "said.txt").read_text(errors="replace").strip(),
        time.monotonic() - began,
        left_of(process.pid),
        was_killed,
    )


def judged(one: Try, ended: list[Ended]) -> list[str]:
    """What is wrong with the end of a command and with what it leaves."""
    faults = []
    for end in ended:
        lines = end.words.splitlines() or [""]
        # -2 is 130 to a shell, too: so Python ends where it was interrupted in code that it had made itself
        is_interrupted = end.was_killed and end.code in (130, -2) and lines[-1].startswith("interrupted.")
        is_error = end.code == 2 and sum(line.startswith("error: ") for line in lines) == 1
        if "Traceback" in end.words:
            faults.append("a traceback")
        elif not (end.code == 0 or is_error or is_interrupted):
            faults.append(f"exit code {end.code}: {lines[-1][:80]}")
    faults += [f"half: {', '.join(one.half)}"] if one.half else []
    faults += [f"{one.left} children left"] if one.left else []
    faults += [f"stays: {', '.join(one.hidden)}"] if one.hidden else []
    faults += [f"the rerun ends with {one.rerun}"] if one.rerun else []
    faults += [f"the rerun differs: {', '.join(one.differs)}"] if one.differs else []
    return faults


def tried(command: str, how: str, disturb: Callable[[], list[Ended]], disk: Disk, whole: dict[str, Any] | None) -> Try:
    """Disturb a command, look at what it leaves, and run it again."""
    one, folder = Try(command, how), disk.folder.parent
    disk.empty(command)
    before = contents(disk.folder / "out")
    ended = disturb()
    left = contents(disk.folder / "out")
    one.code = [130 if end.code == -2 else end.code for end in ended]
    one.words = " / ".join(last_line(end) for end in ended)
    one.left = sum(end.left for end in ended)
    known = whole or {}
    one.half = [
        name for name, now in left.items() if is_result(name) and now not in (known.get(name), before.get(name))
    ]
    one.hidden = [path.name for path in disk.folder.rglob(".*") if path.name != ".ballast"]
    if whole is not None:
        is_done = command == "start" and "recipe.yaml" in left  # which it does not replace
        again = Ended(0, "", 0.0, 0, False) if is_done else ran(work_of(command), folder)
        one.rerun = again.code
        one.differs = differences(whole, contents(disk.folder / "out"))
    one.faults = judged(one, ended)
    if one.rerun:
        one.faults.append(again.words[-300:])
    return one


def is_result(name: str) -> bool:
    """Whether a file stands where results do, and not among what a rerun goes on from."""
    return not any(part.startswith(UNFINISHED) for part in name.split("/"))


def last_line(end: Ended) -> str:
    """The last line that a command said, or of its traceback."""
    errors = [line for line in end.words.splitlines() if line.startswith(("error: ", "interrupted."))]
    return (errors or end.words.splitlines() or [""])[-1][:400]


@contextmanager
def prepared() -> Iterator[Disk]:
    """A folder with model, data, recipe, a finished run and a delta of it, and a disk."""
    with scratch() as folder:
        ended = ran(lambda: write_toy(CASE, folder) or 0, folder)
        assert ended.code == 0, ended.words
        disk = Disk(folder / "disk")
        try:
            for command, made in (("train", "made"), ("export --format delta", "delta")):
                ended = ran(work_of(command), folder)
                assert ended.code == 0, ended.words
                shutil.copytree(folder / OUT, folder / made)
                shutil.rmtree(folder / OUT)
            yield disk
        finally:
            disk.close()


def tries() -> list[Try]:
    """All tries, those of an earlier start of this command among them."""
    version = fingerprint(__file__)
    lines = [json.loads(line) for line in WORK.read_text().splitlines()] if WORK.exists() else []
    done = {(line["command"], line["how"]): Try(**line) for line in lines if line.pop("version") == version}
    with prepared() as disk:
        for command in COMMANDS:
            disk.empty(command)
            whole, seconds = None, SHORT
            if command not in LONG:
                ended = ran(work_of(command), disk.folder.parent)
                assert ended.code == 0, f"{command}: {ended.words}"
                whole, seconds = contents(disk.folder / "out"), ended.seconds
            for how, disturb in disturbed(command, disk, seconds):
                if (command, how) in done or (command in LONG and how not in ENDS_IT_SOON):
                    continue
                one = done[command, how] = tried(command, how, disturb, disk, whole)
                with WORK.open("a") as file:
                    file.write(json.dumps({"version": version, **asdict(one)}) + "\n")
                print(f"{command}, {how}: {one.code} {one.words[:150]}", *one.faults, sep="\n    ", flush=True)
    return list(done.values())


GROUPS = {
    "full disk": ("bytes",),
    "read-only": ("read-only",),
    "two at once": ("two",),
    "SIGINT": ("SIGINT",),
}


def group_of(one: Try) -> str:
    """The column of a try."""
    return next(group for group, words in GROUPS.items() if any(word in one.how for word in words))


def cell(found: list[Try]) -> str:
    """The exit codes, how many reruns left the same, and all that was wrong."""
    if not found:
        return "-"
    codes = ", ".join(dict.fromkeys(" and ".join(map(str, sorted(one.code, key=str))) for one in found))
    again = [one for one in found if one.rerun is not None]
    equal = sum(one.rerun == 0 and not one.differs for one in again)
    faults = "; ".join(dict.fromkeys(fault for one in found for fault in one.faults))
    return codes + f"; {equal} of {len(again)}" * bool(again) + f"; **{faults}**" * bool(faults)


def table(found: list[Try], is_mounted: bool) -> str:
    """The table, and an example of each thing that is said."""
    lines = [f"| command | {' | '.join(GROUPS)} |", f"| --- |{' --- |' * len(GROUPS)}"]
    for command in COMMANDS:
        groups = [[one for one in found if one.command == command and group_of(one) == group] for group in GROUPS]
        lines.append(f"| `{command}` | {' | '.join(map(cell, groups))} |")
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines += ["", "Exit codes; after how many the same command, run again, left what an undisturbed one leaves."]
    lines[-1] += (
        " Code 0: there was room enough, or it had ended. In bold would stand: files half-written where results are, "
        "children or temporary files left, a traceback, more than one line, another result of the rerun."
    )
    lines[-1] += " Nothing could be mounted here." * (not is_mounted)
    lines[-1] += f" {today()}, {packages}; {machine()}."
    lines += ["", "| `train` | says |", "| --- | --- |"]
    for one in found:
        if one.command == "train" and set(one.code) - {0}:
            error = next(words for words in one.words.split(" / ") if words.startswith(("error", "interrupted")))
            lines.append(f"| {one.how} | {error.replace('|', ' ')} |")
    return "\n".join(lines)


def main() -> None:
    """Disturb every command and write the table."""
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert known == {command.split()[0] for command in COMMANDS} | WRITE_NOTHING, f"commands: {known}"
    import_all()
    WORK.parent.mkdir(exist_ok=True)
    found = tries()
    text = table(found, any("left" in one.how for one in found))
    print(text)
    (HERE / "full_disk.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
