"""A training with the prefix cache is the one without it, and does not run the start of the model twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CTRLConfig,
    CTRLLMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError, get_surgical_model, surgical_optimizer
from surgical_peft.prefix_cache import PrefixCache, cache_prefix
from surgical_peft.prefix_cache.store import Store
from tests.support.cached import COUNT, EPOCHS, SIZE, padded, to_the_longest, train
from tests.support.toys import TOYS, VOCABULARY, Toy

BATCHES = COUNT // SIZE
ATTENTION = {"vit": "layers.0.attention", "bert": "layer.0.attention", "gpt2": "h.0.attn", "t5": "encoder.block.0"}


def tuned(toy: Toy, block: str, **config: Any) -> nn.Module:
    return get_surgical_model(toy.model(), SurgicalConfig(blocks=[block], **config))


@pytest.mark.parametrize("name", TOYS)
def test_it_learns_the_same_and_the_start_runs_in_the_first_epoch_only(name: str) -> None:
    toy, watched = TOYS[name], ATTENTION.get(name, "layers.0.self_attn")
    examples = toy.batch(size=COUNT)
    whole = train(tuned(toy, toy.last), examples, watched)
    short = train(tuned(toy, toy.last), examples, watched, cached={})
    short.same_as(whole)
    assert whole.ran == [BATCHES] * EPOCHS
    assert short.ran[0] > BATCHES and short.ran[1:] == [1, 0]  # tried out at first, compared once
    assert short.cache and (short.cache.hits, short.cache.misses) == (BATCHES * (EPOCHS - 1), BATCHES)
    assert short.cache.store.held == COUNT * (5 if name == "vit" else 6) * 16 * 4  # what one block returns


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_texts_are_kept_without_padding_and_fit_into_another_one(name: str) -> None:
    toy = TOYS[name]
    examples = padded(toy.batch(size=COUNT))
    whole = train(tuned(toy, toy.last), examples, batch_of=to_the_longest)
    short = train(tuned(toy, toy.last), examples, cached={}, batch_of=to_the_longest)
    short.same_as(whole)
    assert short.cache and short.cache.misses == BATCHES
    assert short.cache.store.held == int(examples["attention_mask"].sum()) * 16 * 4


def test_under_autocast_outputs_are_kept_as_they_come(vit: Toy) -> None:
    results = []
    for cached in (None, {}):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(train(tuned(vit, "head"), vit.batch(size=COUNT), cached=cached))
    results[1].same_as(results[0], rtol=2e-2, atol=1e-3)
    assert results[1].cache and results[1].cache.hits == BATCHES * (EPOCHS - 1)


def dropping(rate: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    config = BertConfig(
        **sizes, vocab_size=VOCABULARY, num_labels=3, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    return BertForSequenceClassification(config)


def test_dropout_in_what_is_trained_is_drawn_as_without() -> None:
    examples = TOYS["bert"].batch(size=COUNT)
    whole, short = (
        train(get_surgical_model(dropping(), SurgicalConfig(blocks=["2"])), examples, cached=cached)
        for cached in (None, {})
    )
    short.same_as(whole)
    assert short.cache and short.cache.hits


def test_checkpointing_masks_of_policies_and_generation_go_on() -> None:
    llama = TOYS["llama"]

    def model() -> nn.Module:
        wrapped = get_surgical_model(llama.model(), SurgicalConfig(blocks=["1", "2"]))
        wrapped.gradient_checkpointing_enable()  # type: ignore[operator]
        for name, weight in wrapped.named_parameters():  # a policy that begins with the last block
            if ".layers.1." in name and weight.requires_grad:
                weight.requires_grad_(False)
        return wrapped

    examples = llama.batch(size=COUNT)
    whole, short = (train(model(), examples, cached=cached) for cached in (None, {}))
    short.same_as(whole)
    assert short.cache
    assert [list(plan.spaces) for plan in short.cache._plans.values() if plan] == [["model.layers.0"]]
    wrapped: Any = model()
    expected = wrapped.generate(input_ids=examples["input_ids"][:2], max_new_tokens=3, do_sample=False)
    with cache_prefix(wrapped):
        for _ in range(3):
            output = wrapped(**{name: value[:4] for name, value in examples.items()})
        assert output.past_key_values is None  # the first layers have put nothing there
        answer = wrapped.generate(input_ids=examples["input_ids"][:2], max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, expected)


def clip() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**sizes, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": 8, "projection_dim": 8}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tokens = torch.randint(3, VOCABULARY, (COUNT, 6))
    tokens[:, -1] = 2
    return model, {"input_ids": tokens, "pixel_values": torch.randn(COUNT, 3, 8, 8)}, {"return_loss": True}


def llava() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    text = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    tokens = torch.cat([torch.full((COUNT, 4), 3), torch.randint(4, VOCABULARY, (COUNT, 4))], 1)
    batch = {"input_ids": tokens, "pixel_values": torch.randn(COUNT, 3, 8, 8), "labels": tokens.clone()}
    return model, {**batch, "attention_mask": torch.ones_like(tokens)}, {}


@pytest.mark.parametrize(
    ("build", "block", "watched"),
    [
        (clip, "text.2", "vision_model.encoder.layers.0.self_attn"),
        (clip, "vision.1", "vision_model.encoder.layers.0.self_attn"),
        (llava, "language.2", "language_model.layers.1.self_attn"),
        (llava, "language.0", "vision_tower.encoder.layers.0.self_attn"),
    ],
)
def test_towers(build: Callable[[], Any], block: str, watched: str) -> None:
    results = []
    for cached in (None, {}):
        model, examples, given = build()
        stack, _, at = block.partition(".")
        names = BlockMap.find(model).names
        (name,) = [name for name in names if stack in name and name.endswith(f".{at}")]
        wrapped = get_surgical_model(model, SurgicalConfig(blocks=[name]))
        results.append(train(wrapped, examples, watched, cached, **given))
    results[1].same_as(results[0])
    assert results[1].ran[-1] == 0 < results[0].ran[-1]


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


CASES = [
    *((bart, "decoder.1", True), (bart, "encoder.1", True)),  # up to where the dropout is
    *((mixtral, "1", False), (mixtral, "2", False)),
    *((ctrl, "0", True), (ctrl, "1", True)),
]


@pytest.mark.parametrize(("build", "block", "is_skipped"), CASES)
def test_what_cannot_be_skipped_is_run(build: Callable[[], nn.Module], block: str, is_skipped: bool) -> None:
    torch.manual_seed(0)
    source = build()
    tokens = torch.randint(3, VOCABULARY, (COUNT, 6))
    examples = {"input_ids": tokens, "labels": tokens}
    whole = train(get_surgical_model(copy.deepcopy(source), SurgicalConfig(blocks=[block])), examples)
    wrapped = get_surgical_model(source, SurgicalConfig(blocks=[block]))
    cache = PrefixCache(wrapped, Store(10**6), strict=False)
    train(wrapped, examples).same_as(whole)
    assert (cache.hits > 0) == is_skipped and (cache.reason is None) == is_skipped


class Company(nn.Module):
    """A layer whose output depends on the other examples, or is drawn."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.change(self.inner(*args, **kwargs))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "size": lambda x: x + len(x),
    "noise": lambda x: x + 1e-3 * torch.randn_like(x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_looks_at_the_whole_batch_or_draws_is_refused(change: Any, vit: Toy) -> None:
    model = vit.model()
    layers: Any = model.get_submodule("vit.layers")
    layers[0] = Company(layers[0], change)
    wrapped = get_surgical_model(model, SurgicalConfig(blocks=["11"]))
    with pytest.raises(SurgicalError, match=r"vit\.layers\.0"), cache_prefix(wrapped):
        wrapped(**vit.batch())


def test_dropout_below_the_first_tuned_block_is_refused() -> None:
    batch = TOYS["bert"].batch()
    for wrapped in (
        get_surgical_model(dropping(), SurgicalConfig(blocks=["2"], frozen_eval=False)),
        get_peft_model(dropping(), LoraConfig(target_modules=["query"], layers_to_transform=[2])),
    ):
        with pytest.raises(SurgicalError, match="dropout"), cache_prefix(wrapped):
            wrapped.train()(**batch)


def test_nothing_before_the_first_tuned_block(vit: Toy) -> None:
    wrapped = tuned(vit, "embeddings")
    with pytest.raises(SurgicalError, match="before"), cache_prefix(wrapped):
        wrapped(**vit.batch())


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_padding_on_the_left_that_changes_what_follows_is_refused(name: str) -> None:
    toy = TOYS[name]
    wrapped = tuned(toy, toy.last)
    with pytest.raises(SurgicalError, match="padd"), cache_prefix(wrapped):
        wrapped(**padded(toy.batch(), "left"))


class Rows:
    """Examples of a batch, one by one."""

    def __init__(self, examples: dict[str, Tensor], change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.examples, self.change = examples, change

    def __len__(self) -> int:
        return len(self.examples["labels"])

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        row = {name: value[at] for name, value in self.examples.items()}
        return {name: self.change(value) if value.is_floating_point() else value for name, value in row.items()}


def loader(examples: Any, **options: Any) -> DataLoader[Any]:
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    return DataLoader(examples, SIZE, collate_fn=collate, **options)


def test_random_augmentation_is_refused_before_training(vit: Toy) -> None:
    wrapped = tuned(vit, "11")
    state = torch.get_rng_state()
    with pytest.raises(SurgicalError, match="augmentation"):
        cache_prefix(wrapped, loader(Rows(vit.batch(size=COUNT), lambda x: x + torch.randn_like(x))))
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_do_not_repeat_after_all_are_told(vit: Toy) -> None:
    wrapped = tuned(vit, "11").train()
    with cache_prefix(wrapped, loader(Rows(vit.batch(size=SIZE)))) as cache:
        wrapped(**vit.batch(size=SIZE))
        with pytest.warns(UserWarning, match="repeat"):
            wrapped(**vit.batch(seed=2))
        wrapped(**vit.batch(seed=3))
        assert cache.reason and cache.store.held == 0


def test_with_trainer_accumulation_and_evaluation(vit: Toy, tmp_path: Any) -> None:
    results = []
    for cached in (False, True):
        wrapped = tuned(vit, "11")
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", eval_strategy="epoch",
            disable_tqdm=True, per_device_train_batch_size=SIZE, gradient_accumulation_steps=2, num_train_epochs=3,
            learning_rate=1e-2,
            label_names=["labels"], dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            wrapped, args, train_dataset=Rows(vit.batch(size=COUNT)), eval_dataset=Rows(vit.batch(seed=1)),  # type: ignore[arg-type]
            optimizer_cls_and_kwargs=surgical_optimizer(args),
        )  # fmt: skip
        ran = list[bool]()
        first = wrapped.get_submodule("base_model.model.vit.layers.0.attention")
        first.register_forward_hook(lambda *_, ran=ran: ran.append(True))
        if cached:
            with cache_prefix(wrapped, trainer.get_train_dataloader()) as cache:
                trainer.train()
                ran.clear()
                trainer.evaluate()
                assert not ran and cache.hits == 2 * BATCHES + 2 + 1
        else:
            trainer.train()
        weights = {name: weight.detach() for name, weight in wrapped.named_parameters() if weight.requires_grad}
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        results.append((weights, losses[:3]))
    (plain, losses), (short, others) = results
    assert others == pytest.approx(losses, rel=1e-5)
    for name, weight in plain.items():
        torch.testing.assert_close(short[name], weight, rtol=1e-4, atol=1e-6)


def test_weights_that_change_below_are_seen(vit: Toy) -> None:
    wrapped, batch = tuned(vit, "11").train(), vit.batch()
    with cache_prefix(wrapped):
        before = [float(wrapped(**batch).loss) for _ in range(3)]
        with torch.no_grad():
            wrapped.get_submodule("base_model.model.vit.layers.3.mlp.fc1").weight.add_(0.1)  # type: ignore[operator]
        after = [float(wrapped(**batch).loss) for _ in range(3)]
    assert after == pytest.approx([float(wrapped(**batch).loss)] * 3)
    assert after[0] != pytest.approx(before[0])


def test_a_copy_of_the_model_runs_whole_and_closing_leaves_it_as_it_was(vit: Toy) -> None:
    wrapped, batch = tuned(vit, "11").train(), vit.batch()
    expected = float(wrapped(**batch).loss)
    before = {name: dict(vars(module)) for name, module in wrapped.named_modules()}
    with cache_prefix(wrapped):
        for _ in range(2):
            wrapped(**batch)
        for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
            assert float(copied(**vit.batch(seed=1)).loss) != expected
            assert float(copied(**batch).loss) == pytest.approx(expected)
    assert {name: dict(vars(module)) for name, module in wrapped.named_modules()}.keys() == before.keys()
    assert not any("forward" in vars(module) for module in wrapped.modules())
    assert float(wrapped(**batch).loss) == pytest.approx(expected)
