"""`cka` against plain loops over hidden states, and what it makes of padding, constants and layers not called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalError, score_blocks
from tests.support.criteria import Routed, own_loss
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Batch, Toy


def batches(toy: Toy, dtype: torch.dtype = torch.float64, count: int = 3) -> list[Batch]:
    data = [toy.batch(seed, size=2 + seed) for seed in range(count)]
    return [{key: value.to(dtype) if value.is_floating_point() else value for key, value in b.items()} for b in data]


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    """As in the paper's code, from products of the features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def states(model: nn.Module, data: Sequence[Batch], **kwargs: bool) -> list[list[np.ndarray]]:
    """The hidden states of each batch as transformers gives them, before the final norm."""
    norms = [
        module for path, module in model.named_modules() if path.endswith(("model.norm", "vit.layernorm", "ln_f"))
    ]
    handles = [norm.register_forward_hook(lambda module, args, output: args[0]) for norm in norms]
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True).hidden_states for batch in data]
    for handle in handles:
        handle.remove()
    return [[layer.numpy() for layer in batch] for batch in outputs]


def of_rows(hidden: list[list[np.ndarray]], row: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, float]:
    layers = [np.concatenate([row(layer, at) for at, layer in enumerate(same)]) for same in zip(*hidden, strict=True)]
    return {str(at): 1 - plain_cka(before, after) for at, (before, after) in enumerate(pairwise(layers))}


@pytest.mark.parametrize(("toy_name", "place"), [("bert", 0), ("llama", -1), ("gpt2", -1)])
def test_cka_equals_a_plain_loop(toy_name: str, place: int) -> None:
    toy = TOYS[toy_name]
    model, data = toy.model().double(), batches(toy)
    expected = of_rows(states(model, data), lambda layer, at: layer[:, place])
    scores = score_blocks(model, data, "cka")
    assert scores.values == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert {*scores.unscored} == set(toy.blocks) - set(expected) and scores.num_batches == 3
    tensors = score_blocks(model, data, "cka", "tensor")
    assert tensors.values == {name: scores.values[tensors.blocks[name]] for name in tensors.values}


@pytest.mark.parametrize(("toy_name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left")])
def test_cka_takes_the_real_token_whatever_the_padding(toy_name: str, side: str) -> None:
    toy = TOYS[toy_name]
    model, data = toy.model().double(), batches(toy)
    lengths = [[3 + (at + row) % 4 for row in range(len(batch["labels"]))] for at, batch in enumerate(data)]
    for batch, counts in zip(data, lengths, strict=True):
        places = torch.arange(6).expand(len(counts), 6)
        count = torch.tensor(counts)[:, None]
        batch["attention_mask"] = (places < count if side == "right" else places >= 6 - count).long()
    first = {"right": lambda counts: [0] * len(counts), "left": lambda counts: [6 - n for n in counts]}[side]
    last = {"right": lambda counts: [n - 1 for n in counts], "left": lambda counts: [5] * len(counts)}[side]
    where = [(first if toy_name == "bert" else last)(counts) for counts in lengths]
    expected = of_rows(states(model, data), lambda layer, at: layer[range(len(layer)), where[at]])
    assert score_blocks(model, data, "cka").values == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_layer_that_all_examples_enter_alike_has_no_score(vit: Toy) -> None:
    """The class token: the CKA of rounding errors made the first layer the first choice."""
    model, data = vit.model().double(), batches(vit)
    hidden = states(model, data)
    expected = of_rows([batch[1:] for batch in hidden], lambda layer, at: layer[:, 0])
    scores = score_blocks(model, data, "cka")
    assert list(scores.values.values()) == pytest.approx(list(expected.values()), rel=1e-6, abs=1e-9)
    assert "0" in scores.unscored and "1" in scores.values


class Maps(nn.Module):
    """Layers of feature maps, `(example, channel, row, column)`."""

    def __init__(self, call: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh() if self.call else layer._conv_forward(x, layer.weight, layer.bias)
        return x.square().mean()


def test_cka_of_feature_maps_is_that_of_their_means() -> None:
    torch.manual_seed(0)
    model = Maps().double()
    data = [{"x": torch.randn(4, 3, 5, 6, dtype=torch.float64)} for _ in range(2)]
    x, expected = torch.cat([batch["x"] for batch in data]), {}
    with torch.no_grad():
        for at, layer in enumerate(model.layers):
            before, after = x.mean((2, 3)), layer(x).mean((2, 3))
            expected[str(at)] = 1 - plain_cka(before.numpy(), after.numpy())
            x = layer(x).tanh()
    assert score_blocks(model, data, "cka", loss_fn=own_loss).values == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("model", [Maps(call=False), Routed()], ids=["run by its parent", "a list"])
def test_cka_of_layers_that_are_never_called_is_refused(model: nn.Module) -> None:
    data = [{"x": torch.randn(4, 3, 5, 6)} if isinstance(model, Maps) else {"x": torch.randn(4, 4)} for _ in range(2)]
    for batch in data if isinstance(model, Routed) else ():
        batch["expert"] = torch.zeros(4, dtype=torch.long)
    with pytest.raises(SurgicalError, match=r"cka.*layers.*another criterion"):
        score_blocks(model, data, "cka", loss_fn=own_loss)


def test_cka_of_two_examples_is_refused() -> None:
    with pytest.raises(SurgicalError, match=r"there are 2.*num_batches"):
        score_blocks(TOYS["bert"].model(), [TOYS["bert"].batch(size=2)], "cka")


@pytest.mark.parametrize("name", ["t5", "swin", "whisper", "mamba", "clip", "resnet"])
def test_cka_scores_layers_of_other_families(name: str) -> None:
    toy = FAMILIES[name]
    scores = score_blocks(toy.model(), [toy.batch(seed) for seed in range(3)], "cka")
    assert scores.values and set(scores.values) <= set(BlockMap.find(toy.model()).layers)
    assert all(0 <= value <= 1 for value in scores.values.values())
