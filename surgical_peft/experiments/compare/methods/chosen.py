"""Blocks chosen on the training data: by a score, by the library's default, or by a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .... import criteria
from ....auto import check_choice, choose_blocks
from ....criteria.budget import Budget
from ....errors import SurgicalError
from ....procedures.procedure import Procedure, as_procedure
from ....scoring.score import score_blocks
from ....scoring.selection import Selection
from ....scoring.selection import top_k as take_top_k
from ....search.proposals import count_trainings
from ....search.result import SearchResult
from ....search.run import run_search
from ....tuner.config import SurgicalConfig
from ....validation import check_count, resolve
from ...search.objective import RecipeObjective
from ...tasks.source_model import modules_to_save
from ...training.job_progress import part_of_job, report_progress
from ...training.train import budget_of
from .method import Method, MethodContext, of_known_blocks, parsed


def top_k(criterion: str, k: int = 2, num_batches: int | None = None) -> Method:
    """The `k` blocks with the highest score, embeddings and head among the candidates.

    Costs: what the criterion needs: 5 batches, forward and backward, for most; `probe` half a training.

    Example:
        methods: [full, {top_k: {criterion: rgn, k: 2}}]
    """
    _check_criterion("top_k", criterion)
    _check_batches("top_k", num_batches)
    check_count("top_k", "k", k, "blocks")
    return Method(
        f"top {k} by {criterion}", choose=partial(_top_k, criterion, k, num_batches), preview=partial(_check_k, k)
    )


def _check_criterion(owner: str, criterion: Any) -> None:
    if not isinstance(criterion, str):
        raise SurgicalError(
            f"{owner}: criterion={criterion!r} is not a name. There are: {', '.join(criteria.__all__)}; your own as "
            "'package.module:name'."
        )
    resolve(criterion, criteria)


def _check_batches(owner: str, num_batches: Any) -> None:
    if num_batches is not None:
        check_count(owner, "num_batches", num_batches, "batches to score on")


def _top_k(criterion: str, k: int, num_batches: int | None, context: MethodContext) -> Selection:
    scores = score_blocks(context.model, context.batches(), criterion, num_batches=num_batches, blocks=context.blocks)
    return take_top_k(scores, k)


def _check_k(k: int, context: MethodContext) -> None:
    count = sum(bool(weights) for weights in context.blocks.parameters(context.model).values())
    check_count("top_k", "k", k, "of the scored blocks", at_most=count)


def auto(criterion: str | None = None, num_blocks: int | None = None, num_batches: int | None = None) -> Method:
    """What `blocks="auto"` takes: blocks and their number by short trainings of each.

    Costs: at most half a training.

    Example:
        methods: [full, auto]
    """
    if criterion is not None:
        _check_criterion("auto", criterion)
    _check_batches("auto", num_batches)
    config = SurgicalConfig(blocks="auto", criterion=criterion, num_blocks=num_blocks)
    options = [option for option in (criterion, num_blocks and f"{num_blocks} blocks") if option]
    return Method(
        ", ".join(["auto", *options]), choose=partial(_auto, config, num_batches), preview=partial(_check_auto, config)
    )


def _with_recipe(config: SurgicalConfig, context: MethodContext) -> SurgicalConfig:
    saved = modules_to_save(context.recipe, context.model)
    return replace(config, modules_to_save=saved, frozen_eval=context.recipe.frozen_eval)


def _check_auto(config: SurgicalConfig, context: MethodContext) -> None:
    check_choice(context.model, _with_recipe(config, context), context.batches())


def _auto(config: SurgicalConfig, num_batches: int | None, context: MethodContext) -> Selection:
    config = _with_recipe(config, context)
    batches = context.batches()
    limit = budget_of(context.recipe.arguments(), batches)  # the command shows its own bar
    budget = Budget(limit, on_spend=lambda _: report_progress(budget.spent / limit))
    chosen, _ = choose_blocks(context.model, config, batches, num_batches, budget=budget)
    return Selection(context.blocks.parse(chosen.blocks or []), chosen.selection or {})


def searched(
    procedure: str = "greedy_forward", options: Mapping[str, Any] | None = None, result: str | None = None
) -> Method:
    """What a search finds on the recipe's validation split, at the recipe's rates; or the winner in a file.

    Args:
        procedure: a name from `procedures`.
        options: its arguments.
        result: instead of searching: a `search.json` that `surgical-peft search` wrote (relative to the recipe).

    Costs: the trainings of the search, for each source model and seed; a file costs nothing here. Its winner was found
    on one draw, which may be among those that are compared.

    Example:
        methods: [full, {searched: {procedure: sweep}}, {searched: {result: ../runs/sweep_noise/search/search.json}}]
    """
    if result is not None:
        if options:
            raise SurgicalError(f"searched: options={options} are for a search, and result={result!r} is of one.")
        if not Path(result).is_file():
            raise SurgicalError(
                f"searched: there is no file {result!r}, which a recipe names relative to itself: give the "
                "search.json that `surgical-peft search` wrote, or a procedure to search by."
            )
        best = SearchResult.load(result).best
        shown = Path(result).parent.parent.name or Path(result).name
        return of_known_blocks(f"winner of {shown}", parsed(list(best.blocks)))
    made = as_procedure(procedure, options)
    return Method(f"search by {made}", choose=partial(_searched, made), preview=partial(_check_search, made))


def _check_search(procedure: Procedure, context: MethodContext) -> None:
    count_trainings(procedure, context.blocks)  # asks for all candidates


def _searched(procedure: Procedure, context: MethodContext) -> Selection:
    objective = RecipeObjective(replace(context.recipe, seeds=[context.seed], folds=None, policy=None, divide=None))
    with part_of_job(0.0, 0.0):  # how many trainings there will be is not known: one of them is not the job
        result = run_search(
            procedure,
            objective,
            rates=objective.rates,
            seeds=objective.seeds,
            storage=f"sqlite:///{context.folder / 'study.db'}",
        )
    return result.best
