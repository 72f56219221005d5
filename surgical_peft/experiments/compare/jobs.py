"""The work of a comparison, in jobs: each is done once, by any process, and its finding kept in a small file."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.data import ConcatDataset

from ...atomic_files import whole_folder, write_text
from ...errors import SurgicalError
from ...scoring.selection import Selection
from ..recipe.recipe import Recipe
from ..tasks import load_task
from ..training.profiling import Watch, step_costs
from ..training.runner import RecipeRunner, Remembered
from .comparison import FULL, Comparison, Job
from .preflight import context_of, in_words, make_each, misfits_of, refuse

_TIMED = 3  # batches of an epoch whose steps are timed
_AT_MOST = 12  # steps, where a recipe counts them
_OF_BLOCKS = ("training", "test")  # jobs that need to know what the method chose
_MARKER = "finding.txt"  # by which the weights of a training are known


class JobRunner:
    """Does the jobs of a comparison, one after the other, and keeps what they share.

    Attributes:
        comparison: what to compare.
        folder: where findings are kept, in `runs/`, and weights until they are measured, in `weights/`.
    """

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison, self.folder = comparison, folder
        self._runner: tuple[Any, RecipeRunner] | None = None
        self._measured: dict[str, tuple[Any, ConcatDataset[Any]]] = {}

    def check(self) -> None:
        """Find out what does not fit, before anything is chosen or trained.

        All data are opened; each method says whether it fits each source model; and every example that will be used is
        made once, since a single bad image of a test split would end everything after all trainings.

        Raises:
            SurgicalError: data or splits that are missing, or do not fit the task or a source model; methods that do
                not fit, all of them; an example that cannot be made. What else data libraries raise goes through.
        """
        what = self.comparison
        for number in range(len(what.sources)):
            for seed in what.seeds:
                load_task(what.recipe_of(number, seed), ("train", "validation"))
                self._test_examples(number, seed)
            if what.recipe.source_data is not None:
                self._source_examples(number)
        misfits: dict[str, str] = {}
        for job in reversed(self._firsts()):  # what the first jobs need stays in memory
            misfits = {**misfits_of(what, job, self._runner_of(job)), **misfits}
        refuse(misfits, len(what.methods))
        self._make_all()

    def let_go(self) -> None:
        """Forget model and data: other processes do the work."""
        self._runner = None
        self._measured.clear()

    def seconds(self) -> float:
        """What one full fine-tuning takes, from a few timed steps."""
        runner, full = self._runner_of(self._firsts()[0]), self.comparison.methods[FULL]
        return runner.seconds(lambda model: full.wrap(model, Selection(()), runner.recipe))

    def finding(self, job: Job) -> dict[str, Any]:
        """What a job found that was done."""
        return json.loads(self.path(job).read_text(encoding="utf-8"))["found"]

    def is_done(self, job: Job) -> bool:
        """Whether a job need not be done: its finding is there."""
        chooses = job.kind in _OF_BLOCKS and self.comparison.methods[job.method].choose
        return (not chooses or self.path(_choice_of(job)).exists()) and self.path(job).exists()

    def path(self, job: Job) -> Path:
        """Where the finding of a job is kept: the same place for trainings of methods that chose the same blocks."""
        return self.folder / "runs" / f"{self.comparison.name_of(job, self._known_by(job))}.json"

    def weights(self, job: Job) -> Path:
        """Where the weights of a training lie until they are measured."""
        return self.folder / "weights" / self.path(replace(job, kind="training")).stem

    def do(self, job: Job) -> None:
        """Do a job and keep what it finds.

        Raises:
            SurgicalError: the method does not fit the model.
        """
        try:
            found = getattr(self, f"_{job.kind}")(job)
        except SurgicalError as error:
            said = str(error)
            raise SurgicalError(said if said.startswith(job.method) else f"{job.method}: {said}") from error
        path = self.path(job)
        asked = self.comparison.asked(job, self._known_by(job))
        write_text(path, json.dumps({"asked": asked, "found": found}, indent=1) + "\n")

    def _choice(self, job: Job) -> dict[str, Any]:
        method, runner = self.comparison.methods[job.method], self._runner_of(job)
        assert method.choose is not None
        own = self.folder / "choices" / self.path(job).stem
        own.mkdir(parents=True, exist_ok=True)
        context = context_of(self.comparison, job, runner, own)
        began = time.perf_counter()
        blocks = list(method.choose(context).blocks)
        return {"blocks": blocks, "seconds": time.perf_counter() - began}

    def _training(self, job: Job) -> dict[str, Any]:
        method, runner = self.comparison.methods[job.method], self._runner_of(job)
        validation = runner.part("validation")
        found: dict[str, Any] = {"blocks": list(self._selection(job).blocks)}
        if not method.is_trained:
            metric = runner.task.measure(runner.model, validation)
            return {**found, "validation": metric, "tuned_parameters": 0, "bytes": None, "seconds": 0.0}
        began = time.perf_counter()
        wrapped = self._train(runner, job)
        found["seconds"] = time.perf_counter() - began
        with whole_folder(self.weights(job), _MARKER) as temporary:
            wrapped.save_pretrained(temporary)  # type: ignore[operator]
            (temporary / _MARKER).write_text(f"{job}\n", encoding="utf-8")
            found["bytes"] = sum(each.stat().st_size for each in temporary.rglob("*.safetensors"))
        found["tuned_parameters"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        return {**found, "validation": runner.task.measure(wrapped, validation)}

    def _test(self, job: Job) -> dict[str, Any]:
        runner = self._runner_of(job)
        model = copy.deepcopy(runner.model)
        if self.comparison.methods[job.method].is_trained:
            folder = self.weights(job)
            if not folder.exists():  # the training was done when another rate was the best
                self._training(job)
            adapted = (folder / "adapter_config.json").exists()
            model = PeftModel.from_pretrained(model, folder) if adapted else type(model).from_pretrained(folder)  # type: ignore[attr-defined]
            model = model.to(runner.args.device)
        found = {"test": runner.task.measure(model, self._test_examples(job.source, job.seed))}
        if self.comparison.recipe.source_data is not None:
            found["on_source"] = runner.task.measure(model, self._source_examples(job.source))
        return found

    def _source(self, job: Job) -> dict[str, Any]:
        runner = self._runner_of(job)
        return {"on_source": runner.task.measure(runner.model, self._source_examples(job.source))}

    def _costs(self, job: Job) -> dict[str, Any]:
        runner, what = self._runner_of(job), self.comparison
        count = min(len(runner.examples["train"]), _TIMED * runner.args.train_batch_size)
        own = {"max_steps": min(runner.args.max_steps, _AT_MOST)} if runner.args.max_steps > 0 else {}
        trained = [title for title, method in what.methods.items() if method.is_trained]
        jobs = {title: replace(job, kind="training", method=title, rate=what.grid(title)[0]) for title in trained}
        for each in jobs.values():
            self._wrap(each, copy.deepcopy(runner.model))  # a method that does not fit is told before any trains

        def training(each: Job) -> Callable[[Watch], nn.Module]:
            how = {"places": range(count), "skips": False}
            return lambda watch: self._train(runner, each, {**how, "watch": watch}, **own)

        first = {self.path(each): title for title, each in reversed(jobs.items())}
        found = step_costs({title: training(jobs[title]) for title in reversed(first.values())})
        return {title: found[first[self.path(each)]] for title, each in jobs.items()}

    def _train(
        self, runner: RecipeRunner, job: Job, how: Mapping[str, Any] | None = None, **changed: Any
    ) -> nn.Module:
        """Train by a job's method; `how` is for `RecipeRunner.train`, `changed` are training arguments."""
        method = self.comparison.methods[job.method]
        changed |= {"learning_rate": job.rate, "seed": job.seed}
        policy = method.policy(self.comparison.arguments(method, **changed))
        return runner.train(partial(self._wrap, job), policy=policy, **{**method.training, **changed, **(how or {})})[
            0
        ]

    def _wrap(self, job: Job, model: nn.Module) -> nn.Module:
        recipe, selection = self.comparison.recipe_of(job.source, job.seed), self._selection(job)
        try:
            return self.comparison.methods[job.method].wrap(model, selection, recipe)
        except ValueError as error:  # ours, or PEFT's
            raise SurgicalError(in_words(job.method, model, error)) from error

    def _selection(self, job: Job) -> Selection:
        if self.comparison.methods[job.method].choose is None:
            return Selection(())
        return Selection(tuple(self.finding(_choice_of(job))["blocks"]))

    def _make_all(self) -> None:
        """Make each example once; those of the first jobs come last of their kind, and stay in memory."""
        what = self.comparison
        trained: dict[Any, Recipe] = {}
        tested: dict[Any, tuple[int, int]] = {}
        for source in range(len(what.sources)):
            for seed in what.seeds:
                recipe = what.recipe_of(source, seed)
                trained.setdefault((recipe.model, recipe.data), recipe)
                key = [(each.model, each.data) for each in what.test_recipes(source, seed)]
                tested.setdefault(tuple(key), (source, seed))
        _, *others = trained.values()
        for recipe in others:
            for examples in load_task(recipe, ("train", "validation")).splits.values():
                make_each(examples)
        for examples in self._runner_of(self._firsts()[0]).examples.values():
            make_each(examples)
        for pair in reversed(tested.values()):
            make_each(self._test_examples(*pair))
        if what.recipe.source_data is not None:
            for source in reversed(range(len(what.sources))):
                make_each(self._source_examples(source))

    def _firsts(self) -> list[Job]:
        """The first training of each source model, as far as its data go."""
        return [Job("training", number, self.comparison.seeds[0]) for number in range(len(self.comparison.sources))]

    def _runner_of(self, job: Job) -> RecipeRunner:
        recipe = self.comparison.recipe_of(job.source, job.seed)
        key = (recipe.model, recipe.data, job.seed if recipe.new_head else None)
        if self._runner is None or self._runner[0] != key:
            self._runner = None  # first let go of the other one
            self._runner = key, RecipeRunner(recipe)
        return self._runner[1]

    def _test_examples(self, source: int, seed: int) -> ConcatDataset[Any]:
        return self._examples("test", self.comparison.test_recipes(source, seed))

    def _source_examples(self, source: int) -> ConcatDataset[Any]:
        return self._examples("source", [self.comparison.source_recipe(source)])

    def _examples(self, what: str, recipes: list[Recipe]) -> ConcatDataset[Any]:
        """The test splits of recipes as one; the last ones are kept."""
        key = [(each.model, each.data) for each in recipes]
        if what not in self._measured or self._measured[what][0] != key:
            parts = [Remembered(load_task(each, ("test",)).splits["test"]) for each in recipes]
            self._measured[what] = key, ConcatDataset(parts)
        return self._measured[what][1]

    def _known_by(self, job: Job) -> tuple[str, ...] | None:
        """The blocks that a training is known by; None if it is known by its method."""
        if job.kind not in _OF_BLOCKS or not self.comparison.methods[job.method].is_its_blocks:
            return None
        return self._selection(job).blocks


def _choice_of(job: Job) -> Job:
    return replace(job, kind="choice", rate=None)
