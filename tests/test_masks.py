"""What a policy freezes for a while, what PEFT and the user freeze and thaw meanwhile, and who has the last word."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trl.trainer.utils import use_adapter

from surgical_peft import SurgicalConfig, create_surgical_optimizer, policies, surgical_optimizer
from tests.support.toys import TOYS
from tests.support.trainers import arguments, llama, losses, preferences, tokenizer

BLOCKS = [0, 1, 2]


def surgical() -> PeftModel:
    return get_peft_model(TOYS["llama"].model(), SurgicalConfig(blocks=BLOCKS))


def surgical_with_lora() -> PeftModel:
    beside = LoraConfig(target_modules=["v_proj"])
    return get_peft_model(TOYS["llama"].model(), SurgicalConfig(blocks=[0, 1], lora=beside))


def lora() -> PeftModel:
    return get_peft_model(TOYS["llama"].model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def masked(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups if not group["lr_multiplier"] for weight in group["params"]]


def disabled(model: PeftModel) -> AbstractContextManager[Any]:
    return use_adapter(model, None)


def another(model: PeftModel) -> AbstractContextManager[Any]:
    if "ref" not in model.peft_config:
        model.add_adapter("ref", model.peft_config["default"])
    return use_adapter(model, "ref")


@pytest.mark.parametrize("policy", [policies.lisa(1, every=100), policies.badam(every=100)])
@pytest.mark.parametrize("away", [disabled, another])
@pytest.mark.parametrize("build", [surgical, surgical_with_lora, lora])
def test_a_mask_comes_out_of_a_reference_pass_as_it_went_in(build: Any, away: Any, policy: Any) -> None:
    model = build().train()
    with away(model):
        pass
    free = flags(model)
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policy)
    before = flags(model)
    assert masked(optimizer) and before != free
    with away(model):
        assert not any(parameter.requires_grad for parameter in masked(optimizer))
    assert flags(model) == before
    optimizer.block_rates.release()  # type: ignore[attr-defined]
    assert flags(model) == free


@pytest.mark.parametrize("policy", [policies.lisa(1, every=1), policies.badam(every=1)])
def test_dpo_from_a_trained_adapter_with_checkpointing(tmp_path: Path, policy: Any) -> None:
    """TRL makes an adapter for reference, and switches to it and back between the forward and the backward pass."""
    runs = []
    for checkpointing in (True, False):
        args = trl.DPOConfig(**arguments(tmp_path, max_steps=2, gradient_checkpointing=checkpointing))
        model = get_peft_model(llama(), SurgicalConfig(blocks=["0", "2"], task_type="CAUSAL_LM"))
        trainer = trl.DPOTrainer(model, None, args, train_dataset=preferences(), processing_class=tokenizer())
        trainer.optimizer_cls_and_kwargs = surgical_optimizer(args, policy)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def gone(optimizer: list[torch.optim.Optimizer]) -> None:
    optimizer.clear()
    gc.collect()


def released(optimizer: list[Any]) -> None:
    optimizer[0].block_rates.release()


@pytest.mark.parametrize("end", [gone, released])
def test_a_model_that_was_frozen_by_hand_stays_frozen(end: Callable[[list[Any]], None]) -> None:
    model = surgical()
    optimizer = [create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(1))]
    model.requires_grad_(False)
    end(optimizer)
    assert not any(flags(model).values())


def test_what_was_frozen_by_hand_before_its_mask_came_stays_frozen() -> None:
    model = surgical()
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(1, every=100))
    rests = masked(optimizer)
    weight = next(p for group in optimizer.param_groups for p in group["params"] if group["lr_multiplier"])
    weight.requires_grad_(False)
    optimizer.block_rates.set_multipliers(optimizer, {"0": 0.0, "1": 1.0, "2": 0.0})  # type: ignore[attr-defined]
    optimizer.block_rates.set_multipliers(optimizer, {"0": 1.0, "1": 0.0})  # type: ignore[attr-defined]
    optimizer.block_rates.release()  # type: ignore[attr-defined]
    assert not weight.requires_grad
    assert all(parameter.requires_grad for parameter in rests)


@pytest.mark.parametrize("end", [gone, released])
@pytest.mark.parametrize("unwrap", ["merge_and_unload", "unload"])
def test_a_base_that_was_unwrapped_is_no_longer_the_policys(unwrap: str, end: Callable[[list[Any]], None]) -> None:
    base = TOYS["llama"].model()
    base.lm_head.requires_grad_(False)
    before = flags(base)
    model = get_peft_model(base, SurgicalConfig(blocks="all"))
    optimizer = [create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(1))]
    bare = getattr(model, unwrap)()
    assert flags(bare) == before
    bare.model.layers.requires_grad_(False)
    held = flags(bare)
    end(optimizer)
    assert flags(bare) == held


def test_an_adapter_that_was_switched_to_inference_stays_frozen() -> None:
    model = surgical()
    optimizer = [create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(1))]
    model.set_adapter("default", inference_mode=True)
    gone(optimizer)
    assert not any(flags(model).values())
    model.set_adapter("default")
    assert any(flags(model).values())
