"""Scoring every family as users do: several examples a batch, before and after a training; nothing stays behind."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from surgical_peft import SurgicalConfig, SurgicalError, create_surgical_optimizer, score_blocks
from tests.support.families import FAMILIES
from tests.support.toys import Batch, Toy


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


def train(model: nn.Module, batches: list[Batch]) -> None:
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def test_scoring_before_and_after_a_training_leaves_nothing_behind(family: Toy) -> None:
    criterion = "rgn" if family.name == "clip" else "fisher"  # CLIP's loss exists over a batch only
    batches = [family.batch(seed) for seed in range(3)]
    model = family.model()
    before = tensors_alive()
    scores = score_blocks(model, batches, criterion)
    assert score_blocks(model, batches, criterion) == scores
    assert tensors_alive() == before
    model = get_peft_model(model, SurgicalConfig(blocks=[family.first, family.last]))
    train(model, batches)
    before = tensors_alive()
    tuned = score_blocks(model, batches, criterion)
    assert tensors_alive() == before
    assert list(tuned.values) == list(scores.values) == list(family.blocks) and tuned.values != scores.values


def test_every_batch_is_scored_as_if_it_came_first(family: Toy) -> None:
    """LeViT computes its attention biases once for all of eval mode: for later batches they had no gradient."""
    batches = [family.batch(seed) for seed in range(3)]
    alone = [score_blocks(family.model(), [batch], granularity="module").values for batch in batches]
    together = score_blocks(family.model(), batches, granularity="module").values
    means = {name: sum(each[name] for each in alone) / 3 for name in together}
    assert together == pytest.approx(means, rel=1e-5)


def test_single_examples_of_a_contrastive_loss_are_refused() -> None:
    clip = FAMILIES["clip"]
    for criterion in ("fisher", "snr"):
        with pytest.raises(SurgicalError, match="over a batch"):
            score_blocks(clip.model(), [clip.batch()], criterion)
