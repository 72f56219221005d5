"""Any number of trainings of one recipe, which share its data, its source model and its frozen start."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from ...blocks.block_map import BlockMap
from ...errors import SurgicalError
from ...optim.callback import SurgicalCallback
from ...policies.policy import Policy
from ...prefix_cache import PrefixCache
from ...prefix_cache.fill import AllBlocks
from ...prefix_cache.store import Store
from ...tuner.model import SurgicalModel
from ..recipe.recipe import Recipe
from ..tasks import Examples, load_task
from .fit import fit
from .job_progress import ReportedSteps, part_of_job
from .online import adapt_online
from .profiling import PeakMemory, StepClock

Item = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]
ROOM = 2 * 2**30  # bytes: no more examples of a split are held, and no more outputs of blocks
_BATCH = 32  # examples that go through the model at once to keep what its blocks return
_STEPS = 10  # that are timed to tell what one costs; fewer where they take long
_LONG = 3.0  # seconds


class RecipeRunner:
    """Data and source model of a recipe, loaded once for any number of trainings.

    Args:
        recipe: what to train.
        splits: of its data.
        made: folder with examples that were made and saved before.

    Attributes:
        recipe: as given.
        args: the recipe's training arguments.
        task: the recipe's.
        examples: of each split, each example made once.
        model: the source model, in eval mode; trainings get copies.
        blocks: its map.

    Raises:
        SurgicalError: as `load_task`.

    Example:
        >>> runner = RecipeRunner(load_recipe("recipes/noise.yaml"))
        >>> tuned, peak = runner.train(lambda model: get_surgical_model(model, SurgicalConfig(blocks=[0])))
        >>> runner.task.measure(tuned, runner.part("validation"))
    """

    def __init__(
        self, recipe: Recipe, splits: Sequence[str] = ("train", "validation"), made: Path | None = None
    ) -> None:
        self.recipe = recipe
        self.args = recipe.arguments(disable_tqdm=True)
        self.task = load_task(recipe, splits)
        self.examples = {split: Remembered(examples, split, made) for split, examples in self.task.splits.items()}
        self.model = self.task.load_model().to(self.args.device).eval()
        self._has_trained = False

    @cached_property
    def blocks(self) -> BlockMap:
        """The block map of the source model."""
        return BlockMap.find(self.model)

    def part(self, split: str, places: Sequence[int] | None = None) -> Part:
        """The examples of a split at `places`; default all."""
        examples = self.examples[split]
        return Part(examples, range(len(examples)) if places is None else places)

    def train(
        self,
        wrap: Wrap,
        places: Sequence[int] | None = None,
        policy: Policy | None = None,
        watch: Callable[[nn.Module], TrainerCallback] | None = None,
        skips: bool = True,
        **changed: Any,
    ) -> tuple[nn.Module, int]:
        """Train a copy of the source model on the training split; nothing is kept on disk.

        Args:
            wrap: makes the copy ready to be trained, and gives what is to be called.
            places: the training examples to use; default all.
            policy: of the learning rates.
            watch: makes a callback for the trainer of what `wrap` gave.
            skips: whether the frozen start may be skipped, where that is possible.
            changed: training arguments that are other than the recipe's.

        Returns:
            What `wrap` gave, trained, and the peak memory in bytes.
        """
        wrapped = self._wrapped(wrap, changed)
        # Only our tuner keeps what it does not tune in eval mode, so that its frozen start returns the same each time.
        is_ours = isinstance(getattr(wrapped, "base_model", None), SurgicalModel)
        store = self.outputs if skips and is_ours else None
        train = self.part("train", places)
        callbacks: list[TrainerCallback] = [ReportedSteps(), *([_Unrecorded()] if policy else [])]
        if watch:
            callbacks.append(watch(wrapped))
        changed |= {"disable_tqdm": True, "save_strategy": "no", "push_to_hub": False}
        changed |= {"eval_strategy": "no", "load_best_model_at_end": False}
        with (
            tempfile.TemporaryDirectory() as unused,  # the trainings of all workers have one output folder
            PeakMemory() as peak,
            PrefixCache(wrapped, store, strict=False) if store else nullcontext(),
        ):
            args = self.recipe.arguments(output_dir=unused, **changed)
            fit(wrapped, args, train, policy, callbacks, self.task.collate)
        self._has_trained = True
        return wrapped, peak.bytes

    def adapt(
        self, wrap: Wrap, stream: Examples, policy: Policy | None = None, **changed: Any
    ) -> tuple[nn.Module, int, float]:
        """Adapt a copy of the source model to a stream, see `adapt_online`.

        Returns:
            What `wrap` gave, adapted, the peak memory in bytes, and the metric along the stream.
        """
        wrapped = self._wrapped(wrap, changed)
        args = self.recipe.arguments(**changed)
        with PeakMemory() as peak:
            metric = adapt_online(wrapped, stream, args, self.task.measure, policy)  # type: ignore[arg-type]
        return wrapped, peak.bytes, metric

    def _wrapped(self, wrap: Wrap, changed: dict[str, Any]) -> nn.Module:
        """What `wrap` makes of a copy of the source model."""
        base = copy.deepcopy(self.model)
        set_seed(changed.get("seed", self.args.seed))  # for new weights, as LoRA's
        return wrap(base)

    def seconds(self, wrap: Wrap, places: Sequence[int] | None = None) -> float:
        """The seconds that one such training takes, estimated from a few timed steps."""
        base, step, _ = self.timed(wrap, places)
        return base + self.steps(places) * step

    def timed(self, wrap: Wrap, places: Sequence[int] | None = None) -> tuple[float, float, int]:
        """Seconds of such a training but its steps, seconds of a step, and bytes at the peak; from a few steps.

        Examples are made before, as they are once for all trainings: `reading` tells what that costs.
        """
        self.reading(places)
        places, clock = self._few(places), StepClock(_LONG)
        if not self._has_trained:  # the first one of a process also loads what all need
            with part_of_job(0.0, 1 / (1 + _STEPS)):
                self.train(wrap, places, max_steps=1)
        began = time.perf_counter()
        with part_of_job(1 / (1 + _STEPS), 1.0):
            _, peak = self.train(wrap, places, watch=lambda _: clock, max_steps=_STEPS)
        seconds = time.perf_counter() - began
        step = statistics.median(clock.seconds[1:] or clock.seconds)
        return max(0.0, seconds - len(clock.seconds) * step), step, peak

    def reading(self, places: Sequence[int] | None = None) -> float:
        """The seconds that making the examples of such a training takes, estimated from those that `timed` uses."""
        train, few = self.examples["train"], self._few(places)
        began = time.perf_counter()
        for place in few:
            train[place]
        return (time.perf_counter() - began) * len(train if places is None else places) / len(few)

    def _few(self, places: Sequence[int] | None) -> Sequence[int]:
        args, every = self.args, range(len(self.examples["train"])) if places is None else places
        return every[: _STEPS * args.train_batch_size * args.gradient_accumulation_steps]

    def steps(self, places: Sequence[int] | None = None) -> int:
        """The number of steps of one such training."""
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        count = len(self.examples["train"] if places is None else places)
        if self.recipe.is_online:
            count = len(self.examples["validation"])
        return args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(count / batch) * args.num_train_epochs)

    @cached_property
    def outputs(self) -> Store | None:
        """Where trainings keep what lies before the first tuned block, if every training computes just that.

        Of all blocks it is there from the start, if that fits; else each training keeps what it needs itself.
        """
        args, recipe = self.args, self.recipe
        is_plain = recipe.frozen_eval and args.n_gpu <= 1 and args.world_size == 1 and not args.torch_compile
        if not is_plain or recipe.unlabelled:  # the copies of an image are never the same
            return None
        train, store = self.examples["train"], Store(ROOM)
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None  # as Trainer's autocast

        def batch(places: Sequence[int]) -> dict[str, Tensor]:
            collated = self.task.collate([train[index] for index in places])
            return {key: value.to(args.device) for key, value in collated.items()}

        # Whether they fit is asked of a few: more than fit are made anew each time, and are not to be made for this.
        try:
            blocks = AllBlocks(self.model, batch(range(min(2, len(train)))), precision)
        except SurgicalError:  # then trainings run whole, as they find out themselves
            return store
        if blocks.row_bytes * len(train) <= ROOM:
            for start in range(0, len(train), _BATCH):
                blocks.keep(batch(range(start, min(start + _BATCH, len(train)))), store)
        return store


class _Unrecorded(SurgicalCallback):
    """Leaves out the history and its picture, which would be lost, and take as long as a small training."""

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        super().on_train_begin(*given, **kwargs)
        self._history = None


class Remembered(Dataset[Item]):
    """Examples of a split, each made once; beyond `room` bytes they are made anew every time.

    Those that were saved in the folder `made` as `{split}.pt` are read from there: processes share them.
    """

    def __init__(self, examples: Examples, split: str = "", made: Path | None = None, room: int = ROOM) -> None:
        self._examples, self._split, self._room, self._size = examples, split, room, 0
        self._made: dict[int, Item] = {}
        if made and (file := made / f"{split}.pt").exists():
            indices, kept = torch.load(file, mmap=True, weights_only=False)
            self._made = dict(zip(indices, _rows(kept), strict=True))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Item:
        if index in self._made:
            return self._made[index]
        item = self._examples[index]
        if self._size < self._room:
            self._made[index] = item
            self._size += sum(torch.as_tensor(value).nbytes for value in item.values())
        return item

    def make_all(self, folder: Path | None = None) -> None:
        """Make each example, and save those that there is room for: as columns where all are tensors of one shape."""
        for index in range(len(self)):
            self[index]
        if folder is None:
            return
        items = list(self._made.values())
        first = items[0] if items else {}
        is_column = all(isinstance(value, Tensor) for value in first.values()) and len({*map(_shape, items)}) == 1
        kept = {key: torch.stack([item[key] for item in items]) for key in first} if is_column else items
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((list(self._made), kept), folder / f"{self._split}.pt")


class Part(Dataset[Any]):
    """Some examples of a split."""

    def __init__(self, examples: Remembered, places: Sequence[int]) -> None:
        self._examples, self._places = examples, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Any:
        return self._examples[self._places[number]]


def _rows(kept: dict[str, Tensor] | list[Item]) -> list[Item]:
    if isinstance(kept, list):
        return kept
    return [dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True)]


def _shape(item: Item) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((key, np.shape(value)) for key, value in item.items())
