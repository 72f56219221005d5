"""Each criterion against an independent plain loop; what it makes of noise, padding, ties, experts and norm layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalError, criteria, score_blocks
from surgical_peft.criteria import bvr, eb, rgn, snr
from surgical_peft.criteria.angle import degrees
from surgical_peft.criteria.criterion import Moments, is_zero, needs_of
from surgical_peft.criteria.rgn import norm, piece_norms, pieces
from surgical_peft.criteria.weight_snr import ratio
from tests.support.criteria import Routed, own_loss, plain_depth_gain
from tests.support.toys import TOYS, Batch, Toy

Arrays = dict[str, np.ndarray]  # of each weight
Unit = list[str]


def batches(toy: Toy, dtype: torch.dtype = torch.float32, count: int = 5) -> list[Batch]:
    data = [toy.batch(seed, size=1 + seed % 3) for seed in range(count)]
    return [{key: value.to(dtype) if value.is_floating_point() else value for key, value in b.items()} for b in data]


def singles(data: Sequence[Batch]) -> list[Batch]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in data for i in range(len(batch["labels"]))
    ]


def gradients(model: nn.Module, data: Sequence[Batch]) -> list[Arrays]:
    """The gradient of each batch's loss, one `autograd.grad` a batch, in float64 once it is there."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = []
    for batch in data:
        grads = torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)
        full = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
        found.append({name: grad.double().numpy() for name, grad in zip(names, full, strict=True)})
    return found


def arrays(model: nn.Module) -> Arrays:
    return {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}


def together(parts: Arrays, unit: Unit) -> np.ndarray:
    return np.concatenate([parts[name].ravel() for name in unit])


def stacked(samples: list[Arrays], unit: Unit) -> np.ndarray:
    return np.stack([together(sample, unit) for sample in samples])


@dataclass(frozen=True)
class Facts:
    """What a reference may use: the weights, and the gradients of batches and of single examples."""

    weights: Arrays
    of_batches: list[Arrays]
    of_examples: list[Arrays]

    @classmethod
    @cache
    def of(cls, name: str, dtype: torch.dtype) -> Facts:
        model, data = TOYS[name].model().to(dtype), batches(TOYS[name], dtype)
        return cls(arrays(model), gradients(model, data), gradients(model, singles(data)))


def plain_rgn(facts: Facts, unit: Unit) -> float:
    size = np.linalg.norm(together(facts.weights, unit))
    return float(np.mean([np.linalg.norm(g) / size for g in stacked(facts.of_batches, unit)]))


def plain_grad_norm(facts: Facts, unit: Unit) -> float:
    return float(np.mean([np.linalg.norm(g) for g in stacked(facts.of_batches, unit)]))


def plain_snr(facts: Facts, unit: Unit) -> float:
    g = stacked(facts.of_examples, unit)
    mean, variance = g.mean(0), g.var(0)
    return float(np.mean([m * m / v if v else 0.0 for m, v in zip(mean, variance, strict=True)]))


def plain_eb(facts: Facts, unit: Unit) -> float:
    values = []
    for sample in facts.of_batches:
        ratios = []
        for g in (sample[name] for name in unit):
            variance = g.var(axis=0, ddof=1, keepdims=True) if g.ndim and len(g) > 1 else np.zeros_like(g)
            ratios.append((g**2 / (variance + 1e-8)).ravel())
        values.append(np.concatenate(ratios).mean())
    return float(np.mean(values))


def plain_bvr(facts: Facts, unit: Unit) -> float:
    m = s = np.zeros(())  # as in BVG_LS.py, with Adam's correction
    for t, g in enumerate(stacked(facts.of_batches, unit), start=1):
        m, s = 0.9 * m + 0.1 * g, 0.9 * s + 0.1 * g * g
        mean, square = m / (1 - 0.9**t), s / (1 - 0.9**t)
    return float((mean**2).sum() / max((square - mean**2).sum(), 1e-10))


def plain_fisher(facts: Facts, unit: Unit) -> float:
    return float(sum(np.linalg.norm(np.mean([g[name] ** 2 for g in facts.of_examples], axis=0)) for name in unit))


def plain_gain(own: np.ndarray, pull: np.ndarray) -> float:
    step, square = own.mean(0), (own**2).mean(0)
    return float(sum(p * m / math.sqrt(s) for p, m, s in zip(pull, step, square, strict=True) if s > 0))


def plain_adam_gain(facts: Facts, unit: Unit) -> float:
    g = stacked(facts.of_batches, unit)
    return plain_gain(g, g.mean(0))


def plain_held_out_gain(facts: Facts, unit: Unit) -> float:
    g = stacked(facts.of_batches, unit)
    even, odd = g[::2], g[1::2]
    return (plain_gain(even, odd.mean(0)) + plain_gain(odd, even.mean(0))) / 2


REFERENCES: dict[str, Callable[[Facts, Unit], float]] = {
    "rgn": plain_rgn,
    "grad_norm": plain_grad_norm,
    "snr": plain_snr,
    "eb": plain_eb,
    "bvr": plain_bvr,
    "fisher": plain_fisher,
    "adam_gain": plain_adam_gain,
    "held_out_gain": plain_held_out_gain,
}


EACH = [("vit", "block"), ("bert", "module"), ("llama", "tensor")]


def units_of(model: nn.Module, granularity: str) -> dict[str, Unit]:
    blocks = BlockMap.find(model)
    unit_of = {"block": blocks.block_of, "module": lambda n: n.rpartition(".")[0], "tensor": lambda n: n}[granularity]
    units: dict[str, Unit] = {}
    for name, _ in model.named_parameters():
        units.setdefault(unit_of(name), []).append(name)
    return units


@pytest.mark.parametrize(
    ("toy_name", "granularity", "dtype"),
    [*((*each, torch.float64) for each in EACH), ("bert", "block", torch.float32)],
    ids=["block", "module", "tensor", "block-float32"],
)
@pytest.mark.parametrize("name", REFERENCES)
def test_it_equals_a_plain_loop(name: str, toy_name: str, granularity: str, dtype: torch.dtype) -> None:
    toy, facts = TOYS[toy_name], Facts.of(toy_name, dtype)
    model = toy.model().to(dtype)
    scores = score_blocks(model, batches(toy, dtype), name, granularity)
    expected = {unit: REFERENCES[name](facts, names) for unit, names in units_of(model, granularity).items()}
    # In float32 the gradients themselves differ by more where sums are taken in another order: it depends on the CPU.
    assert scores.values == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 3e-6, abs=1e-12)


@cache
def plain_training(toy_name: str) -> tuple[Arrays, Arrays]:
    """Weights before and after 16 steps of Adam on everything, its rate falling linearly from 1e-4."""
    model, data = TOYS[toy_name].model().double(), batches(TOYS[toy_name], torch.float64)
    before = arrays(model)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(16):
        optimizer.param_groups[0]["lr"] = 1e-4 * (16 - step) / 16
        optimizer.zero_grad()
        model(**data[step % len(data)]).loss.backward()
        optimizer.step()
    return before, arrays(model)


@pytest.mark.parametrize(("toy_name", "granularity"), EACH)
def test_changes_of_weights_equal_a_plain_training(toy_name: str, granularity: str) -> None:
    toy = TOYS[toy_name]
    before, after = plain_training(toy_name)
    lengths, angles = {}, {}
    for unit, names in units_of(toy.model(), granularity).items():
        u, v = together(before, names), together(after, names)
        lengths[unit] = np.linalg.norm(v - u) / len(u)
        aside = v - u * (u @ v) / (u @ u)
        angles[unit] = math.degrees(math.atan2(np.linalg.norm(aside), u @ v / np.linalg.norm(u)))
    for name, expected in (("weight_change", lengths), ("angle", angles)):
        scores = score_blocks(toy.model().double(), batches(toy, torch.float64), name, granularity)
        assert scores.values == pytest.approx(expected, rel=1e-6, abs=1e-12), name


def plain_spectrum(weights: Arrays) -> dict[str, float]:
    """The rank of each matrix within its type, by Spectrum's formula."""
    kinds: dict[str, dict[str, float]] = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            matrix = weight.reshape(len(weight), -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            spread = (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.349
            signal = values > spread * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
            with np.errstate(divide="ignore"):
                score = values[signal].sum() / values[~signal].sum() / values.max()
            kinds.setdefault(re.sub(r"\.\d+\.", ".#.", name), {})[name] = score
    ranks = {}
    for kind in kinds.values():
        for name, score in kind.items():
            worse, same = (sum(each) for each in zip(*((s < score, s == score) for s in kind.values()), strict=True))
            if len(kind) > 1:
                ranks[name] = (worse + (1 + same) / 2) / len(kind)
    return ranks


@pytest.mark.parametrize(("toy_name", "granularity"), EACH)
def test_weight_snr_equals_plain_ranks(toy_name: str, granularity: str) -> None:
    model = TOYS[toy_name].model().double()
    ranks = plain_spectrum(arrays(model))
    units = units_of(model, granularity)
    ranked = {unit: [ranks[name] for name in names if name in ranks] for unit, names in units.items()}
    expected = {unit: sum(each) / len(each) for unit, each in ranked.items() if each}
    scores = score_blocks(model, None, "weight_snr", granularity)
    assert scores.values == pytest.approx(expected, rel=1e-6)
    assert scores.num_batches == 0 and set(scores.unscored) == set(units) - set(expected)


def test_every_criterion_has_a_reference() -> None:
    elsewhere = {"probe", "depth_gain", "kappa", "cka", "middle", "depth"}  # below, and in files of their own
    assert {*REFERENCES, "weight_change", "angle", "weight_snr", "random", *elsewhere} == set(criteria.__all__)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_depth_gain_is_the_gain_with_credit_for_size_and_depth(name: str) -> None:
    toy = TOYS[name]
    model = toy.model().double()
    data = batches(toy, torch.float64)
    expected = plain_depth_gain(model, score_blocks(model, data, "adam_gain").values)
    assert score_blocks(model, data, "depth_gain").values == pytest.approx(expected, rel=1e-6)


def test_depth_gain_without_a_head() -> None:
    """A loss that the head has no part in, and units that are parts of blocks."""
    toy = TOYS["vit"]
    model = toy.model().double()
    data = batches(toy, torch.float64)

    def spread(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[-1].var()

    gains = score_blocks(model, data, "adam_gain", loss_fn=spread).values
    assert not gains.get("head")
    scores = score_blocks(model, data, "depth_gain", loss_fn=spread).values
    assert scores == pytest.approx(plain_depth_gain(model, gains), rel=1e-6)


@pytest.mark.parametrize("granularity", ["module", "tensor"])
def test_depth_gain_of_parts_has_the_credit_of_their_blocks(granularity: str) -> None:
    toy = TOYS["vit"]
    model = toy.model().double()
    data = batches(toy, torch.float64)
    blocks = score_blocks(model, data, "adam_gain").values
    credit = 16 * blocks["head"] / max(blocks.values())
    found = score_blocks(model, data, "adam_gain", granularity)
    layers = [name for name in blocks if name.isdigit()]
    assert len(found.values) >= 100
    expected = {}
    for name, gain in found.values.items():
        block = found.blocks[name]
        depth = int(block) / len(layers) if block.isdigit() else block != "embeddings"
        size = found.sizes[name] / max(found.sizes.values())
        expected[name] = gain / max(found.values.values()) * size**0.25 * credit**depth
    assert score_blocks(model, data, "depth_gain", granularity).values == pytest.approx(expected, rel=1e-6)


def test_depth_is_told_by_the_block_map_alone() -> None:
    """By which layers a step could skip it was 0 where a module is never called, as `out_proj` in here."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return self.norm(x).square().sum(-1).log().var()

    torch.manual_seed(0)
    model = Stack().double()
    data = [{"x": torch.randn(3, 5, 4, dtype=torch.float64)} for _ in range(2)]
    own = {"loss_fn": lambda model, batch: model(**batch)}
    gains = score_blocks(model, data, "adam_gain", **own)
    scores = score_blocks(model, data, "depth_gain", **own).values
    for block in ("0", "1", "2"):
        size = gains.sizes[block] / max(gains.sizes.values())
        plain = gains.values[block] / max(gains.values.values()) * size**0.25
        assert scores[block] == pytest.approx(plain * math.e ** (int(block) / 3), rel=1e-6)


def test_a_matrix_of_zeros_has_no_rank() -> None:
    """Its ratio is 0 / 0, of which nothing is larger or smaller: it got a rank below that of the smallest."""
    model = TOYS["bert"].model()
    layer = "bert.encoder.layer.1."
    nn.init.zeros_(model.get_parameter(layer + "intermediate.dense.weight"))
    tensors = score_blocks(model, None, "weight_snr", "tensor")
    assert layer + "intermediate.dense.weight" in tensors.unscored
    kind = [value for name, value in tensors.values.items() if name.endswith("intermediate.dense.weight")]
    assert sorted(kind) == [0.5, 1]
    others = [value for name, value in tensors.values.items() if name.startswith(layer)]
    assert score_blocks(model, None, "weight_snr").values["1"] == pytest.approx(sum(others) / len(others))


def test_the_ratio_of_one_singular_value_is_infinite() -> None:
    assert ratio(torch.ones(1, 4)) == math.inf


def test_random_is_seeded_and_needs_no_data(vit: Toy) -> None:
    first = score_blocks(vit.model(), None, "random")
    assert first == score_blocks(vit.model(), None, "random")
    assert first.num_batches == 0 and len(set(first.values.values())) == len(first.values)
    other = score_blocks(vit.model(), None, partial(criteria.random, seed=3))
    assert other.values != first.values and other.criterion == "random(seed=3)"
    assert all(0 <= value < 1 for value in [*first.values.values(), *other.values.values()])


def moments_of(samples: Tensor, decay: float = 1.0) -> Moments:
    moments = Moments([samples[0]], decay)
    for position, sample in enumerate(samples):
        moments.update([sample], position)
    return moments


def test_bvr_of_pure_noise_tends_to_its_floor() -> None:
    noise = torch.randn(200, 20_000, generator=torch.Generator().manual_seed(0))
    assert bvr([noise[0]], moments_of(noise, 0.9)) == pytest.approx((1 - 0.9) / (2 * 0.9), rel=0.01)  # 0.0556


@pytest.mark.parametrize("criterion", [bvr, snr])
def test_a_variance_over_one_sample_is_refused(criterion: Callable[..., float]) -> None:
    grad = torch.tensor([[3.0, 4.0]])
    with pytest.raises(SurgicalError, match="1 sample"):
        criterion([grad[0]], moments_of(grad))


def test_snr_of_pure_noise_is_about_one_by_the_number_of_examples() -> None:
    noise = torch.randn(50, 100_000, generator=torch.Generator().manual_seed(0))
    assert snr([noise[0]], moments_of(noise)) == pytest.approx(1 / 50, rel=0.1)


def test_snr_of_a_gradient_without_noise_is_large_and_finite() -> None:
    assert 1e6 < snr([torch.ones(2)], moments_of(torch.tensor([[1.0, 0.0]] * 5))) < math.inf


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_in_float32_are_those_of_float64(offset: float) -> None:
    """The mean square less the squared mean would lose all digits of a small variance at a large mean."""
    samples = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)) + offset
    moments, exact = moments_of(samples), samples.double()
    torch.testing.assert_close(moments.means[0].double(), exact.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.variances[0].double(), exact.var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.squares[0].double(), exact.square().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_moments_of_parts_merge_into_those_of_the_whole(decay: float) -> None:
    samples = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merged = Moments([samples[0]], decay)
    merged.fade(6)
    for part in ([0, 3, 6], [1, 2], [], [4, 5]):
        moments = Moments([samples[0]], decay)
        for position in part:
            moments.update([samples[position]], position)
        moments.fade(6)
        merged.merge(moments.count, moments.total, moments.means, moments.spreads)
    expected = moments_of(samples, decay)
    assert merged.count == 7 and merged.total == pytest.approx(expected.total)
    torch.testing.assert_close(merged.means, expected.means)
    torch.testing.assert_close(merged.variances, expected.variances)


def test_moments_of_low_precision_are_kept_in_float32() -> None:
    moments = moments_of(torch.full((3, 2), 0.1, dtype=torch.bfloat16))
    assert moments.means[0].dtype == moments.spreads[0].dtype == torch.float32


def test_fisher_looks_at_every_example_once() -> None:
    """The released code takes the first example over and over, so that more examples change nothing."""
    toy = TOYS["bert"]
    many = toy.batch(size=100)
    first = {key: value[:1] for key, value in many.items()}
    one, hundred = (score_blocks(toy.model(), [data], "fisher").values for data in (first, many))
    assert all(hundred[name] != pytest.approx(one[name], rel=0.01) for name in one)
    assert score_blocks(toy.model(), [first] * 3, "fisher").values == pytest.approx(one, rel=1e-5)
    quarters = [{key: value[at : at + 25] for key, value in many.items()} for at in range(0, 100, 25)]
    assert score_blocks(toy.model(), quarters, "fisher").values == pytest.approx(hundred, rel=1e-5)


def test_padding_changes_no_fisher_score() -> None:
    toy = TOYS["bert"]
    short = {**toy.batch(size=3), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    long = {key: nn.functional.pad(value, (0, 4)) if value.ndim > 1 else value for key, value in short.items()}
    model = toy.model().double()
    expected = score_blocks(model, [short], "fisher", "tensor").values
    assert score_blocks(model, [long], "fisher", "tensor").values == pytest.approx(expected, rel=1e-6, abs=1e-18)
    unmasked = {key: value for key, value in long.items() if key != "attention_mask"}
    assert score_blocks(model, [unmasked], "fisher", "tensor").values != pytest.approx(expected, rel=1e-2)


class Normed(nn.Module):
    """Layers with batch norms whose names do not tell, as in torchvision's shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, padding=1), "shortcut": nn.BatchNorm1d(4)}) for _ in range(3)
        )
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["shortcut"](layer["conv"](x)).relu()
        return nn.functional.cross_entropy(self.classifier(x.mean(-1)), labels)


WITHOUT_CALLS = [name for name in criteria.__all__ if name != "cka"]  # whose layers need not be called themselves


@pytest.mark.parametrize("name", WITHOUT_CALLS)
def test_batch_norms_are_scored_with_their_block_and_keep_their_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = Normed().train()
    data = [{"x": torch.randn(4, 4, 5), "labels": torch.randint(0, 3, (4,))} for _ in range(4)]
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    tensors = score_blocks(model, data, name, "tensor", loss_fn=own_loss)
    assert score_blocks(model, data, name, loss_fn=own_loss).sizes["0"] == 4 * 4 * 3 + 4 + 4 + 4
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert {"layers.0.shortcut.bias", "layers.2.shortcut.bias"} <= set(tensors.unscored)  # new ones are zero
    if name not in ("weight_snr", "kappa"):  # which see matrices only
        assert tensors.blocks["layers.0.shortcut.weight"] == "0"


@pytest.mark.parametrize("name", criteria.__all__)
@pytest.mark.parametrize("toy_name", ["gpt2", "t5"])
def test_tied_weights_count_once(toy_name: str, name: str) -> None:
    toy = TOYS[toy_name]
    scores = score_blocks(toy.model(), batches(toy, count=4), name, "module")
    names = [*scores.values, *scores.unscored]
    assert "lm_head" not in names and len(names) == len(set(names))


@pytest.mark.parametrize("name", REFERENCES)
def test_the_gradient_of_a_tied_weight_is_that_of_all_its_uses(name: str) -> None:
    facts, tied = Facts.of("gpt2", torch.float64), "transformer.wte.weight"
    model, data = TOYS["gpt2"].model().double(), batches(TOYS["gpt2"], torch.float64)
    value = score_blocks(model, data, name, "tensor").values[tied]
    assert value == pytest.approx(REFERENCES[name](facts, [tied]), rel=1e-6)


@pytest.mark.parametrize("name", WITHOUT_CALLS)
def test_an_expert_without_a_token_has_no_score(name: str) -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3, 4), "expert": torch.zeros(3, dtype=torch.long)} for _ in range(4)]
    scores = score_blocks(Routed(), data, name, "module", loss_fn=own_loss).values
    assert all(math.isfinite(value) for value in scores.values())
    if needs_of(getattr(criteria, name)).batches:
        assert not {"layers.0.1", "layers.2.1"} & set(scores) and scores["layers.0.0"] != 0


def test_eb_by_hand() -> None:
    assert eb([torch.ones(2, 1)], [torch.tensor([[1.0], [3.0]])]) == pytest.approx((1 + 9) / 2 / 2)
    assert eb([torch.ones(())], [torch.tensor(2.0)]) == pytest.approx(4e8)  # nothing varies
    assert eb([torch.ones(1, 2)], [torch.tensor([[1.0, 2.0]])]) == pytest.approx(2.5e8)


@pytest.mark.parametrize("between", [1e-6, 30.0, 90.0, 180.0])
def test_small_and_large_angles_are_exact(between: float) -> None:
    turn = math.radians(between)
    after = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    assert degrees([torch.tensor([1.0, 0.0])], [2 * after]) == pytest.approx(between, rel=1e-6)


def test_rgn_by_hand() -> None:
    assert rgn([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])]) == pytest.approx(0.2)


def test_rgn_is_of_the_concatenation_and_not_a_mean_over_tensors() -> None:
    weights = [torch.tensor([[3.0], [0.0]]), torch.tensor([4.0])]
    grads = [torch.tensor([[6.0], [0.0]]), torch.tensor([8.0])]
    assert rgn(weights, grads) == pytest.approx(2.0)
    assert rgn(weights, [grads[0], torch.zeros(1)]) == pytest.approx(6 / 5)  # the mean of ratios would be 1


def test_rgn_of_a_zero_gradient_is_zero() -> None:
    assert rgn([torch.ones(3)], [torch.zeros(()).expand(3)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norms_of_pieces_are_those_of_each_piece(dtype: torch.dtype) -> None:
    big, small = torch.randn(70, 10).to(dtype), torch.randn(5).to(dtype)
    tensors = [small, big, big.T, big[:6, :]]
    size = 64  # 700 and 60 entries: ten pieces with a rest, none
    each = [
        torch.linalg.vector_norm(piece.to(torch.promote_types(dtype, torch.float32)))
        for piece in pieces(tensors, size)
    ]
    norms = piece_norms(tensors, size)
    torch.testing.assert_close(norms.sort().values, torch.stack(each).sort().values)


def test_a_large_tensor_is_read_in_one_call() -> None:
    with torch.profiler.profile() as profile:
        piece_norms([torch.ones(1000)], 10)
    calls = {event.key: event.count for event in profile.key_averages() if "norm" in event.key}
    assert calls == {"aten::linalg_vector_norm": 1}


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [math.nan, 0.0]])
def test_a_tensor_is_zero_if_all_of_it_is(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert is_zero(tensor) is is_zero(tensor.expand(3, -1)) is not any(values)
    assert is_zero(tensor.sum()) is not any(values)


def test_norms_of_large_tensors_are_exact() -> None:
    """The float32 norm of one large tensor is wrong on the CPU: by 4e-5 at this size, by 1.4e-3 at 25 million."""
    tensor = torch.randn(1500, 2000, generator=torch.Generator().manual_seed(0)).mul_(0.02).add_(0.01)
    expected = torch.linalg.vector_norm(tensor.double()).item()
    assert norm([tensor]) == pytest.approx(expected, rel=1e-6)
    assert norm([tensor[:750], tensor[750:].reshape(3, -1)]) == pytest.approx(expected, rel=1e-6)


def test_norms_of_low_precision_are_summed_in_float32() -> None:
    tensor = torch.full((100_000,), 0.01, dtype=torch.bfloat16)
    assert norm([tensor]) == pytest.approx(tensor.double().norm().item(), rel=1e-6)
    assert norm([torch.full((100_000,), 300.0, dtype=torch.float16)]) == pytest.approx(300 * math.sqrt(1e5), rel=1e-6)


def test_norms_of_double_precision_stay_double() -> None:
    tensor = torch.randn(1000, dtype=torch.float64)
    assert norm([tensor]) == pytest.approx(tensor.norm().item(), rel=1e-14)


@pytest.mark.parametrize("tensor", [torch.tensor(-2.0), torch.full((4, 1), 1.0).expand(4, 1), torch.ones(2, 2).t()])
def test_norms_of_odd_shapes(tensor: torch.Tensor) -> None:
    assert norm([tensor]) == pytest.approx(2.0)
