"""What is trained follows from what was asked and from the architecture, not from what happens to be frozen."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalConfig
from surgical_peft.tuner.tensors.architecture import fixed_by_architecture
from tests.support.families import FAMILIES
from tests.support.plain import PLAIN
from tests.support.toys import TOYS, Toy
from tests.support.wrapping import logits, no_warnings, nudge, same, trainable

EVERY = TOYS | FAMILIES | PLAIN
TWO_SIDES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TWO_SIDES |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1], "num_time_features": 1}
SERIES |= {"attention_dropout": 0.0, "dropout": 0.0}


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**TWO_SIDES, **TEXT, **sizes))


def roformer() -> nn.Module:
    return T.RoFormerForSequenceClassification(
        T.RoFormerConfig(**SMALL, vocab_size=32, embedding_size=16, max_position_embeddings=16)
    )


SINUSOIDS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many a model has
    "whisper": (whisper, 1),
    "marian": (lambda: T.MarianMTModel(T.MarianConfig(**TWO_SIDES, **TEXT, max_position_embeddings=16)), 2),
    "pegasus": (
        lambda: T.PegasusForConditionalGeneration(T.PegasusConfig(**TWO_SIDES, **TEXT, max_position_embeddings=16)),
        2,
    ),
    "roformer": (roformer, 1),
    "informer": (lambda: T.InformerForPrediction(T.InformerConfig(**TWO_SIDES, **SERIES)), 2),
    "time_series": (
        lambda: T.TimeSeriesTransformerForPrediction(T.TimeSeriesTransformerConfig(**TWO_SIDES, **SERIES)),
        2,
    ),
}
BEFORE: dict[str, Callable[[nn.Module], Any]] = {
    "as built": lambda model: None,
    "all set to train": lambda model: model.requires_grad_(True),
    "frozen": lambda model: model.requires_grad_(False),
}


def positions(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("embed_positions.weight")}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", SINUSOIDS)
def test_sinusoids_never_train(name: str, before: str) -> None:
    build, count = SINUSOIDS[name]
    torch.manual_seed(0)
    base = build()
    fixed = {key for key, parameter in base.named_parameters() if not parameter.requires_grad}
    assert len(fixed) == count and fixed <= positions(base).keys()
    BEFORE[before](base)
    with no_warnings():
        model = get_peft_model(base, SurgicalConfig(blocks="all"))
    assert {key.removeprefix("base_model.model.") for key in trainable(model)} == {
        key for key, _ in base.named_parameters()
    } - fixed
    values = {key: base.get_parameter(key).detach().clone() for key in fixed}
    model.add_adapter("second", SurgicalConfig(blocks="all"))
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        nudge(model)
        assert all(torch.equal(base.get_parameter(key), value) for key, value in values.items())
    again = get_peft_model(model.merge_and_unload(), SurgicalConfig(blocks="all"))
    assert fixed.isdisjoint(key.removeprefix("base_model.model.") for key in trainable(again))


def test_learned_positions_of_the_same_models_train() -> None:
    """Whisper's decoder has some, under the name that the encoder's sinusoids have."""
    model = get_peft_model(whisper(), SurgicalConfig(blocks="all"))
    assert {name.split("model.")[-1]: p.requires_grad for name, p in positions(model).items()} == {
        "encoder.embed_positions.weight": False,
        "decoder.embed_positions.weight": True,
    }


# What happens to be frozen.


def bitfit(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def every_third(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)


def frozen_but_for_one(model: nn.Module) -> None:
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)


def ours(model: nn.Module) -> nn.Module:
    blocks = BlockMap.find(model).names
    tuned = get_peft_model(model, SurgicalConfig(blocks=[blocks[1], blocks[-2]], target_modules="all-norm"))
    return nudge(tuned).merge_and_unload()


def ours_after_bitfit(model: nn.Module) -> nn.Module:
    bitfit(model)
    return ours(model)


def ours_unloaded(model: nn.Module) -> nn.Module:
    return get_peft_model(model, SurgicalConfig(blocks=[BlockMap.find(model).names[1]])).unload()


def lora(model: nn.Module) -> nn.Module:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    norm = [path for path, module in model.named_modules() if "Norm" in type(module).__name__]
    config = LoraConfig(target_modules=linear[:3], modules_to_save=norm[:2])
    return get_peft_model(model, config).merge_and_unload()


HAPPENED = {each.__name__: each for each in (bitfit, every_third, frozen_but_for_one, ours, ours_after_bitfit)}
HAPPENED |= {each.__name__: each for each in (ours_unloaded, lora)}


@pytest.mark.parametrize("happened", HAPPENED)
@pytest.mark.parametrize("name", ["bert", "llama", "llama_tied", "vit", "t5", "qwen3_moe", "whisper"])
def test_the_whole_block_trains_whatever_was_frozen(name: str, happened: str) -> None:
    family = EVERY[name]

    def trained(model: nn.Module) -> set[str]:
        return set(trainable(get_peft_model(model, SurgicalConfig(blocks=[family.first, family.last]))))

    expected = trained(family.model())
    base = family.model()
    base = HAPPENED[happened](base) or base
    flags = {key: parameter.requires_grad for key, parameter in base.named_parameters()}
    with no_warnings():
        assert trained(base) == expected
    if happened not in ("ours", "ours_unloaded"):  # which put back what was
        assert sum(flags.values()) < 0.8 * len(flags)


@pytest.mark.parametrize("name", ["bert", "llama_tied", "resnet"])
def test_a_second_stage_moves_every_weight_of_its_block(name: str) -> None:
    family = EVERY[name]
    first = get_peft_model(family.model(), SurgicalConfig(blocks=[family.last]))
    base = nudge(first).merge_and_unload()
    before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
    expected = logits(base, family.batch())
    model = get_peft_model(base, SurgicalConfig(blocks=[family.first]))
    chosen = {key.removeprefix("base_model.model.") for key in trainable(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**family.batch()).loss.backward()
    optimizer.step()
    model.eval()
    still = {key for key, parameter in base.named_parameters() if torch.equal(parameter, before[key])}
    no_gradient = {key for key in chosen if not base.get_parameter(key).grad.abs().max() > 0}
    assert before.keys() - still == chosen - no_gradient and len(no_gradient) <= 1  # BERT's key bias has none
    with model.disable_adapter():
        assert same(logits(model, family.batch()), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_told_is_named_and_trains(name: str) -> None:
    """A model that no config builds may hold fixed positions, or have been frozen by hand."""
    family = PLAIN[name]
    base = family.model()
    path = BlockMap.find(base).modules[family.last][0]
    inside = [key for key, _ in base.named_parameters() if key.startswith(f"{path}.")]
    base.get_parameter(inside[0]).requires_grad_(False)
    base.stem.weight.requires_grad_(False)  # not chosen: not named
    with pytest.warns(UserWarning, match=re.escape(inside[0])) as caught:
        model = get_peft_model(base, SurgicalConfig(blocks=[family.last]))
    ours = [each for each in caught if inside[0] in str(each.message)]
    assert len(ours) == 1 and not any(key in str(ours[0].message) for key in [*inside[1:], "stem.weight"])
    assert {key.removeprefix("base_model.model.") for key in trainable(model)} == set(inside)
    model.unload()
    assert not base.get_parameter(inside[0]).requires_grad and base.get_parameter(inside[1]).requires_grad


@pytest.mark.parametrize("before", ["as built", "frozen"])
def test_nothing_is_named_where_nothing_or_everything_is_frozen(before: str) -> None:
    base = PLAIN["lone"].model()
    BEFORE[before](base)
    with no_warnings():
        model = get_peft_model(base, SurgicalConfig(blocks=["1"]))
    assert len(trainable(model)) == 5


def test_a_plain_module_around_one_of_transformers_knows_what_the_inner_one_fixes() -> None:
    outer = nn.ModuleDict({"asr": whisper(), "scale": nn.ParameterDict({"gain": nn.Parameter(torch.ones(3))})})
    every_third(outer)
    names = [name for name, _ in outer.named_parameters()]
    outer.scale.gain.requires_grad_(False)
    assert fixed_by_architecture(outer, names) == ({"asr.model.encoder.embed_positions.weight"}, ["scale.gain"])


class Wants(T.BertForSequenceClassification):
    """Cannot be built from its config alone."""

    def __init__(self, config: T.BertConfig, size: int) -> None:
        super().__init__(config)
        self.extra = nn.Linear(size, size)


def test_a_model_that_cannot_be_built_anew_is_named() -> None:
    base = Wants(T.BertConfig(**SMALL, vocab_size=32), 4)
    chosen = "bert.encoder.layer.1.output.dense.weight"
    base.get_parameter(chosen).requires_grad_(False)
    with pytest.warns(UserWarning, match=re.escape(chosen)):
        model = get_peft_model(base, SurgicalConfig(blocks=["1"]))
    assert model.get_base_model().get_parameter(chosen).requires_grad


# What it costs to find out.


class OnlyMeta(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes that are made on a real device."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor) and not each.is_meta and func.is_view is False:
                self.bytes += each.nbytes
        return out


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]


@pytest.mark.parametrize("name", EVERY)
def test_wrapping_uses_no_random_numbers(name: str) -> None:
    family: Toy = EVERY[name]
    base = family.model()
    before = random_states()
    model = get_peft_model(base, SurgicalConfig(blocks="all"))
    model.add_adapter("second", SurgicalConfig(blocks=[family.last]))
    model.set_adapter("second")
    model.unload()
    assert random_states() == before


@pytest.mark.parametrize("name", ["bert", "llama_tied", "t5", "vit", "clip", "qwen3_moe", "whisper"])
def test_the_architecture_is_asked_without_a_weight(name: str) -> None:
    base = EVERY[name].model()
    names = [key for key, _ in base.named_parameters()]
    weights = sum(parameter.nbytes for parameter in base.parameters())
    with OnlyMeta() as made:
        fixed, unknown = fixed_by_architecture(base, names)
    assert made.bytes < 0.05 * weights and not unknown
    assert fixed == {key for key, parameter in base.named_parameters() if not parameter.requires_grad}
    assert torch.get_default_device() == torch.device("cpu") and torch.get_default_dtype() == torch.float32
