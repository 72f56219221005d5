"""Towers of a model by the names that people ask for: vision, projector, language, or a tower's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TOWERS = {"vision": re.compile(r"vis(ion|ual)|image"), "language": re.compile(r"lang|text|llm")}
PROJECTOR = "projector"  # between the towers
KNOWN = (*TOWERS, PROJECTOR, "encoder", "decoder")  # asked for by these names also where there are none
_PROJECTOR = re.compile(
    r"projector|connector|merger|aligner|resampler|(visual|vision|image|text|language)_projection|embed_vision"
)
_LM_HEADS = ("lm_head", "embed_out", "output_projection")


def towers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The towers that blocks are in, outer ones first.

    Example:
        >>> towers_of(["embeddings", "encoder.0", "vision.stages.1.0"])
        ('encoder', 'vision', 'vision.stages', 'vision.stages.1')
    """
    towers: dict[str, None] = {}
    for name in names:
        parts = name.split("/")[0].split(".")[:-1]
        towers |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return tuple(towers)


def names_of_towers(modules: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """The names by which towers are chosen: their own, and those that people ask for.

    Example:
        >>> names_of_towers(BlockMap.find(qwen2_vl).modules)
        ('visual', 'language_model', 'vision', 'projector', 'language')
    """
    own = towers_of(modules)
    return (*own, *(name for name in (*TOWERS, PROJECTOR) if name not in own and tower_blocks(name, modules)))


def projector_in(modules: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """For each block that holds some of the projector the modules of it, by their paths.

    Args:
        modules: the largest modules of each block, as in a `BlockMap`.

    Example:
        >>> projector_in({"embeddings": ["image_newline", "multi_modal_projector"], "head": ["lm_head"]})
        {'embeddings': ['multi_modal_projector']}
    """
    towers = towers_of(modules)
    if not any(TOWERS["vision"].search(tower) for tower in towers):
        return {}
    layers = [block for block in modules if block.rpartition(".")[2].partition("/")[0].isdigit()]
    parts = {
        block: [path for path in paths if _PROJECTOR.search(path)]
        for block, paths in modules.items()
        if block not in layers
    }
    return {block: paths for block, paths in parts.items() if paths}


def tower_blocks(name: str, modules: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """The blocks of the tower `name`, its embeddings and norm among them; none if there is no such tower.

    `vision` is the vision tower without the projector, which some models hold in it; `language` has the head of a
    language model with it, which stands outside of its tower.

    Args:
        modules: the largest modules of each block, as in a `BlockMap`.

    Example:
        >>> tower_blocks("vision", {"visual.0": [...], "visual.head": ["visual.merger"], "language_model.0": [...]})
        ('visual.0',)
    """
    projector = projector_in(modules)
    if name == PROJECTOR:
        return tuple(projector)
    if name in towers_of(modules) or name not in TOWERS:
        return tuple(block for block in modules if block.startswith(f"{name}."))
    blocks = [block for block in modules if "." in block and TOWERS[name].search(block.partition(".")[0])]
    is_lm_head = any(path.endswith(_LM_HEADS) for path in modules.get("head", ()))
    if name == "language" and blocks and is_lm_head and "head" not in projector:
        blocks.append("head")
    return tuple(block for block in blocks if block not in projector)
