"""An interrupted training: Ctrl-C saves a checkpoint after the step at hand, and the same training again goes on."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...atomic_files import write_text
from ...errors import SurgicalError
from ...typed_json import read_json

_FILE = "unfinished.json"  # in the folder of the results, and in each checkpoint


class Unfinished:
    """What a training that has not ended yet keeps for its next start, in the folder of its results.

    Attributes:
        folder: of the results.
        identity: plain data that tell one training from another.
        known: what an earlier start of the same training had chosen and measured; empty at the first.
        checkpoint: the newest checkpoint of the same training; None if there is none.
        is_other: whether checkpoints lie there of an unfinished training with another recipe, model or data.

    Example:
        >>> unfinished = Unfinished(Path("runs/mine"), {"recipe": recipe.keys()})
        >>> unfinished.keep(before={"validation": 0.1})
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity, sort_keys=True, default=str))
        self._began = time.monotonic()
        kept = _read(folder / _FILE)
        is_same = kept is not None and kept.get("identity") == self.identity
        known = kept.get("known") if kept is not None and is_same else None
        self.known: dict[str, Any] = known if isinstance(known, dict) else {}
        self.checkpoint = self._newest() if is_same else None
        self.is_other = kept is not None and not is_same and bool(self._marked())

    @property
    def seconds(self) -> float:
        """The time that the training has taken, its earlier starts included."""
        return float(self.known.get("seconds", 0.0)) + time.monotonic() - self._began

    def tell(self, say: Callable[[str], None]) -> None:
        """Say what this start goes on with, or that it starts over."""
        if self.checkpoint:
            say(f"goes on from {self.checkpoint}, where this training was interrupted")
        elif self.known:
            say(f"goes on with what an interrupted start of this training has left in {self.folder}")
        elif self.is_other:
            say(f"starts over: the checkpoints in {self.folder} are of another recipe, model or data")

    def keep(self, **known: Any) -> None:
        """Keep what the next start of the same training need not do again."""
        self.known |= known
        write_text(self.folder / _FILE, json.dumps({"identity": self.identity, "known": self.known}, indent=1) + "\n")

    def interrupted(self) -> str:
        """Keep the time that it has taken, and say what is kept and how to go on."""
        if not self.known:
            return "Nothing was trained yet, and nothing is kept."
        self.keep(seconds=self.seconds)
        if kept := self._newest():
            return f"Kept: {kept} (step {_step(kept)}). The same command goes on from there."
        return f"Kept in {self.folder}: what was chosen and measured before. The same command goes on from there."

    def finished(self, keeps_checkpoints: bool) -> None:
        """Forget all that was kept; with `keeps_checkpoints` all but the checkpoints, as the recipe asks for them."""
        (self.folder / _FILE).unlink(missing_ok=True)
        for checkpoint in self._checkpoints():
            if keeps_checkpoints:
                (checkpoint / _FILE).unlink()
            else:
                shutil.rmtree(checkpoint)

    def mark(self, checkpoint: Path) -> None:
        """Write into a checkpoint that is whole which training it is of, and how large its files are."""
        files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
        files.pop(_FILE, None)
        write_text(checkpoint / _FILE, json.dumps({"identity": self.identity, "files": files}) + "\n")

    def _newest(self) -> Path | None:
        return max(filter(_is_whole, self._checkpoints()), key=_step, default=None)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self._marked() if (_read(path / _FILE) or {}).get("identity") == self.identity]

    def _marked(self) -> list[Path]:
        folders = self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        return [path for path in folders if _step(path) >= 0 and (path / _FILE).exists()]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, "")
    except SurgicalError:  # none, or what is no longer whole: then the training starts over
        return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether no file is missing or cut off: a kill may come while Trainer deletes an old checkpoint."""
    sizes = (_read(checkpoint / _FILE) or {}).get("files", {})  # versions before did not note them
    if not isinstance(sizes, dict):
        return False
    files = {checkpoint / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size >= size for path, size in files.items())


def stopped_early(checkpoint: Path) -> int | None:
    """The step at which a training had stopped early before it was interrupted; None if it had not."""
    state = _read(checkpoint / TRAINER_STATE_NAME) or {}
    try:
        kept = state["stateful_callbacks"][EarlyStoppingCallback.__name__]
        is_over = kept["attributes"]["early_stopping_patience_counter"] >= kept["args"]["early_stopping_patience"]
        return int(state["global_step"]) if is_over else None
    except (KeyError, TypeError, ValueError):  # none, or none of Trainer's
        return None


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


class StopAtStep(TrainerCallback):
    """Ends a training at Ctrl-C after the step at hand, with a checkpoint; a second Ctrl-C ends it at once.

    Args:
        unfinished: says which training a checkpoint is of.
        say: prints a line.

    Attributes:
        is_asked: Ctrl-C was pressed.
    """

    def __init__(self, unfinished: Unfinished, say: Callable[[str], None]) -> None:
        self._unfinished, self._say = unfinished, say
        self.is_asked = self._is_at_end = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first Ctrl-C is noted; the interrupt is raised at the end. Where it is ignored, it stays so."""
        is_main = threading.current_thread() is threading.main_thread()  # others get no signals
        if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script
            yield
            return
        self._before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._before)
        if self.is_asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        signal.signal(signal.SIGINT, self._before)
        self._say("interrupted: saves a checkpoint after this step; Ctrl-C again stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint that is whole and stays, and for the end."""
        if self.is_asked:
            args.save_only_model, args.save_total_limit = False, None
            control.should_training_stop = True
            self._is_at_end = state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()
            control.should_save |= not self._is_at_end  # at the end of an epoch it is first evaluated

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that ends for the interrupt is not evaluated, which might count as the best one or as no better."""
        if self.is_asked:
            control.should_save = self._is_at_end
            control.should_evaluate &= self._is_at_end
            control.should_log &= self._is_at_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write into the checkpoint which training it is of; without the optimizer none can go on from it."""
        if state.is_world_process_zero and not args.save_only_model:
            self._unfinished.mark(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
