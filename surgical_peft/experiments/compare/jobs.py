"""Jobs of a comparison: each kind is a function; a job is done once, by any process, and its finding kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ...atomic_files import whole_folder
from ...errors import SurgicalError
from ...policies.policy import Policy
from ..tasks import Examples
from ..training.profiling import SHARE, Watch, step_costs
from ..training.source_data import source_loss
from .comparison import Comparison, Job
from .findings import Findings
from .loaded import LoadedData
from .methods.method import no_policy
from .preflight import context_of, misfit_message

TIMED = 2  # steps of an epoch: one counts memory, one is timed
_MARKER = "finding.txt"  # by which the weights of a training are known


class JobRunner:
    """Does the jobs of a comparison, one after the other.

    Attributes:
        comparison: what to compare.
        findings: of all jobs, and the weights of trainings.
        data: source model and data of the job at hand; from the folder `made`, if they were made before.
    """

    def __init__(self, comparison: Comparison, folder: Path, made: Path | None = None) -> None:
        self.comparison = comparison
        self.findings = Findings(comparison, folder)
        self.data = LoadedData(comparison, made)

    def do(self, job: Job) -> None:
        """Do a job and keep what it finds.

        Raises:
            SurgicalError: the method does not fit the model.
        """
        try:
            finding = KINDS[job.kind](self, job)
        except SurgicalError as error:
            message = str(error)
            raise SurgicalError(message if message.startswith(job.method) else f"{job.method}: {message}") from error
        self.findings.save(job, finding)

    def train(self, job: Job, how: Mapping[str, Any] | None = None, **changed: Any) -> nn.Module:
        """The model of a job's source, trained by its method.

        Args:
            job: says the method, the rate and the seed.
            how: arguments for `RecipeRunner.train`.
            changed: training arguments that are other than the method's.
        """
        policy, settings = self._settings(job, changed)
        return self.data.runner(job).train(partial(self.wrap, job), policy=policy, **{**settings, **(how or {})})[0]

    def adapt(self, job: Job, stream: Examples) -> tuple[nn.Module, float]:
        """The model of a job's source, adapted by its method to a stream, and the metric along it."""
        policy, settings = self._settings(job, {})
        model, _, metric = self.data.runner(job).adapt(partial(self.wrap, job), stream, policy, **settings)
        return model, metric

    def _settings(self, job: Job, changed: dict[str, Any]) -> tuple[Policy | None, dict[str, Any]]:
        """The policy of a job's method, and its training arguments."""
        method = self.comparison.methods[job.method]
        changed = {**changed, "learning_rate": job.rate, "seed": job.seed}
        return method.policy(self.comparison.arguments(method, **changed)), {**method.training, **changed}

    def wrap(self, job: Job, model: nn.Module) -> nn.Module:
        """A copy of the source model, made ready to be trained by a job's method."""
        recipe, selection = self.comparison.recipe_of(job.source, job.seed), self.findings.selection(job)
        try:
            return self.comparison.methods[job.method].wrap(model, selection, recipe)
        except ValueError as error:  # ours, or PEFT's
            raise SurgicalError(misfit_message(job.method, model, error)) from error


def choose_blocks(job_runner: JobRunner, job: Job) -> dict[str, Any]:
    """The blocks that a method chooses for a training, and the seconds that it took."""
    method = job_runner.comparison.methods[job.method]
    assert method.choose is not None
    folder = job_runner.findings.folder / "choices" / job_runner.findings.path(job).stem
    folder.mkdir(parents=True, exist_ok=True)
    context = context_of(job_runner.comparison, job, job_runner.data.runner(job), folder)
    began = time.perf_counter()
    blocks = list(method.choose(context).blocks)
    return {"blocks": blocks, "seconds": time.perf_counter() - began}


def train_method(job_runner: JobRunner, job: Job) -> dict[str, Any]:
    """What a training tuned, how long it took and what it reached on validation data; its weights are kept."""
    method, runner = job_runner.comparison.methods[job.method], job_runner.data.runner(job)
    validation = runner.part("validation")
    finding: dict[str, Any] = {"blocks": list(job_runner.findings.selection(job).blocks)}
    if not method.is_trained:
        metric = runner.task.measure(runner.model, validation)
        return {**finding, "validation": metric, "tuned_parameters": 0, "bytes": None, "seconds": 0.0}
    began = time.perf_counter()
    if runner.recipe.is_online:
        model, finding["validation"] = job_runner.adapt(job, validation)
    else:
        model = job_runner.train(job)
    finding["seconds"] = time.perf_counter() - began
    with whole_folder(job_runner.findings.weights(job), _MARKER) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        (temporary / _MARKER).write_text(f"{job}\n", encoding="utf-8")
        finding["bytes"] = sum(path.stat().st_size for path in temporary.rglob("*.safetensors"))
    finding["tuned_parameters"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if not runner.recipe.is_online:
        finding["validation"] = runner.task.measure(model, validation)
    return finding


def check_weights(folder: Path) -> None:
    """Make sure that a folder, which is deleted at the end of a comparison, holds nothing but weights of one.

    Raises:
        SurgicalError: it holds something else.
    """
    strange = [path for path in folder.glob("*") if not (path / _MARKER).is_file() and not path.name.startswith(".")]
    if strange:
        raise SurgicalError(
            f"{str(folder)!r} holds {strange[0].name!r}, which no comparison wrote and would be deleted: move it, "
            "or give another output folder."
        )


def measure_test(job_runner: JobRunner, job: Job) -> dict[str, Any]:
    """What a trained model reaches on test data, by all metrics, and on the data of its source model."""
    runner = job_runner.data.runner(job)
    stream = job_runner.data.test_examples(job.source, job.seed)
    model = copy.deepcopy(runner.model)
    is_trained, along = job_runner.comparison.methods[job.method].is_trained, None
    if is_trained and runner.recipe.is_online:
        model, along = job_runner.adapt(job, stream)
    elif is_trained:
        folder = job_runner.findings.weights(job)
        if not folder.exists():  # the training was done when another rate was the best
            train_method(job_runner, job)
        is_adapter = (folder / "adapter_config.json").exists()
        model = PeftModel.from_pretrained(model, folder) if is_adapter else type(model).from_pretrained(folder)  # type: ignore[attr-defined]
        model = model.to(runner.args.device)
    finding: dict[str, Any] = {"test": runner.task.measure(model, stream) if along is None else along}
    for written, metric in job_runner.comparison.test_metrics.items():
        measure, examples = job_runner.data.test_metric(job.source, job.seed, metric)
        finding.setdefault("test_metrics", {})[written] = measure(model, examples)
    if job_runner.comparison.recipe.source_data is not None:
        finding |= _on_source(job_runner, job, model)
    return finding


def measure_source(job_runner: JobRunner, job: Job) -> dict[str, Any]:
    """What a source model reaches on its own data, and its loss there."""
    return _on_source(job_runner, job, job_runner.data.runner(job).model)


def _on_source(job_runner: JobRunner, job: Job, model: nn.Module) -> dict[str, float]:
    runner, examples = job_runner.data.runner(job), job_runner.data.source_examples(job.source)
    loss = source_loss(model, examples, runner.task, runner.args)
    return {"on_source": runner.task.measure(model, examples), "source_loss": loss}


def time_steps(job_runner: JobRunner, job: Job) -> dict[str, Any]:
    """What a training step of each method costs, the methods taking turns in this process."""
    comparison, runner = job_runner.comparison, job_runner.data.runner(job)
    count = TIMED * runner.args.train_batch_size * runner.args.gradient_accumulation_steps
    count = min(len(runner.examples["train"]), count)
    jobs = {
        title: replace(job, kind="training", method=title, rate=comparison.grid(title)[0])
        for title, method in comparison.methods.items()
        if method.is_trained
    }
    for training in jobs.values():
        job_runner.wrap(training, copy.deepcopy(runner.model))  # a method that does not fit is told before any trains

    steps = {title: len(comparison.planned(title)) * runner.steps() for title in jobs}

    def timed(training: Job) -> Callable[[Watch], nn.Module]:
        how = {"places": range(count), "skips": False}
        method, shorter = comparison.methods[training.method], {}
        if method.policy is no_policy:  # all its steps are alike
            shorter = {"max_steps": TIMED}
        elif runner.args.max_steps > 0:  # a policy may change between any two of them
            shorter = {"max_steps": max(TIMED, round(SHARE * steps[training.method]))}
        return lambda watch: job_runner.train(training, {**how, "watch": watch}, **shorter)

    paths = {title: job_runner.findings.path(training) for title, training in jobs.items()}
    first = {path: title for title, path in reversed(paths.items())}  # of methods that are the same training
    timed_methods = {title: timed(jobs[title]) for title in reversed(first.values())}
    costs = step_costs(timed_methods, sum(steps.values()))
    return {title: costs[first[path]] for title, path in paths.items()}


# What `Job.kind` may be, and how it is done.
KINDS: dict[str, Callable[[JobRunner, Job], dict[str, Any]]] = {
    "choice": choose_blocks,
    "training": train_method,
    "test": measure_test,
    "source": measure_source,
    "costs": time_steps,
}
