"""What a training gets instead of running its frozen start is what that would have given, and it is not run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CTRLConfig,
    CTRLLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from surgical_peft import BlockMap, SurgicalConfig, get_surgical_model
from surgical_peft.experiments.training import activation_cache as prefix_cache
from surgical_peft.experiments.training.activation_cache import AT, PrefixCache
from tests.support.toys import VOCABULARY, Batch, Toy

COUNT, SIZE = 12, 5


def batches_of(toy: Toy) -> list[Batch]:
    """Twelve examples in batches of 5, 5 and 2."""
    whole = toy.batch(size=COUNT)
    return [{key: value[start : start + SIZE] for key, value in whole.items()} for start in range(0, COUNT, SIZE)]


def chosen(toy: Toy, at: torch.Tensor) -> Batch:
    return {key: value[at] for key, value in toy.batch(size=COUNT).items()}


def gradients(toy: Toy, blocks: Any, cache: PrefixCache | None, ran: list[str], **config: Any) -> dict[str, Any]:
    """Gradients of one step on some mixed examples, and the names of the modules that ran."""
    base = toy.model()
    originals = dict(base.named_modules())
    for name, module in originals.items():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=blocks, **config))
    at = torch.tensor([7, 0, 11, 4])
    batch = chosen(toy, at)
    if cache is None:
        wrapped(**batch).loss.backward()
    else:
        with cache.skipping(wrapped, base, originals):
            ran.clear()  # it has been tried out
            wrapped(**batch, **{AT: at}).loss.backward()
    return {name: weight.grad for name, weight in wrapped.named_parameters() if weight.grad is not None}


def test_gradients_are_those_of_the_whole_forward_pass(toy: Toy) -> None:
    model = toy.model()
    cache = PrefixCache(model, batches_of(toy))
    names = BlockMap.find(model).names
    for block in (toy.first, toy.last, names[-1]):
        plain, short = list[str](), list[str]()
        expected = gradients(toy, [block], None, plain)
        found = gradients(toy, [block], cache, short)
        assert found.keys() == expected.keys() and expected
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
        if toy.name != "t5":  # its layers hand on position biases, which are not by example: nothing is skipped
            assert len(short) < len(plain) or block == toy.first


def test_the_frozen_start_does_not_run_and_what_is_above_does(vit: Toy) -> None:
    model = vit.model()
    cache = PrefixCache(model, batches_of(vit))
    layers = BlockMap.find(model).modules
    inside = [f"{layers['0'][0]}.attention", f"{layers['1'][0]}.attention"]
    for block, runs in (
        ("embeddings", [True, True]),
        ("0", [True, True]),
        ("1", [False, True]),
        ("head", [False] * 2),
    ):
        ran: list[str] = []
        gradients(vit, [block], cache, ran)
        # a copy in training has the hooks of its original
        assert [name in ran for name in inside] == runs, block


def test_under_autocast_outputs_are_kept_as_they_come(vit: Toy) -> None:
    cache = PrefixCache(vit.model(), batches_of(vit), torch.bfloat16)
    short = list[str]()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(vit, ["1"], None, [])
        found = gradients(vit, ["1"], cache, short)
    assert f"{BlockMap.find(vit.model()).modules['0'][0]}.attention" not in short
    assert found.keys() == expected.keys() and expected
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=2e-2, atol=2e-2 * float(expected[key].abs().max()))


def test_part_of_a_block_counts_as_its_block(vit: Toy) -> None:
    cache = PrefixCache(vit.model(), batches_of(vit))
    expected = gradients(vit, ["1"], None, [], target_modules=["mlp"])
    found = gradients(vit, ["1"], cache, [], target_modules=["mlp"])
    assert found.keys() == expected.keys() and expected
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_say_its_examples_is_run_whole(vit: Toy) -> None:
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    batch = vit.batch(seed=9, size=3)
    expected = base(**batch).logits
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))
    with cache.skipping(wrapped, base, originals):
        wrapped(**chosen(vit, torch.tensor([1, 2])), **{AT: torch.tensor([1, 2])})
        torch.testing.assert_close(wrapped(**batch).logits, expected)
    torch.testing.assert_close(wrapped(**batch).logits, expected)


def test_an_error_on_the_way_leaves_the_model_whole(vit: Toy) -> None:
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    expected = base(**vit.batch()).logits
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))
    with pytest.raises(IndexError), cache.skipping(wrapped, base, originals):
        wrapped(**vit.batch(), **{AT: torch.tensor([COUNT])})
    torch.testing.assert_close(wrapped(**vit.batch()).logits, expected)


@pytest.mark.parametrize("error", [KeyError("hidden_state"), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_an_error_that_skipping_did_not_cause_passes_through(vit: Toy, error: Exception) -> None:
    """Any error of the trial run, out of memory included, was taken for `cannot be skipped`."""
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))

    def fail(*_: Any) -> None:
        raise error

    wrapped.register_forward_hook(fail)
    with pytest.raises(type(error)), cache.skipping(wrapped, base, originals):
        pass


@pytest.mark.parametrize(("error", "passes"), [(MemoryError(), True), (KeyError("router_logits"), False)])
def test_a_model_that_fails_without_what_is_skipped_is_run_whole(vit: Toy, error: Exception, passes: bool) -> None:
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))
    ran: list[str] = []

    def look(*_: Any) -> None:
        if not ran:
            raise error
        ran.clear()

    inside = f"{BlockMap.find(base).modules['0'][0]}.attention"
    originals[inside].register_forward_hook(lambda *_: ran.append(inside))
    wrapped.register_forward_hook(look)
    with pytest.raises(MemoryError) if passes else nullcontext(), cache.skipping(wrapped, base, originals):
        wrapped(**chosen(vit, torch.tensor([1, 2])), **{AT: torch.tensor([1, 2])})
        assert not passes


class Company(nn.Module):
    """A layer whose output depends on the other examples of the batch."""

    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.change(self.inner(*args, **kwargs))


@pytest.mark.parametrize("change", [lambda x: x - x.mean(0, keepdim=True), lambda x: x + len(x)], ids=["mean", "size"])
def test_a_layer_that_looks_at_the_whole_batch_is_left_out(vit: Toy, change: Callable[..., torch.Tensor]) -> None:
    model = vit.model()
    name = BlockMap.find(model).modules["0"][0]
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)[int(last)] = Company(model.get_submodule(name), change)  # type: ignore[operator]
    cache = PrefixCache(model, batches_of(vit))
    assert BlockMap.find(model).modules["embeddings"][0] in cache.known
    assert name not in cache.known


def test_room_is_a_limit(vit: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vit.model(), vit.batch(size=2)
    assert PrefixCache.fits(model, batch, 1000)
    sizes = [tensor.nbytes for tensor in _outputs(model, batch)]
    monkeypatch.setattr(prefix_cache, "ROOM", sum(sizes) // 2 * 1000)
    assert PrefixCache.fits(model, batch, 1000)
    assert not PrefixCache.fits(model, batch, 1001)


def _outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for names in BlockMap.find(model).modules.values():
        for name in names:
            module = dict(model.named_modules()).get(name)
            if module is not None:
                module.register_forward_hook(lambda *each: found.append(each[2]))
    model(**batch)
    return found


SIZES = {"d_model": 16, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bart() -> nn.Module:
    """Its decoder draws dropout between the layers itself."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**SIZES, **layers, **heads, dropout=0.3, forced_eos_token_id=None))


def mixtral() -> nn.Module:
    """Its loss reads what hooks note while the layers run."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts, vocab_size=VOCABULARY, router_aux_loss_coef=1.0))


def ctrl() -> nn.Module:
    """It goes on in place with what its embeddings return."""
    return CTRLLMHeadModel(CTRLConfig(n_embd=16, dff=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=8))


CASES = [(bart, "decoder.1"), (bart, "encoder.1"), (mixtral, "1"), (mixtral, "2"), (ctrl, "0"), (ctrl, "1")]


@pytest.mark.parametrize(("build", "blocks"), CASES)
def test_what_cannot_be_skipped_without_a_difference_is_run(build: Callable[[], nn.Module], blocks: str) -> None:
    torch.manual_seed(0)
    source = build().eval()
    tokens = torch.randint(3, VOCABULARY, (COUNT, 6))
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(SIZE)]
    cache = PrefixCache(source, batches)
    results = []
    for is_cached in (False, True):
        base = copy.deepcopy(source)
        originals = dict(base.named_modules())
        wrapped = get_surgical_model(base, SurgicalConfig(blocks=[blocks])).train()
        at = torch.tensor([7, 0, 11, 4])
        with cache.skipping(wrapped, base, originals) if is_cached else nullcontext():
            torch.manual_seed(3)
            loss = wrapped(input_ids=tokens[at], labels=tokens[at], **({AT: at} if is_cached else {})).loss
            loss.backward()
        results.append([loss, *(weight.grad for weight in wrapped.parameters() if weight.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_in_the_block_that_is_trained_is_drawn_as_without() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    source = BertForSequenceClassification(BertConfig(**sizes, vocab_size=VOCABULARY, hidden_dropout_prob=0.3)).eval()
    tokens, labels = torch.randint(3, VOCABULARY, (COUNT, 6)), torch.arange(COUNT) % 2
    cache = PrefixCache(source, [{"input_ids": tokens, "labels": labels}])
    results, ran = [], list[str]()
    for is_cached in (False, True):
        base = copy.deepcopy(source)
        originals = dict(base.named_modules())
        wrapped = get_surgical_model(base, SurgicalConfig(blocks=["2"])).train()
        at = torch.tensor([7, 0, 11, 4])
        with cache.skipping(wrapped, base, originals) if is_cached else nullcontext():
            hook = originals["bert.encoder.layer.0.attention"].register_forward_hook(lambda *_: ran.append("ran"))
            torch.manual_seed(3)
            wrapped(input_ids=tokens[at], labels=labels[at], **({AT: at} if is_cached else {})).loss.backward()
            hook.remove()
        results.append([weight.grad for weight in wrapped.parameters() if weight.grad is not None])
    assert ran == ["ran"]  # without the cache only
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
