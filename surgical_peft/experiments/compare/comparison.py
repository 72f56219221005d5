"""Settings of a comparison, read from a recipe, and the jobs that it is made of, each with the name of its finding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ...atomic_files import digest_of
from ...errors import SurgicalError
from ...validation import check_count
from ..recipe.code import check_code
from ..recipe.recipe import Recipe
from ..tasks import load_task, measured_split
from ..training.source_data import OPENING, SHIFTS, check_source, source_recipe
from .methods import Method, make_method

FULL = "full fine-tuning"  # all others are compared with it


@dataclass(frozen=True)
class Job:
    """Piece of work of a comparison.

    Attributes:
        kind: `choice` of the blocks, `training`, `test` of a training, `source` (the source model on its own data) or
            `costs` (of a step of each method).
        source: number of the source model.
        seed: of the training.
        method: its title.
        rate: of a training, and of the one that is tested.
    """

    kind: str
    source: int = 0
    seed: int = 0
    method: str = ""
    rate: float | None = None


class Comparison:
    """Methods of a recipe, with the source models, seeds and rates to train them with.

    Attributes:
        recipe: as given.
        methods: by title.
        sources: the source models.
        seeds: of the trainings.
        rate_seeds: those of them that choose the rates.
        rates: the grid of the recipe.

    Raises:
        SurgicalError: methods, rates, draws or data of the recipe do not fit; methods that are code which may not run.
    """

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.methods:
            raise SurgicalError("there is nothing to compare: write methods into the recipe, such as [full, head].")
        check_code(recipe, "methods")
        self.recipe = recipe
        methods = [make_method(entry) for entry in recipe.methods]
        self.methods: dict[str, Method] = {method.title: method for method in methods}
        self._given = dict(zip(self.methods, recipe.methods, strict=False))
        titles = [method.title for method in methods]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise SurgicalError(f"methods: {twice} is given twice: give it once.")
        if FULL not in titles:
            raise SurgicalError("methods: full is not among them: all others are compared with it.")
        args = recipe.arguments(disable_tqdm=True)
        self.sources = [recipe.model, *(recipe.sources or [])]
        self.seeds = recipe.seeds or [args.seed]
        self.rates = sorted(map(float, recipe.rates or [args.learning_rate]))
        for key, values in (("sources", self.sources), ("seeds", self.seeds), ("rates", self.rates)):
            if len(set(values)) != len(values):
                raise SurgicalError(f"{key}: {values} has an entry twice: give it once.")
        if recipe.rate_seeds is not None:
            check_count("a recipe", "rate_seeds", recipe.rate_seeds, "of its seeds", at_most=len(self.seeds))
        self.rate_seeds = self.seeds[: recipe.rate_seeds]
        if recipe.draws is not None and len(recipe.draws) != len(self.seeds):
            raise SurgicalError(
                f"draws: there are {len(recipe.draws)} for {len(self.seeds)} seeds: give one for each of {self.seeds}."
            )
        check_source(recipe)

    def grid(self, title: str) -> list[float]:
        """The rates that a method begins with; none for one that trains nothing."""
        method = self.methods[title]
        return self.rates if method.rates is None else list(method.rates)

    def trainings(self, title: str, rate: float | None = None) -> list[Job]:
        """The trainings of a method at a rate: every seed with every source model."""
        pairs = [(source, seed) for source in range(len(self.sources)) for seed in self.seeds]
        return [Job("training", source, seed, title, rate) for source, seed in pairs]

    def rate_trainings(self, title: str, rate: float | None = None) -> list[Job]:
        """Those of them that tell how good the rate is."""
        return [job for job in self.trainings(title, rate) if job.seed in self.rate_seeds]

    def planned(self, title: str) -> list[list[Job]]:
        """The trainings of a method on its grid; of each the job at every rate that it may turn out to have."""
        grid = self.grid(title)
        others = [job for job in self.trainings(title) if grid and job.seed not in self.rate_seeds]
        return [
            *([job] for rate in grid for job in self.rate_trainings(title, rate)),
            *([replace(job, rate=rate) for rate in grid] for job in others),
        ]

    @property
    def costs(self) -> Job:
        """Times the steps of all methods."""
        return Job("costs", seed=self.seeds[0])

    @property
    def firsts(self) -> list[Job]:
        """The first training of each source model, as far as its data go."""
        return [Job("training", number, self.seeds[0]) for number in range(len(self.sources))]

    def source(self, number: int) -> Job:
        """Measures a source model on its own data."""
        return Job("source", number, self.seeds[0])

    @cached_property
    def metric(self) -> str:
        """The name of what is measured."""
        return load_task(self.recipe_of(0, self.seeds[0]), ("validation",)).metric

    @property
    def test_metrics(self) -> dict[str, str]:
        """The recipe's `test_metrics`, by how they are written there."""
        return dict(zip(self.recipe.keys().get("test_metrics", {}), self.recipe.test_metrics, strict=True))

    @cached_property
    def split(self) -> str:
        """The split that results are told on: `test` or, where some data have none, `validation`."""
        recipes = {recipe.data: recipe for seed in self.seeds for recipe in self.test_recipes(0, seed)}
        names = {measured_split(recipe)[0] for recipe in recipes.values()}
        return "test" if names == {"test"} else "validation"

    def arguments(self, method: Method, **changed: Any) -> TrainingArguments:
        """The training arguments of a method, and those that are changed for one of its trainings."""
        return self.recipe.arguments(disable_tqdm=True, **{**method.training, **changed})

    def recipe_of(self, source: int, seed: int) -> Recipe:
        """The recipe with the source model, the data and the seed of one training."""
        recipe = self.recipe
        data = recipe.data if recipe.draws is None else recipe.draws[self.seeds.index(seed)]
        return replace(recipe, model=self.sources[source], data=data, training={**recipe.training, "seed": seed})

    def test_recipes(self, source: int, seed: int) -> list[Recipe]:
        """The recipes whose test splits, as one, are the test data of a training."""
        recipe = self.recipe_of(source, seed)
        return [replace(recipe, data=data) for data in self.recipe.test_data or [recipe.data]]

    def source_recipe(self, source: int) -> Recipe:
        """The recipe with a source model and its own data, unshifted."""
        return source_recipe(replace(self.recipe, model=self.sources[source]))

    def asked(self, job: Job, blocks: Sequence[str] | None = None) -> dict[str, Any]:
        """All that a finding depends on, in plain data; the same wherever the recipe and its data lie.

        Args:
            job: to be done.
            blocks: that the method has chosen, where nothing else of it matters for the training: methods that chose
                the same blocks then share it.
        """
        by_job = ("model", "data", "seed", "learning_rate")
        recipe = self.recipe_of(job.source, job.seed)
        asked: dict[str, Any] = {
            "kind": job.kind,
            "settings": {key: value for key, value in self.recipe.settings().items() if key not in by_job},
            "source": self._identities[recipe.model],
        }
        if job.kind in ("test", "source") and self.recipe.source_data is not None:
            source_recipe = self.source_recipe(job.source)
            shift = {key: getattr(source_recipe, key) for key in SHIFTS}
            shift |= {key: value for key in OPENING if (value := getattr(source_recipe, key))}
            asked["source_data"] = {**shift, "data": self._identities[source_recipe.data]}
        if job.kind == "source":
            return asked
        asked |= {"data": self._identities[recipe.data], "seed": job.seed}
        if job.kind == "costs":
            return {**asked, "methods": {title: [self._spec(title), self.grid(title)[:1]] for title in self.methods}}
        asked["method"] = self._spec(job.method) if blocks is None else {"blocks": sorted(blocks)}
        if "searched" in asked["method"]:
            asked["rates"] = self.rates
        if job.kind != "choice":
            asked["rate"] = job.rate
        if job.kind == "test":
            if self.recipe.test_metrics:
                asked["test_metrics"] = self.recipe.keys()["test_metrics"]
            asked["test_data"] = [self._identities[data] for data in self.recipe.test_data or [recipe.data]]
        return asked

    def _spec(self, title: str) -> dict[str, Any]:
        """A method's name and arguments as the recipe has them; files by what they hold."""
        given = self._given[title]
        if isinstance(given, str):
            return {given: {}}
        (name, options), *_ = given.items()
        known = {key: value for key, value in (options or {}).items() if key != "rates"}
        files = {key: value for key, value in known.items() if isinstance(value, str) and Path(value).is_file()}
        return {name: {**known, **{key: digest_of(path) for key, path in files.items()}}}

    @cached_property
    def _identities(self) -> dict[str, str]:
        """Of each model and data set a digest, or its name if it lies on the Hub."""
        recipe = self.recipe
        data = [recipe.data, *(recipe.draws or []), *(recipe.test_data or [])]
        if recipe.source_data is not None:
            data.append(self.source_recipe(0).data)
        return {
            name: digest_of(name) if Path(name).exists() else name for name in dict.fromkeys([*self.sources, *data])
        }

    def name_of(self, job: Job, blocks: Sequence[str] | None = None) -> str:
        """Name of a job's finding: its kind and a digest of all that the finding depends on."""
        text = json.dumps(self.asked(job, blocks), sort_keys=True, default=str)
        return f"{job.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
