"""Preference and reinforcement-learning trainers: what they send to an inference engine and what they compare with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl.generation.vllm_generation import VLLMGeneration

from surgical_peft import SurgicalConfig, create_surgical_optimizer, policies
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Batch, Toy
from tests.support.trainers import (
    arguments,
    assert_same_weights,
    frozen_but_for,
    llama,
    losses,
    preferences,
    sentence,
    tokenizer,
)
from tests.support.wrapping import layers, logits, nudge, same, trainable

EVERY = TOYS | FAMILIES
BLOCKS, TUNED = ["0", "2"], ("model.layers.0.", "model.layers.2.")
KEPT = ["device", "cpu", "none"]
LANGUAGE = ["llama", "llama_tied", "gpt2", "qwen3_moe", "t5", "mamba"]


def wrap(family: Toy, keep_base: str = "device", lora: bool = False, **kwargs: Any) -> PeftModel:
    base = family.model()
    linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    where = "encoder.block.1." if family.name == "t5" else "layers.1."
    beside = LoraConfig(target_modules=[path for path in linear if where in path][:2]) if lora else None
    config = SurgicalConfig(blocks=[family.first, family.last], keep_base=keep_base, lora=beside, **kwargs)
    return get_peft_model(base, config)


# 1. Weights on their way to an inference engine.


class Undealt:
    """What TRL asks about the distribution of a model on one process."""

    is_fsdp = False

    def gather_params(self, parameters: list[Tensor]) -> torch.no_grad:
        return torch.no_grad()


def sent(model: nn.Module) -> dict[str, Tensor]:
    """By TRL's own loop, in which it merges and unmerges."""
    sender: Any = VLLMGeneration.__new__(VLLMGeneration)
    sender.model, sender._dist = model, Undealt()
    return {name: weight.clone() for name, weight in sender._iter_named_params()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("keep_base", KEPT)
@pytest.mark.parametrize("name", LANGUAGE)
def test_every_weight_is_sent_with_the_tuned_value(name: str, keep_base: str, lora: bool) -> None:
    family = EVERY[name]
    if lora and name == "gpt2":
        pytest.skip("its layers are no nn.Linear")
    model = nudge(wrap(family, keep_base, lora))
    before, answer = {key: tensor.clone() for key, tensor in model.state_dict().items()}, logits(model, family.batch())
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    found = sent(model)
    names = {key for key, _ in family.model().named_parameters()}
    assert {key for key in found if ".lora_" not in key} == names  # TRL leaves out what has our prefix, not LoRA's
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags  # unmerged, and as before
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.allclose(now[key], before[key], atol=1e-6) for key in now)
    assert same(logits(model, family.batch()), answer)
    engine = family.model()
    engine.load_state_dict(found, strict=False)  # buffers are not sent
    engine.tie_weights()
    torch.testing.assert_close(logits(engine, family.batch()), answer, rtol=1e-4, atol=1e-5)
    start = dict(family.model().named_parameters())
    moved = {key for key in names if not torch.equal(found[key], start[key])}
    asked = {key.removeprefix("base_model.model.") for key in trainable(model)}
    assert {key for key in asked if ".lora_" not in key} <= moved
    assert len(moved - asked) == (2 if lora else 0)  # LoRA's own two, merged


@pytest.mark.parametrize("keep_base", KEPT)
def test_it_is_sent_anew_after_each_step(keep_base: str) -> None:
    family = TOYS["llama"]
    model = wrap(family, keep_base)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1)
    for seed in range(3):
        model.train()(**family.batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = sent(model)
        assert all(torch.equal(found[key], p) for key, p in model.get_base_model().named_parameters())
        assert model.base_model.training


def test_of_two_adapters_the_active_one_is_sent() -> None:
    family = TOYS["llama"]
    model = nudge(wrap(family))
    model.add_adapter("second", SurgicalConfig(blocks=["1"]))
    model.set_adapter("second")
    nudge(model, seed=1)
    start = dict(family.model().named_parameters())
    for adapter, numbers in (("second", "1"), ("default", "02")):
        model.set_adapter(adapter)
        moved = {key for key, weight in sent(model).items() if not torch.equal(weight, start[key])}
        assert {key.split(".layers.")[1][0] for key in moved} == set(numbers)
        assert model.active_adapters == [adapter]


def test_the_names_do_not_depend_on_a_new_head() -> None:
    """TRL takes PEFT's `modules_to_save.default.` out of names."""
    for name in ("bert", "llama"):
        family = TOYS[name]
        head = "classifier" if name == "bert" else "lm_head"
        model = nudge(wrap(family, modules_to_save=[head]))
        answer, found = logits(model, family.batch()), sent(model)
        assert found.keys() == {key for key, _ in family.model().named_parameters()}
        engine = family.model()
        engine.load_state_dict(found, strict=False)
        assert same(logits(engine, family.batch()), answer)


# 2. The disabled adapter as the model to compare with.


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(**batch).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, batch["labels"][:, 1:, None]).sum((1, 2))


def preference_step(model: nn.Module, reference: Any, family: Toy, seed: int) -> Tensor:
    """DPO's: the reference is asked between the forward and the backward pass."""
    chosen, rejected = family.batch(seed), family.batch(seed + 50)
    mine = [log_probabilities(model, batch) for batch in (chosen, rejected)]
    with torch.no_grad():
        theirs = [reference(batch) for batch in (chosen, rejected)]
    loss = -logsigmoid(0.1 * ((mine[0] - theirs[0]) - (mine[1] - theirs[1]))).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen3_moe", "t5"])
def test_steps_with_the_disabled_adapter_are_those_with_a_separate_reference(name: str, keep_base: str) -> None:
    family = EVERY[name]
    chosen = {key.removeprefix("base_model.model.") for key in trainable(wrap(family))}
    found = []
    for ours in (True, False):
        model: Any = wrap(family, keep_base, frozen_eval=False) if ours else family.model()
        if ours:

            def reference(batch: Batch, model: Any = model) -> Tensor:
                with model.disable_adapter():
                    return log_probabilities(model, batch)
        else:
            reference = functools.partial(log_probabilities, family.model())
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(key in chosen)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        model.eval()  # no dropout, which would be drawn twice
        for seed in range(4):
            steps.append(preference_step(model, reference, family, seed))
            gradients = {key.removeprefix("base_model.model."): p.grad for key, p in model.named_parameters()}
            steps += [gradients[key].clone() for key in sorted(chosen) if gradients[key] is not None]
            optimizer.step()
            optimizer.zero_grad()
        inner = model.get_base_model() if ours else model
        weights = dict(inner.named_parameters())
        found.append((steps, [weights[key].detach() for key in sorted(chosen)]))
    for mine, theirs in zip(found[0], found[1], strict=True):
        assert len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
@pytest.mark.parametrize("name", ["bert", "llama_tied", "gpt2", "t5", "resnet", "vit"])
def test_between_forward_and_backward_the_disabled_adapter_is_the_base_to_the_bit(name: str, keep_base: str) -> None:
    family = EVERY[name]
    expected = logits(family.model(), family.batch())
    gradients = []
    for asked in (False, True):
        model = nudge(wrap(family, keep_base))
        model.add_adapter("second", SurgicalConfig(blocks=[family.last], keep_base=keep_base))
        loss = model(**family.batch()).loss
        if asked:
            with model.disable_adapter():
                assert torch.equal(logits(model, family.batch()), expected)
            model.set_adapter("second")
            model.set_adapter("default")
        loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


# 3. TRL's and transformers' own loops.


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Depends on every word, so that the rewards of a group differ."""
    return [sum((7 * int(word[1:])) % 11 for word in text.split() if word[1:].isdigit()) / 10 for text in completions]


def grpo_arguments(folder: Path, **more: Any) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        **arguments(folder, max_completion_length=4, num_generations=4, gradient_checkpointing=False, **more)
    )


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{sentence(i)} " for i in range(8)]})


def test_grpo_trains_the_blocks_and_compares_with_the_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")  # from where TRL takes the reference
    args = grpo_arguments(tmp_path, beta=0.5, max_steps=2)
    more: dict[str, Any] = {"reward_funcs": reward, "train_dataset": prompts(), "processing_class": tokenizer()}
    frozen = frozen_but_for(LlamaForCausalLM.from_pretrained(tmp_path / "base"), TUNED)
    by_hand: Any = trl.GRPOTrainer(frozen, args=args, **more)
    by_hand.train()
    config = SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM")
    ours: Any = trl.GRPOTrainer(llama(), args=args, peft_config=config, **more)
    ask, asked = ours._get_per_token_logps_and_entropies, []

    def watched(model: nn.Module, *rest: Any, **kwargs: Any) -> Any:
        found = ask(model, *rest, **kwargs)
        if all(layer._disable_adapters for layer in layers(model)):
            asked.append(torch.equal(found[0], ask(by_hand.ref_model, *rest, **kwargs)[0]))
        return found

    ours._get_per_token_logps_and_entropies = watched
    ours.train()
    assert len(asked) >= 2 and all(asked)
    assert losses(ours) == pytest.approx(losses(by_hand), rel=1e-3, abs=1e-6)
    assert_same_weights(ours.model.merge_and_unload(), frozen, rtol=1e-3, atol=1e-5)


def rates(trainer: Any) -> dict[str, float]:
    return {g["block"]: g["initial_lr"] * g["base_multiplier"] for g in trainer.optimizer.param_groups}


@pytest.mark.parametrize("by", ["Trainer", "SFTTrainer", "DPOTrainer"])
def test_our_optimizer_is_handed_over(by: str, tmp_path: Path) -> None:
    """`optimizers=(...)` is what every trainer takes; the model is wrapped before."""
    model = get_peft_model(llama(), SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM"))
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policies.layer_decay(0.5))
    more: dict[str, Any] = {"optimizers": (optimizer, None)}
    if by == "Trainer":
        rows = [{key: value[i] for key, value in TOYS["llama"].batch(size=12).items()} for i in range(12)]
        trainer: Any = Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=rows, **more)
    elif by == "SFTTrainer":
        data = Dataset.from_dict({"text": [sentence(i) for i in range(12)]})
        args: Any = trl.SFTConfig(**arguments(tmp_path, gradient_checkpointing=False))
        trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), **more)
    else:
        args = trl.DPOConfig(**arguments(tmp_path, gradient_checkpointing=False))
        trainer = trl.DPOTrainer(model, None, args, train_dataset=preferences(), processing_class=tokenizer(), **more)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert rates(trainer)["0"] < rates(trainer)["2"]
    merged = dict(model.merge_and_unload().named_parameters())
    for key, before in llama().named_parameters():
        assert torch.equal(merged[key], before) != key.startswith(TUNED), key
