"""The projector of a vision-language model where it shares its block with something else."""

from __future__ import annotations

from typing import Any

from ..blocks.block_map import BlockMap
from ..blocks.towers import PROJECTOR, projector_in
from .config import Targets


def projector_alone(blocks: BlockMap, asked: Any, target_modules: Targets) -> tuple[Any, Targets]:
    """The blocks and modules that a choice with `"projector"` stands for; any other choice as it is.

    LLaVA-NeXT's projector shares the block `embeddings` with `image_newline`, Mllama's the block `head` with the LM
    head. Beside `target_modules` the map refuses such a projector: those would be a second choice for its block.

    Example:
        >>> projector_alone(blocks, "projector", None)
        (['embeddings'], {'embeddings': ['model.multi_modal_projector']})
    """
    entries = asked if isinstance(asked, list) else [asked]
    parts = projector_in(blocks.modules) if PROJECTOR in entries and target_modules is None else {}
    if all(set(paths) == set(blocks.modules[block]) for block, paths in parts.items()):
        return asked, target_modules
    shared = {block: paths for block, paths in parts.items() if set(paths) != set(blocks.modules[block])}
    others = [entry for entry in [*(parts.keys() - shared.keys()), *entries] if entry != PROJECTOR]
    names = blocks.parse([*others, *shared])  # one of these named twice is refused
    return list(names), {name: shared.get(name, "all") for name in names}
