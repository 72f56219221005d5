"""Blocks by their depth, whatever the data; and at random, to see what choosing is worth."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from ....blocks.block_map import BlockMap
from ....scoring.selection import Selection
from ....validation import check_count
from .method import Method, MethodContext, of_known_blocks, parsed


def head() -> Method:
    """The head alone.

    Costs: nothing to choose.

    Example:
        methods: [full, head]
    """
    return of_known_blocks("head", parsed("head"))


def blocks(names: Any) -> Method:
    """The blocks that you name, as `BlockMap.parse` takes them.

    Costs: nothing to choose.

    Example:
        methods: [full, {blocks: {names: [embeddings, 0]}}, {blocks: {names: ["-2:", head]}}]
    """
    shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
    return of_known_blocks(f"blocks {shown}", parsed(names))


def first(k: int | None = None) -> Method:
    """The embeddings and the first `k` layers; default a third of them.

    Costs: nothing to choose.

    Example:
        methods: [full, first, {first: {k: 1}}]
    """
    return of_known_blocks(_title("first", k), partial(_first, _checked("first", k)))


def middle(k: int | None = None) -> Method:
    """`k` layers in the middle; default a third of them. Of two middles the one nearer the input.

    Costs: nothing to choose.

    Example:
        methods: [full, middle]
    """
    return of_known_blocks(_title("middle", k), partial(_middle, _checked("middle", k)))


def last(k: int | None = None) -> Method:
    """The last `k` layers; default a third of them. The head stays as it is.

    Costs: nothing to choose.

    Example:
        methods: [full, last]
    """
    return of_known_blocks(_title("last", k), partial(_last, _checked("last", k)))


def random_k(k: int | None = None) -> Method:
    """`k` layers at random, drawn by the seed of the training; default a third of them.

    The layers of a stack are of one size, so it tunes as many parameters as other methods with `k` layers.

    Costs: nothing to choose.

    Example:
        methods: [full, {random_k: {k: 2}}, {last: {k: 2}}]
    """
    return of_known_blocks(_title("random", k), partial(_random, _checked("random_k", k)))


def _title(name: str, k: int | None) -> str:
    return f"{name} third" if k is None else f"{name} {k}"


def _checked(name: str, k: int | None) -> int | None:
    if k is not None:
        check_count(name, "k", k, "layers")
    return k


def _layers(blocks: BlockMap, k: int | None) -> tuple[tuple[str, ...], int]:
    names = blocks.layers
    if k is not None:
        check_count(blocks.model_name, "k", k, "of its layers", at_most=len(names))
    return names, max(1, len(names) // 3) if k is None else k


def _first(k: int | None, context: MethodContext) -> Selection:
    names, count = _layers(context.blocks, k)
    blocks = context.blocks
    before = blocks.names[: blocks.names.index(names[0])]
    return Selection((*(name for name in before if blocks.kind(name) == "embeddings"), *names[:count]))


def _middle(k: int | None, context: MethodContext) -> Selection:
    names, count = _layers(context.blocks, k)
    start = (len(names) - count) // 2
    return Selection(names[start : start + count])


def _last(k: int | None, context: MethodContext) -> Selection:
    names, count = _layers(context.blocks, k)
    return Selection(names[-count:])


def _random(k: int | None, context: MethodContext) -> Selection:
    names, count = _layers(context.blocks, k)
    drawn = random.Random(f"random_k {context.seed}").sample(names, count)
    return Selection(context.blocks.parse(drawn))
