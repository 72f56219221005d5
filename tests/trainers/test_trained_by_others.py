"""TRL, accelerate, `accelerate launch` on two processes and `torch.compile` train a wrapped model as any other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.tuner.layer import SurgicalLayer
from tests.support.launched import BLOCKS, assert_same_adapter, train
from tests.support.toys import TOYS
from tests.support.trainers import (
    LAUNCH,
    TUNED,
    arguments,
    assert_same_weights,
    frozen_but_for,
    llama,
    losses,
    preferences,
    sentence,
    tokenizer,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft(tmp_path: Path, checkpointing: bool) -> None:
    data = Dataset.from_dict({"text": [sentence(i) for i in range(12)]})
    args = trl.SFTConfig(**arguments(tmp_path, gradient_checkpointing=checkpointing))
    config = SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM")
    ours = trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    ours.train()
    ours.save_model(str(tmp_path / "adapter"))
    frozen = frozen_but_for(llama(), TUNED)
    reference = trl.SFTTrainer(frozen, args, train_dataset=data, processing_class=tokenizer())
    reference.train()
    assert losses(ours) == pytest.approx(losses(reference), rel=1e-5)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert_same_weights(loaded.merge_and_unload(), frozen, rtol=1e-5, atol=1e-6)


def test_sft_chooses_its_blocks(tmp_path: Path) -> None:
    """Where there is a data set and a trainer, but no dataloader."""
    data = Dataset.from_dict({"text": [sentence(i) for i in range(12)]})
    args = trl.SFTConfig(**arguments(tmp_path, gradient_checkpointing=False))
    first = trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer())
    config = SurgicalConfig(blocks="auto", num_blocks=1, criterion="grad_norm", task_type="CAUSAL_LM")
    model = get_surgical_model(first.model, config, first)
    ours = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    ours.train()
    assert len(model.peft_config["default"].blocks) == 1 and ours.state.global_step
    with pytest.raises(SurgicalError, match="trainer"):
        trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=config)


def test_dpo_compares_with_the_disabled_adapter(tmp_path: Path) -> None:
    data = preferences()
    args = trl.DPOConfig(**arguments(tmp_path, beta=0.5, gradient_checkpointing=False))
    config = SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM")
    ours = trl.DPOTrainer(llama(), None, args, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    ours.train()
    frozen = frozen_but_for(llama(), TUNED)
    reference = trl.DPOTrainer(frozen, llama(), args, train_dataset=data, processing_class=tokenizer())
    reference.train()
    assert losses(ours)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: before the first step, both models are one
    assert losses(ours) == pytest.approx(losses(reference), rel=1e-4)
    assert_same_weights(ours.model.merge_and_unload(), frozen, rtol=1e-4, atol=1e-5)


def test_dpo_from_a_trained_adapter_compares_with_its_start(tmp_path: Path) -> None:
    """TRL makes an adapter `ref` from the same config object, and switches between the two."""
    data = preferences()
    args = trl.DPOConfig(**arguments(tmp_path, gradient_checkpointing=False))
    model = get_peft_model(llama(), SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    start = [{name: t.detach().clone() for name, t in layer.tensors("default").items()} for layer in layers]
    trainer = trl.DPOTrainer(model, None, args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert layers
    for layer, before in zip(layers, start, strict=True):
        for name, tensor in before.items():
            assert not torch.equal(layer.tensors("default")[name], tensor), name
            assert torch.equal(layer.tensors("ref")[name], tensor), name


def test_plain_loop_with_accelerate(tmp_path: Path) -> None:
    train(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    reference = frozen_but_for(llama(), TUNED)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    batch = TOYS["llama"].batch(size=24)
    for step in range(3):
        rows = slice(8 * step, 8 * step + 8)
        reference(**{key: value[rows] for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(loaded.merge_and_unload(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", LAUNCH)
def test_launched_on_two_processes_equals_one_on_the_union(tmp_path: Path, way: str) -> None:
    train(tmp_path / "one" / "float32")
    train(tmp_path / "one" / "bfloat16", torch.bfloat16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command = [*launch, *LAUNCH[way], "-m", "tests.support.launched", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{way} 2\n" in done.stdout
    assert_same_adapter(tmp_path / "one" / "float32", tmp_path / "two" / "float32", atol=1e-5)
    one, two = (torch.load(tmp_path / who / "bfloat16" / "masters.pt") for who in ("one", "two"))
    for master, other in zip(one, two, strict=True):
        assert master.dtype == other.dtype == torch.float32
        assert torch.allclose(master, other, atol=1e-4)  # their gradients are sums of bfloat16 numbers
        assert not torch.equal(other, other.bfloat16().float())


class Stack(nn.Module):
    """Small enough to be compiled to machine code in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs.square().mean()


def compiles(backend: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if backend == "inductor":
        return Stack(), {"inputs": torch.randn(4, 8)}
    return llama(), TOYS["llama"].batch()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
def test_compiled_by_inductor() -> None:
    check_compiled("inductor")


def test_compiled_llama() -> None:
    check_compiled("aot_eager")


def check_compiled(backend: str) -> None:
    found = []
    for compiled in (False, True):
        bare, batch = compiles(backend)
        model: Any = get_peft_model(bare, SurgicalConfig(blocks=BLOCKS)).train()
        runs = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = loss_of(runs(**batch))
        before.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        found.append((before.item(), gradients, loss_of(runs(**batch)).item()))
    (before, gradients, after), (compiled_before, compiled_gradients, compiled_after) = found
    assert before != after
    assert compiled_before == pytest.approx(before, rel=1e-5)
    assert compiled_after == pytest.approx(after, rel=1e-5)
    assert gradients and compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def loss_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.loss
