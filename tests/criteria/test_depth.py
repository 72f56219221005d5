"""`middle` and `depth`: the layers by their order alone."""

from __future__ import annotations

import math
from functools import partial

import pytest

from surgical_peft import SurgicalError, criteria, score_blocks, top_k
from tests.support.toys import TOYS, Toy


@pytest.mark.parametrize("k", range(1, 13))
def test_middle_takes_the_layers_of_the_paper(k: int, vit: Toy) -> None:
    start = math.floor(12 / 2 - k / 2)
    scores = score_blocks(vit.model(), None, "middle")
    assert top_k(scores, k).blocks == tuple(map(str, range(start, start + k)))
    assert set(scores.unscored) == {"embeddings", "final_norm", "head"} and scores.num_batches == 0


def test_middle_is_of_each_stack_and_depth_of_all() -> None:
    model = TOYS["t5"].model()
    layers = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert score_blocks(model, None, "middle").values == dict.fromkeys(layers, 0.5)
    deep = score_blocks(model, None, "depth").values
    assert deep == {name: (at + 1) / 4 for at, name in enumerate(layers)}
    shallow = score_blocks(model, None, partial(criteria.depth, end="input")).values
    assert shallow == {name: (4 - at) / 4 for at, name in enumerate(layers)}
    tensors = score_blocks(model, None, "depth", "tensor")
    assert tensors.values == {name: deep[tensors.blocks[name]] for name in tensors.values}
    with pytest.raises(SurgicalError, match=r"'outputs'.*output"):
        score_blocks(model, None, partial(criteria.depth, end="outputs"))
