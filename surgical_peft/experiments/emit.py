"""Reads a choice from what the commands wrote, and writes it as another tool reads it."""

from __future__ import annotations

from pathlib import Path

from peft.utils.constants import CONFIG_NAME

from ..blocks.block_map import PART
from ..errors import SurgicalError
from ..export.emit import emit as emit_choice
from ..export.targets import Choice, Emission
from ..scoring.block_scores import BlockScores
from ..scoring.selection import top_k
from ..search.result import SearchResult
from ..tuner.config import SurgicalConfig
from ..tuner.loading.saved_adapter import LoadedBase, check_fits, read_adapter, skeleton_of_base
from ..tuner.target_modules import block_map_for
from ..typed_json import read_json
from .recipe.load import load_recipe
from .recipe.recipe import Recipe
from .tasks import info_of, task_of
from .tasks.source_model import modules_to_save

_WHAT = (
    "a recipe (.yaml), the folder of a run or an adapter, the search.json of `surgical-peft search`, or what "
    "`surgical-peft score --json` printed, with --num-blocks"
)


def emit(
    source: str | Path,
    target: str,
    *,
    base_model: str | None = None,
    num_blocks: int | None = None,
    allow_code: bool = False,
) -> Emission:
    """Write the choice in `source` as `target` reads it, checked on the model's names; no weights are read.

    Args:
        source: a recipe; the folder of a run, or of an adapter; a `search.json`; or saved block scores.
        target: a name from `export.targets`, or one of your own as `package.module:name`.
        base_model: folder or Hub id; default is what the recipe or adapter names.
        num_blocks: how many blocks to take, by saved scores.
        allow_code: as for `load_recipe`.

    Raises:
        SurgicalError: it is none of these, nothing is chosen in it yet, it is of another model, or the target cannot
            say it.

    Example:
        >>> print(emit("runs/reviews", "axolotl").text)
    """
    return emit_choice(_read(Path(source), base_model, num_blocks, allow_code), target)


def _read(source: Path, base: str | None, num_blocks: int | None, allow_code: bool) -> Choice:
    is_scores = source.suffix == ".json" and "values" in read_json(source, f"give {_WHAT}")
    if is_scores != (num_blocks is not None):
        raise SurgicalError(
            f"{str(source)!r} holds scores of blocks, which are no choice yet: say how many to take, --num-blocks 2."
            if is_scores
            else f"--num-blocks {num_blocks} is for scores, and {str(source)!r} holds a choice: leave it out."
        )
    if source.suffix == ".json":
        return _selected(source, base, num_blocks)
    if source.is_dir():
        return _of_adapter(source, base)
    if source.suffix in (".yaml", ".yml"):
        return _of_recipe(load_recipe(source, allow_code=allow_code), base)
    raise SurgicalError(f"{str(source)!r} is nothing that holds a choice: give {_WHAT}.")


def _selected(path: Path, base: str | None, num_blocks: int | None) -> Choice:
    if base is None:
        raise SurgicalError(f"{str(path)!r} does not say which model it is of: give --base FOLDER or a Hub id.")
    if num_blocks is None:
        result = SearchResult.load(path)
        selection, names, sizes = result.best, result.blocks, {}
    else:
        scores = BlockScores.load(path)
        selection, names, sizes = top_k(scores, num_blocks), tuple(scores.sizes), scores.sizes
    config = SurgicalConfig.from_selection(selection)
    model = skeleton_of_base(config, base)
    assert model is not None  # a base is given
    blocks = block_map_for(model, config)
    counts = {name: sum(p.numel() for p in group) for name, group in blocks.parameters(model).items()}
    whole = {name.partition(PART)[0]: None for name in names}  # of parts their blocks
    others = [name for name in {**whole, **counts} if name not in whole or name not in counts]
    others += [name for name, size in sizes.items() if counts.get(name, size) != size]
    if others:
        raise SurgicalError(
            f"{str(path)!r} is of another model than {base!r}: {others[0]!r} is not in both, or not as large. Blocks "
            f"of {base!r}: {', '.join(counts)}. Give the model that the file is of."
        )
    return Choice.of(model, base, config)


def _of_adapter(folder: Path, base: str | None) -> Choice:
    is_run = (folder / "adapter" / CONFIG_NAME).is_file()
    adapter = read_adapter(folder / "adapter" if is_run else folder)
    name = base or adapter.config.base_model_name_or_path
    model = skeleton_of_base(adapter.config, base)
    if model is None or not name:
        raise SurgicalError(f"{str(folder)!r} is of {name!r}, which is not at hand: give --base FOLDER or a Hub id.")
    check_fits(adapter, model.state_dict(), adapter.new_to(LoadedBase(model, frozenset())))
    return Choice.of(model, name, adapter.config)


def _of_recipe(recipe: Recipe, base: str | None) -> Choice:
    if recipe.blocks == "auto":
        run = Path(str(recipe.arguments().output_dir))
        if (run / "adapter" / CONFIG_NAME).is_file():
            return _of_adapter(run, base)
        raise SurgicalError(
            f"blocks: auto chooses when it trains, and {str(run)!r} has no adapter: run `surgical-peft train` first, "
            "or write the blocks into the recipe."
        )
    config, name = recipe.config(), base or recipe.model
    tiny = info_of(task_of(recipe)).tiny
    config.auto_mapping = {"base_model_class": tiny.auto.__name__} if tiny else None
    model = skeleton_of_base(config, name)
    assert model is not None  # a base is given
    config.modules_to_save = modules_to_save(recipe, model)
    return Choice.of(model, name, config)
