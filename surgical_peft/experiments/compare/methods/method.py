"""Method of a comparison: how a source model is made ready to be trained on new data, and trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ....auto import get_surgical_model
from ....blocks.block_map import BlockMap
from ....errors import SurgicalError
from ....policies.policy import Policy
from ....scoring.selection import Selection
from ....tuner.config import SurgicalConfig
from ....validation import call_with_options, check_rates, resolve
from ...recipe.recipe import Recipe
from ...tasks.source_model import modules_to_save


@dataclass(frozen=True)
class MethodContext:
    """All that a method may look at to choose its blocks; it leaves all of it as it is.

    Attributes:
        recipe: of the comparison, with the source model and the data at hand.
        model: the source model, on its device.
        blocks: its map.
        batches: makes a loader of shuffled training batches, the same at every call.
        seed: of the training.
        folder: for the files of the method, such as a study; kept as long as the comparison.
    """

    recipe: Recipe
    model: nn.Module
    blocks: BlockMap
    batches: Callable[[], Iterable[Any]]
    seed: int
    folder: Path


def tune_blocks(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    """The model with the chosen blocks wrapped by our tuner, and with what the recipe says of new heads."""
    saved = modules_to_save(recipe, model)
    config = SurgicalConfig.from_selection(selection, modules_to_save=saved, frozen_eval=recipe.frozen_eval)
    return get_surgical_model(model, config)


def nothing_known(context: MethodContext) -> Selection | None:
    """The default `preview`: the choice is not known before it is made."""
    return None


def no_policy(args: TrainingArguments) -> Policy | None:
    """The default `policy`: the same rate for all that is trained."""
    return None


@dataclass(frozen=True)
class Method:
    """A row of the table; plain settings, no state.

    One of your own is a function that returns this, named in the recipe as `package.module:name`.

    Attributes:
        title: in the table.
        choose: gives the blocks to tune; called once for each source model and seed, before all trainings. None: there
            is nothing to choose.
        wrap: `(model, selection, recipe)` -> what is trained: all that has `requires_grad`. The model is a copy; one
            whose weights are 0 to find out beforehand whether the method fits.
        policy: of the learning rates, by the training arguments.
        training: training arguments that replace the recipe's.
        rates: grid of learning rates; None: the recipe's.
        is_trained: whether there is anything to train.
        preview: what `choose` will give, where that takes neither data nor training; else None, having refused what is
            sure not to do. Called for each source model before anything else, so that all misfits are told at once.

    Example:
        >>> def mine():
        ...     return Method("first block", choose=lambda context: Selection(context.blocks.parse([0])))
    """

    title: str
    choose: Callable[[MethodContext], Selection] | None = None
    wrap: Callable[[nn.Module, Selection, Recipe], nn.Module] = tune_blocks
    policy: Callable[[TrainingArguments], Policy | None] = no_policy
    training: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] | None = None
    is_trained: bool = True
    preview: Callable[[MethodContext], Selection | None] = nothing_known

    @property
    def is_its_blocks(self) -> bool:
        """Whether its training depends on nothing but the blocks that it chose."""
        chooses = self.choose is not None and self.is_trained
        return chooses and self.wrap is tune_blocks and self.policy is no_policy and not self.training


def make_method(given: Any) -> Method:
    """The method that an entry of a recipe's `methods` stands for.

    Args:
        given: a name, or a mapping of one name to its arguments. `rates` among them is the method's grid.

    Raises:
        SurgicalError: not of these forms, an unknown name, arguments that do not fit, or something else than a method.

    Example:
        >>> make_method({"lora": {"rank": 16, "rates": [1e-3, 3e-3]}}).rates
        (0.001, 0.003)
    """
    package = sys.modules[__package__ or ""]
    name, options = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, None)
    options = {} if options is None else options
    if not isinstance(name, str) or not isinstance(options, dict):
        raise SurgicalError(
            f"methods: {given!r} is not a method: write a name, such as full, or a name with its arguments, such as "
            "{lora: {rank: 8}}."
        )
    function = resolve(name, package)
    options = dict(options)
    rates = options.pop("rates", None)
    made = call_with_options("methods", name, function, options, "rates", gives=Method)
    return made if rates is None else replace(made, rates=check_rates(name, rates))


def of_known_blocks(title: str, choose: Callable[[MethodContext], Selection]) -> Method:
    """A method whose `choose` looks at the model's map and the seed alone."""
    return Method(title, choose=choose, preview=choose)


def parsed(spec: Any) -> Callable[[MethodContext], Selection]:
    """Chooses the blocks that `BlockMap.parse` finds."""
    return partial(_parsed, spec)


def _parsed(spec: Any, context: MethodContext) -> Selection:
    return Selection(context.blocks.parse(spec))
