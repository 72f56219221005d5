"""What a criterion cannot tell it says; weights of 16 bits, of mixed dtypes, packed or absent it bears or refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from surgical_peft import SurgicalError, criteria, score_blocks, top_k
from surgical_peft.criteria.criterion import needs_of
from tests.support.toys import TOYS, Batch, Toy


def batches(toy: Toy, count: int = 4) -> list[Batch]:
    return [toy.batch(seed, size=2 + seed % 2) for seed in range(count)]


WITH_DATA = [name for name in criteria.__all__ if needs_of(getattr(criteria, name)).batches]
BY_LOSS = [name for name in WITH_DATA if name != "cka"]  # which sees the forward pass only
KINDS = ["rgn", "fisher", "probe"]  # one that sees gradients, one their moments, one the model


@pytest.mark.parametrize(
    ("name", "granularity"), [*((name, "tensor") for name in BY_LOSS), *((name, "module") for name in KINDS)]
)
def test_nothing_can_be_told_behind_a_head_of_zeros(name: str, granularity: str) -> None:
    model = TOYS["bert"].model()
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(SurgicalError, match="head of zeros"):
        score_blocks(model, batches(TOYS["bert"]), name, granularity)


@pytest.mark.parametrize("name", BY_LOSS)
def test_a_block_that_the_loss_never_reaches_has_no_score(name: str) -> None:
    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model.bert.encoder(model.bert.embeddings(batch["input_ids"]))[0]
        return hidden[:, 0].square().mean() + 0 * model.bert.pooler.dense.weight.sum()

    with pytest.warns(UserWarning, match="head"):
        scores = score_blocks(TOYS["bert"].model(), batches(TOYS["bert"]), name, loss_fn=loss_of)
    assert (list(scores.values), scores.unscored) == (["embeddings", "0", "1", "2"], ("head",))
    with pytest.raises(SurgicalError, match="from 1 to 4"):
        top_k(scores, 5)


@pytest.mark.parametrize(
    ("name", "own_loss"), [*((name, True) for name in WITH_DATA), *((name, False) for name in KINDS)]
)
def test_labels_that_are_all_ignored_are_refused(name: str, own_loss: bool) -> None:
    toy = TOYS["llama"]
    data = batches(toy)
    data[1]["labels"] = torch.full_like(data[1]["labels"], -100)
    with pytest.raises(SurgicalError, match="ignore"):
        score_blocks(toy.model(), data, name, loss_fn=None if own_loss else lambda model, batch: model(**batch).loss)


@pytest.mark.parametrize("name", ["fisher", "snr"])
def test_an_example_without_a_label_has_no_part(name: str) -> None:
    toy, (batch,) = TOYS["llama"], batches(TOYS["llama"], 1)
    batch = {key: torch.cat([rows, rows + 1]) for key, rows in batch.items()}
    kept = {key: rows[1:] for key, rows in batch.items()}
    batch["labels"][0] = -100
    assert score_blocks(toy.model(), [batch], name).values == score_blocks(toy.model(), [kept], name).values


@pytest.mark.parametrize("name", WITH_DATA)
def test_one_example_is_told_about_or_refused(name: str) -> None:
    one = [TOYS["bert"].batch(size=1)]
    if name in ("bvr", "snr", "held_out_gain", "probe", "cka"):
        with pytest.raises(SurgicalError, match="num_batches"):
            score_blocks(TOYS["bert"].model(), one, name)
    else:
        assert any(score_blocks(TOYS["bert"].model(), one, name).values.values())


def test_a_loss_over_the_batch_says_nothing_of_single_examples() -> None:
    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return -model(input_ids=batch["input_ids"]).logits.std(0).mean()  # of one example NaN

    score_blocks(TOYS["bert"].model(), batches(TOYS["bert"]), "grad_norm", loss_fn=loss_of)
    with pytest.raises(SurgicalError, match="over a batch"):
        score_blocks(TOYS["bert"].model(), batches(TOYS["bert"]), "fisher", loss_fn=loss_of)


@pytest.mark.parametrize("name", ["fisher", "snr"])
def test_a_loss_that_is_a_sum_over_the_examples_is_taken(name: str) -> None:
    def summed(model: nn.Module, batch: Batch) -> Tensor:
        return len(batch["labels"]) * model(**batch).loss

    score_blocks(TOYS["bert"].model(), batches(TOYS["bert"]), name, loss_fn=summed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["weight_change", "probe"])
def test_short_trainings_of_16_bit_weights_are_those_of_32_bit_ones(name: str, dtype: torch.dtype) -> None:
    """Norms did not move at all in bfloat16; in float16 every training diverged, and was ranked."""
    toy = TOYS["llama"]
    expected = score_blocks(toy.model(), batches(toy), name).values
    model = toy.model().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert score_blocks(model, batches(toy), name).values == pytest.approx(expected, rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_trainings_that_all_diverge_are_not_ranked() -> None:
    toy = TOYS["bert"]
    with pytest.raises(SurgicalError, match="diverged"):
        score_blocks(toy.model(), batches(toy), partial(criteria.probe, pace=1e30))


@pytest.mark.parametrize("name", criteria.__all__)
def test_dtypes_may_be_mixed_in_a_block(name: str) -> None:
    toy = TOYS["bert"]
    model = toy.model()
    expected = score_blocks(model, batches(toy), name).values
    for layer in model.bert.encoder.layer:
        layer.output.LayerNorm.double()
        layer.output.LayerNorm.register_forward_pre_hook(lambda module, args: args[0].double())
        layer.output.LayerNorm.register_forward_hook(lambda module, args, output: output.float())
    found = score_blocks(model, batches(toy), name).values
    assert found == pytest.approx(expected, rel=0.01)  # `snr` sees rounding where a gradient is zero


class Packed(nn.Module):
    """A layer whose weights are packed, beside some that are not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
        self.scale = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x @ self.weight.to(x.dtype)).tanh()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float8_e4m3fn) for name in criteria.__all__), *((name, torch.int8) for name in KINDS)],
)
def test_packed_weights_beside_others_are_left_out(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(Packed(dtype) for _ in range(3))})
    data = [(torch.randn(4, 4),) for _ in range(4)]

    def loss_of(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return nn.Sequential(*model["layers"])(*batch).square().mean()

    scores = score_blocks(model, data, name, loss_fn=loss_of, granularity="tensor")
    names = {*scores.values, *scores.unscored}
    assert names == {f"layers.{index}.scale.{own}" for index in range(3) for own in ("weight", "bias")}
    assert scores.values and not any(layer.weight.requires_grad for layer in model["layers"])


@pytest.mark.parametrize(
    ("name", "part"), [*((name, "some") for name in criteria.__all__), *((name, "all") for name in KINDS)]
)
def test_weights_on_the_meta_device_are_refused(name: str, part: str) -> None:
    model = TOYS["bert"].model()
    (model if part == "all" else model.bert.encoder.layer[1]).to("meta")
    with pytest.raises(SurgicalError, match="meta"):
        score_blocks(model, batches(TOYS["bert"]), name)
