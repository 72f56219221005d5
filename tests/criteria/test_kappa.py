"""`kappa` against plain singular values and PEFT's own selector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft.helpers import KappaTuneSelector
from torch import nn

from surgical_peft import BlockMap, score_blocks
from tests.support.toys import TOYS


def plain_kappa(matrix: np.ndarray) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(values[0] / (values[-1] + 1e-8))


@pytest.mark.parametrize(("toy_name", "granularity"), [("vit", "block"), ("bert", "module"), ("qwen3_moe", "tensor")])
def test_kappa_equals_plain_singular_values(toy_name: str, granularity: str) -> None:
    model = TOYS[toy_name].model().double()
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    blocks = BlockMap.find(model)
    logs: dict[str, list[float]] = {}
    for name, weight in model.named_parameters():
        array = weight.detach().numpy()
        if array.ndim < 2 or len(array) == 1 or name in tables:
            continue
        experts = list(array) if array.ndim == 3 else [array.reshape(len(array), -1)]
        unit = {"block": blocks.block_of(name), "module": name.rpartition(".")[0], "tensor": name}[granularity]
        logs.setdefault(unit, []).append(math.log(sum(map(plain_kappa, experts)) / len(experts)))
    expected = {unit: math.exp(-sum(values) / len(values)) for unit, values in logs.items()}
    assert score_blocks(model, None, "kappa", granularity).values == pytest.approx(expected, rel=1e-6)


def test_kappa_of_single_weights_is_that_of_peft() -> None:
    model = TOYS["qwen3_moe"].model()
    selector = KappaTuneSelector(model, show_progress=False)
    selector.get_best_targets()
    expected = {f"{name}.weight": 1 / value for name, value in selector._condition_numbers.items()}
    expected |= {name: 1 / value for name, value in selector._parameter_condition_numbers.items()}
    assert any(name.endswith("down_proj") for name in expected)  # fused experts
    values = score_blocks(model, None, "kappa", "tensor").values
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-4)  # float32
    ranked = sorted((name for name in values if name.endswith("_proj.weight")), key=lambda name: -values[name])
    wanted = [f"{name}.weight" for name in selector.get_best_targets() if name.endswith("_proj")]
    assert ranked == wanted


def test_an_expert_of_zeros_and_a_matrix_of_one_row_have_no_condition_number() -> None:
    model = TOYS["qwen3_moe"].model().double()
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    with torch.no_grad():
        experts[0] = 0
    expected = 3 / sum(plain_kappa(expert.numpy()) for expert in experts.detach()[1:])
    assert score_blocks(model, None, "kappa", "tensor").values[
        "model.layers.1.mlp.experts.down_proj"
    ] == pytest.approx(expected, rel=1e-6)
    layers = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(4, 4), "one": nn.Linear(4, 1)}) for _ in range(3))
    scores = score_blocks(nn.ModuleDict({"layers": layers}), None, "kappa", "tensor")
    assert set(scores.values) == {f"layers.{at}.wide.weight" for at in range(3)}
