"""What is done to a model after it is wrapped takes effect on tuned blocks as on all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, Trainer, TrainingArguments

from surgical_peft import SurgicalConfig, create_surgical_optimizer, score_blocks
from tests.support.families import FAMILIES
from tests.support.wrapping import logits, nudge

ATTENTION = ["vit", "bert", "llama", "llama_tied", "gpt2", "qwen3_moe", "whisper"]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("before", "after"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_another_attention(name: str, before: str, after: str) -> None:
    """A copy kept the old one: it was no longer causal, for one, where the masks of the new one are another kind."""
    family = FAMILIES[name]

    def tuned(first: str) -> nn.Module:
        base = family.model()
        base.set_attn_implementation(first)
        return nudge(get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last])))

    switched, expected = tuned(before), tuned(after)
    switched.get_base_model().set_attn_implementation(after)
    assert torch.equal(logits(switched, family.batch()), logits(expected, family.batch()))


class Noise(Trainer):
    """Looks at what the embeddings return, beside what their weights say."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        embeddings = model.get_base_model().get_input_embeddings()

        def look(module: nn.Module, given: Any, output: Tensor) -> None:
            self.noise = (output - module.weight[given[0]]).abs().max().item()

        handle = embeddings.register_forward_hook(look)
        loss = super().training_step(model, inputs, *args)
        handle.remove()
        return loss


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert"])
@pytest.mark.parametrize("blocks", [[-1], ["embeddings", -1]])
@pytest.mark.parametrize("frozen_eval", [True, False])
def test_neftunes_noise(name: str, blocks: list[Any], frozen_eval: bool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    batch = family.batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, neftune_noise_alpha=5, use_cpu=True, report_to="none", disable_tqdm=True
    )
    model = get_peft_model(family.model(), SurgicalConfig(blocks=blocks, frozen_eval=frozen_eval))
    trainer = Noise(model, args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.noise > 0.01


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_the_adapters_name_decides_nothing(name: str) -> None:
    """Rules that look for words such as `bias` in names of parameters found them in the adapter's."""
    family = FAMILIES[name]

    def decayed(adapter: str) -> list[tuple[float, int]]:
        config = SurgicalConfig(blocks=[family.first, family.last])
        model = get_peft_model(family.model(), config, adapter_name=adapter)
        optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
        return [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]

    names = ("default", "debias", "layernorm", "norm", "lora_A", "base_layer", "head", "surgical")
    assert all(decayed(adapter) == decayed("default") for adapter in names)


class Remembers(nn.Module):
    """Keeps a tensor of the graph of its last pass, which nothing can copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x)
        return self.last


def test_layers_that_keep_tensors_of_a_graph_are_wrapped() -> None:
    model = nn.Sequential(Remembers(), Remembers())
    model(torch.ones(1, 4)).sum().backward()
    wrapped = get_peft_model(model, SurgicalConfig(target_modules=["0"]))
    wrapped(torch.ones(1, 4)).sum().backward()
    assert model[0].last is not None and wrapped.unload() is model


def test_a_recurrent_model_is_scored_and_then_wrapped() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    more = {"num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **more))
    ids = torch.randint(3, 64, (4, 8))
    score_blocks(model, [{"input_ids": ids, "labels": ids}], num_batches=1)
    tuned = get_peft_model(model, SurgicalConfig(blocks=[0]))
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)
