"""Commands that are killed at random moments and run again until they are done, into `benchmarks/kills.md`.

    python benchmarks/kills.py                 # about 40 minutes on one core; goes on where it stopped
    python benchmarks/kills.py --kills 2       # of each recipe

SIGKILL, SIGTERM and SIGINT take turns; the last goes to all processes of the command, as from a terminal. What a
command leaves once it is done is compared with what it leaves when nobody kills it: weights and numbers to the bit,
all but times and sizes of memory. A command runs in a process that is forked when all is imported, which is where
Python spends most of so short a run; it is killed up to four times before it is let go to its end. `work/kills.jsonl`
has a line for each such chain of kills; lines of other code are ignored.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
os.environ |= QUIET  # for worker processes, too; before libraries read it

import torch  # noqa: E402

import surgical_peft  # noqa: E402
from surgical_peft.experiments.recipe.sections import SelectionSection  # noqa: E402
from surgical_peft.experiments.training.provenance import machine, today, versions  # noqa: E402
from tests.support.toy_tasks import SIZES, TOY_TASKS  # noqa: E402

HERE = Path(__file__).parent
WORK = HERE / "work" / "kills.jsonl"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: -15, signal.SIGINT: 130}  # of a command that a signal has ended
IN_A_ROW = 4  # kills before a command is let go to its end
HANGS = 120.0  # seconds after which a command is taken to hang
LINGERS = 60.0  # seconds that the children of a killed command have to end
DIFFER = ("date", "seconds", "ms", "ms_ratio", "choosing_seconds", "peak_memory", "peak_bytes", "cost", "rounds")


@dataclass(frozen=True)
class Case:
    """A command with a recipe.

    Attributes:
        title: in the table.
        command: `train`, `search` or `compare`.
        task: whose toy model and data are used.
        keys: of the recipe.
        options: of the command.
        kills: so many at least.
        lora: of a mixed adapter, which no recipe has.
    """

    title: str
    command: str
    task: str
    keys: dict[str, Any]
    options: tuple[str, ...] = ()
    kills: int = 7
    lora: dict[str, Any] | None = None


SAVING = {"num_train_epochs": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5}


def training(title: str, task: str = "text_classification", lora: Any = None, **keys: Any) -> Case:
    """A training of 48 steps, with a checkpoint at each fifth."""
    fixed = {"blocks": ["0", "1", "head"], "learning_rate": 1e-2, "seed": 3, **SAVING}
    return Case(title, "train", task, {**fixed, **keys}, lora=lora)


SEARCHED = {"metric": "log_likelihood", "rates": [1e-2, 3e-2], "seeds": [0, 1], "num_train_epochs": 3}
COMPARED = {
    **SEARCHED,
    "methods": [
        "full",
        "head",
        {"lora": {"rank": 4, "head": False}},
        {"policy": {"name": "lisa", "options": {"num_blocks": 1, "every": 1}}},
        {"top_k": {"criterion": "rgn", "k": 1}},
    ],
}
JOURNAL = ("--storage", "journal:///run/study.log")
CASES = [
    training("no policy, blocks chosen", blocks="auto", criterion="rgn", num_blocks=2),
    training("badam", policy="badam", policy_options={"every": 4}),
    training("lisa", policy="lisa", policy_options={"num_blocks": 1, "every": 3}),
    training("auto_rgn", "image_classification", policy="auto_rgn"),
    training("gradual_unfreezing", policy="gradual_unfreezing", dataloader_num_workers=1),
    training("LoRA beside blocks", "causal_lm", blocks=["1"], lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    training("new head, one checkpoint kept", new_head=True, save_total_limit=1, policy="auto_snr"),
    training("early stopping", early_stopping_patience=6, save_strategy="epoch", save_steps=None),
    Case("SQLite, 1 job", "search", "causal_lm", SEARCHED, (), 13),
    Case("SQLite, 2 jobs", "search", "causal_lm", SEARCHED, ("--jobs", "2"), 13),
    Case("journal, 1 job", "search", "causal_lm", SEARCHED, JOURNAL, 13),
    Case("journal, 2 jobs", "search", "causal_lm", SEARCHED, (*JOURNAL, "--jobs", "2"), 13),
    Case("full, head, LoRA, lisa, top 1 by RGN; 1 job", "compare", "causal_lm", COMPARED, (), 26),
    Case("the same, 2 jobs", "compare", "causal_lm", COMPARED, ("--jobs", "2"), 26),
]


@dataclass
class Ended:
    """The end of a command: its exit code, None if it had to be ended; its last words; children that outlived it."""

    code: int | None
    words: str
    seconds: float
    left: int
    was_killed: bool


def write_case(case: Case, folder: Path) -> None:
    """The toy model and data of a case, and its recipe."""
    SIZES["validation"] = 16  # advice needs 12
    recipe = TOY_TASKS[case.task](folder / "toy")
    keys = {**recipe.keys(), "use_cpu": True, "output_dir": "run", **case.keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))


def forked(work: Callable[[], int], folder: Path) -> tuple[int, int]:
    """The process that does `work` in a folder as if started from a terminal, and a pipe for what it says."""
    sys.stdout.flush()
    ear, mouth = os.pipe()  # not a file, which may have a limit
    fcntl.fcntl(mouth, fcntl.F_SETPIPE_SZ, 2**20)
    if pid := os.fork():
        os.close(mouth)
        os.set_blocking(ear, False)
        return pid, ear
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # is ignored where a script has started this
        os.dup2(mouth, 1)
        os.dup2(mouth, 2)
        os.close(ear)
        os.chdir(folder)
        tempfile.tempdir = None
        code = work()
    except KeyboardInterrupt:
        code = 130
        print("KeyboardInterrupt outside of the command", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:  # as Python ends
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def command_line(case: Case) -> Callable[[], int]:
    """The command of a case, to be called in a process of its own."""

    def work() -> int:
        if case.lora:
            config = SelectionSection.config
            SelectionSection.config = lambda recipe: replace(config(recipe), lora=case.lora)  # type: ignore[method-assign]
        sys.argv = ["surgical-peft", case.command, "recipe.yaml", *case.options]
        try:
            importlib.import_module("surgical_peft.__main__").main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return work


def ran(work: Callable[[], int], folder: Path, after: float | None = None, number: int = signal.SIGKILL) -> Ended:
    """Run a command to its end, or until it is killed `after` so many seconds."""
    began = time.monotonic()
    pid, ear = forked(work, folder)
    deadline, was_killed = began + (HANGS if after is None else after), False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            code: int | None = os.waitstatus_to_exitcode(status)
            break
        if now > deadline and (was_killed or after is None):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = None
            break
        if now > deadline:
            try:
                (os.killpg if number == signal.SIGINT else os.kill)(pid, number)
            except ProcessLookupError:  # it has no session of its own yet
                os.kill(pid, number)
            was_killed, deadline = True, now + HANGS
        time.sleep(0.002)
    seconds = time.monotonic() - began
    return Ended(code, heard(ear), seconds, left_of(pid), was_killed)


def heard(ear: int) -> str:
    """What a process has said into its pipe."""
    text = b""
    with suppress(BlockingIOError):  # a child may still hold the other end
        while part := os.read(ear, 2**16):
            text += part
    os.close(ear)
    return text.decode(errors="replace").strip()


def left_of(session: int) -> int:
    """How many processes of a session outlive their parent by `LINGERS`; they are ended."""
    deadline = time.monotonic() + LINGERS
    while alive := [process for process in psutil.process_iter(["status"]) if is_of(process, session)]:
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()
            return len(alive)
        time.sleep(0.05)
    return 0


def is_of(process: psutil.Process, session: int) -> bool:
    """Whether it runs, in this session."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def contents(folder: Path) -> dict[str, Any]:
    """What a command has left, by file: numbers without times, digests of weights, lines of a record."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
            if path.name == "trainer_state.json":
                del found[name]["log_history"]  # a loss that Trainer logs is a mean since the last one, or the start
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = path.read_text()
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            found[name] = state_digest(torch.load(path, weights_only=False))
        else:  # tables and cards tell times; studies and pictures are made of what is compared
            found[name] = "is there"
    return found


def differences(whole: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Files that are not the same; a checkpoint more, which an interrupt has left, is none."""
    more = [name for name in there if name not in whole and not name.startswith("checkpoint-")]
    return [name for name in whole if whole[name] != there.get(name)] + more


def plain(value: Any) -> Any:
    """The value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in DIFFER}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def state_digest(value: Any) -> Any:
    """Plain data with a digest of each tensor."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): state_digest(inner) for key, inner in value.items()}
    return [state_digest(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


@dataclass
class Chain:
    """A command that was killed a few times and then let go to its end.

    Attributes:
        case: its title.
        kills: for each its signal, the seconds after which it came, the exit code and the last words.
        code: of the last run.
        differs: files that are other than of a run that nobody killed.
        left: children that outlived their parents.
    """

    case: str
    kills: list[tuple[int, float, int | None, str]] = field(default_factory=list)
    code: int | None = None
    words: str = ""
    differs: list[str] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0


def chain(
    case: Case, number: int, whole: dict[str, Any], seconds: float, first: int, folder: Path, wanted: int
) -> Chain:
    """Kill a command a few times, let it end, and compare.

    Args:
        case: which command.
        number: of the chain, which says the moments.
        whole: what a run leaves that nobody kills.
        seconds: that it takes.
        first: which signal comes first.
        folder: with model and data.
        wanted: kills, at most.
    """
    dice = random.Random(f"{case.title} {number}")
    shutil.rmtree(folder / "run", ignore_errors=True)
    result, began = Chain(case.title), time.monotonic()
    while True:
        number_of_signal = SIGNALS[(first + len(result.kills)) % len(SIGNALS)]
        after = dice.uniform(0, seconds) if len(result.kills) < min(IN_A_ROW, wanted) else None
        ended = ran(command_line(case), folder, after, number_of_signal)
        result.left += ended.left
        if ended.was_killed and ended.code != 0:
            result.kills.append((number_of_signal, round(after or 0, 3), ended.code, ended.words[-400:]))
            continue
        result.code, result.words = ended.code, ended.words[-400:]
        there = contents(folder / "run")
        result.differs = differences(whole, there)
        result.seconds = round(time.monotonic() - began, 1)
        return result


def chains(case: Case, kills: int, version: str) -> list[Chain]:
    """All chains of a case, those of an earlier start of this command among them."""
    lines = [json.loads(line) for line in WORK.read_text().splitlines()] if WORK.exists() else []
    done = [
        Chain(**line["chain"]) for line in lines if line["version"] == version and line["chain"]["case"] == case.title
    ]
    if sum(len(one.kills) for one in done) >= kills:
        return done
    with scratch() as folder:
        toys = ran(lambda: write_case(case, folder) or 0, folder)
        assert toys.code == 0, toys.words
        ended = ran(command_line(case), folder)  # the first one also compiles and loads what all need
        assert ended.code == 0, ended.words
        whole = contents(folder / "run")
        shutil.rmtree(folder / "run")
        ended = ran(command_line(case), folder)
        again = contents(folder / "run")
        assert whole == again, f"{case.title}: two runs that nobody killed differ: {differences(whole, again)}"
        while (count := sum(len(one.kills) for one in done)) < kills:
            one = chain(case, len(done), whole, ended.seconds, count, folder, kills - count)
            done.append(one)
            with WORK.open("a") as file:
                file.write(json.dumps({"version": version, "chain": vars(one)}) + "\n")
            print(f"{case.command}, {case.title}: {count + len(one.kills)} of {kills} kills, differs: {one.differs}")
            for problem in problems(one):
                print(f"  {problem}", flush=True)
    return done


def problems(one: Chain) -> list[str]:
    """What else was wrong with a chain than another result."""
    found = [f"{one.left} children left"] if one.left else []
    if one.code != 0:
        found.append(f"the rerun ended with {one.code}: {one.words[-300:]}")
    for number, after, code, words in one.kills:
        name = signal.Signals(number).name
        if code is None:
            found.append(f"hung after {name} at {after} s")
        elif code != CODES[signal.Signals(number)]:
            found.append(f"exit code {code} after {name} at {after} s: {words[-200:]}")
        elif (number == signal.SIGINT and not words) or "Traceback" in words:
            found.append(f"a traceback or nothing after {name} at {after} s: {words[-200:]}")
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; that of `tempfile` would be removed by the first forked process that ends."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def fingerprint(script: str = __file__) -> str:
    """Changes with the code under test and with this script."""
    files = [Path(__file__), Path(script), *sorted(Path(surgical_peft.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def table(results: Iterable[tuple[Case, list[Chain]]]) -> str:
    """The table, and a line on where it is from."""
    lines = [
        "| command | recipe | killed by SIGKILL, SIGTERM, SIGINT | equal | else |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    sums: dict[str, list[int]] = {}
    for case, done in results:
        counts = Counter(kill[0] for one in done for kill in one.kills)
        equal = sum(len(one.kills) for one in done if not one.differs and one.code == 0)
        others = Counter(problem.partition(":")[0] for one in done for problem in problems(one))
        others.update(f"differs: {', '.join(one.differs)}" for one in done if one.differs)
        cells = [case.command, case.title, ", ".join(str(counts[number]) for number in SIGNALS)]
        kills = sum(counts.values())
        cells += [f"{equal} of {kills}", "; ".join(f"{text} ({count})" for text, count in others.items()) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
        total = sums.setdefault(case.command, [0, 0])
        total[0] += equal
        total[1] += kills
    told = "; ".join(f"{command} {equal} of {kills}" for command, (equal, kills) in sums.items())
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return "\n".join(
        [
            *lines,
            "",
            f"Kills after which the command, run again until it was done, left the same to the bit: {told}. SIGINT: "
            "exit code 130 and one line, unless the last column says otherwise; it also counts children that outlived "
            f"their command by {LINGERS:.0f} s. {today()}, {packages}; {machine()}.",
        ]
    )


def import_all() -> None:
    """Import what the commands need, once for all processes that are forked."""
    torch.set_num_threads(1)
    rooms = ("api", "search.study", "experiments.advise.advise", "experiments.start.start", "export.export")
    for name in (*rooms, *(f"experiments.{each}" for each in ("training.train", "search.search", "compare.compare"))):
        importlib.import_module(f"surgical_peft.{name}")


def main() -> None:
    """Kill, compare and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="of each recipe; default is what makes 50 for each command or more")
    parser.add_argument("--only", default="", help="part of the title of the recipes to take; writes no table")
    options = parser.parse_args()
    import_all()
    WORK.parent.mkdir(exist_ok=True)
    cases = [case for case in CASES if options.only in f"{case.command} {case.title}"]
    results = [(case, chains(case, options.kills or case.kills, fingerprint())) for case in cases]
    text = table(results)
    print(text)
    if not options.only and not options.kills:
        (HERE / "kills.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
