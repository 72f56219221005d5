"""`blocks="auto"`: what is chosen, how many, and what is left out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainingArguments

from surgical_peft import SurgicalConfig, SurgicalError, criteria, get_surgical_model, score_blocks
from surgical_peft.auto import choose_blocks, how_many, together
from surgical_peft.blocks.block_map import BlockMap
from surgical_peft.errors import machine_fault
from surgical_peft.scoring.convolutional import warn_of_convolutions
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Toy


def batches(toy: Toy, count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [toy.batch(seed) for seed in range(count)]


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ([1.0], 1),
        ([1.0, 0.95, 0.1], 1),  # a second block that takes too little ends it
        ([1.0, 0.5, 0.49], 2),
        ([1.0, 0.5, 0.25, 0.1], 4),
        ([1.0, 1.2, 0.1], 1),
        ([0.0, 0.0], 1),
    ],
)
def test_blocks_are_added_while_they_take_a_tenth_of_the_loss(left: list[float], expected: int) -> None:
    assert how_many(left) == expected


def test_the_probe_and_the_joint_trainings_are_the_default(vit: Toy) -> None:
    config, scores = choose_blocks(vit.model(), SurgicalConfig(blocks="auto"), batches(vit))
    assert scores.criterion == "probe" and scores.num_batches == 16
    assert config.criterion is config.num_blocks is None
    assert config.selection["criterion"] == "probe" and config.selection["scores"] == scores.values
    ranking = sorted(scores.values, key=lambda name: -scores.values[name])
    tried = list(config.selection["joint_loss"])
    assert tried == ranking[: min(len(config.blocks) + 1, 4)]  # one more than are taken, at most 4
    assert set(config.blocks) == set(ranking[: len(config.blocks)])


def test_a_block_without_a_gradient_leaves_the_loss_as_it_is(vit: Toy) -> None:
    """A criterion that sees no gradients may put such a block first."""
    model = vit.model()
    model.vit.layers[4].register_forward_hook(lambda module, args, output: args[0])
    tried = score_blocks(model, batches(vit, 4), partial(together, ranking=("4", "5"))).values
    with torch.no_grad():
        loss = sum(model(**batch).loss.item() for batch in batches(vit, 4)) / 4
    assert tried["4"] == pytest.approx(-loss, rel=1e-6)


def test_a_number_and_a_criterion_are_taken_as_given(vit: Toy) -> None:
    given = SurgicalConfig(blocks="auto", criterion=partial(criteria.random, seed=3), num_blocks=3)
    config, scores = choose_blocks(vit.model(), given, batches(vit))
    assert scores.criterion == "random(seed=3)" and "joint_loss" not in config.selection
    assert set(config.blocks) == set(sorted(scores.values, key=lambda name: -scores.values[name])[:3])
    assert given.blocks == "auto"


@pytest.mark.parametrize("name", TOYS)
def test_every_architecture_is_wrapped_also_with_tied_weights(name: str) -> None:
    toy = TOYS[name]
    before = {key: value.clone() for key, value in toy.model().state_dict().items()}
    model = get_surgical_model(toy.model(), SurgicalConfig(blocks="auto", num_blocks=2), batches(toy, 4))
    assert len(model.peft_config["default"].blocks) == 2
    base = model.unload()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_tied_embeddings_can_be_chosen() -> None:
    toy = TOYS["gpt2"]
    config, scores = choose_blocks(
        toy.model(), SurgicalConfig(blocks="auto", criterion="rgn", num_blocks=1), batches(toy, 2)
    )
    assert max(scores.values, key=scores.values.__getitem__) == "embeddings"  # tied to the head
    assert config.blocks == ["embeddings"] and "refused" not in config.selection


def test_blocks_that_cannot_be_tuned_are_left_out_and_said_so() -> None:
    toy = TOYS["gpt2"]
    model = toy.model()
    wte = model.transformer.wte.weight
    model.lm_head.weight = nn.Parameter(wte.data)  # one memory, two parameters
    config, scores = choose_blocks(
        model, SurgicalConfig(blocks="auto", criterion="rgn", num_blocks=1), batches(toy, 2)
    )
    assert {"embeddings", "head"} <= set(scores.values)
    assert config.blocks and not {"embeddings", "head"} & set(config.blocks)
    assert config.selection["refused"].keys() == {"embeddings", "head"}
    assert "shares its memory" in config.selection["refused"]["head"]


def test_more_blocks_than_there_are(vit: Toy) -> None:
    given = SurgicalConfig(blocks="auto", criterion="rgn", num_blocks=99)
    with pytest.raises(SurgicalError, match=r"k=99 .*1 to 15"):
        choose_blocks(vit.model(), given, batches(vit, 2))


def test_a_loader_that_can_be_read_once_will_do(vit: Toy) -> None:
    config, _ = choose_blocks(vit.model(), SurgicalConfig(blocks="auto"), iter(batches(vit)))
    again, _ = choose_blocks(vit.model(), SurgicalConfig(blocks="auto"), batches(vit))
    assert config.blocks == again.blocks and config.selection == again.selection


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_convolutional_layers_are_spoken_of(name: str) -> None:
    """The choice is measured on transformers, and on the one network of the other kind it was a bad one."""
    model = FAMILIES[name].model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_convolutions(model, BlockMap.find(model))
    assert [name] * len(told) == [name] * (name in ("convnext", "resnet"))


def test_one_batch_cannot_decide_how_many(vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=r"num_blocks=None .*2 batches"):
        choose_blocks(vit.model(), SurgicalConfig(blocks="auto", criterion="rgn"), batches(vit, 1))


def trainer_of(toy: Toy, folder: Path, **options: Any) -> Trainer:
    batch = toy.batch(size=32)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(32)]
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True)
    return Trainer(model=toy.model(), args=args, train_dataset=rows, **options)  # type: ignore[arg-type]


def test_a_trainer_gives_its_batches_its_loss_and_its_steps(tmp_path: Path) -> None:
    counted: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counted.append(len(labels))
        return nn.functional.cross_entropy(outputs.logits, labels)

    trainer = trainer_of(TOYS["bert"], tmp_path, compute_loss_func=loss)
    model = get_surgical_model(trainer.model, SurgicalConfig(blocks="auto"), trainer)
    config = model.peft_config["default"]
    assert set(counted) == {4} and config.blocks
    assert config.selection["cost"]["budget"] == 12  # half of 8 batches in 3 epochs


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs.pop("labels"))
            return model(**inputs).logits.square().mean()

    seen: list[torch.Tensor] = []
    trainer = trainer_of(TOYS["bert"], tmp_path)
    trainer.__class__ = Weighted
    config = SurgicalConfig(blocks="auto", criterion="grad_norm", num_blocks=1)
    get_surgical_model(trainer.model, config, trainer, num_batches=3)
    assert len(seen) == 3
    trainer.train_dataset = None
    with pytest.raises(SurgicalError, match="train_dataset"):
        get_surgical_model(trainer.model, config, trainer)


def test_a_data_set_is_no_batches(vit: Toy) -> None:
    data = Dataset.from_dict({"pixel_values": [[0.0]], "labels": [0]})
    for given in (data, torch.utils.data.TensorDataset(torch.zeros(2)), None):
        with pytest.raises(SurgicalError, match="DataLoader"):
            get_surgical_model(vit.model(), SurgicalConfig(blocks="auto"), given)  # type: ignore[arg-type]


class Dying(TorchDataset[dict[str, torch.Tensor]]):
    """Its third example ends the process that loads it."""

    def __init__(self, toy: Toy) -> None:
        self.rows = [toy.batch(seed) for seed in range(4)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        if place == 2 and get_worker_info() is not None:
            time.sleep(1)  # those before it are fetched: torch says otherwise what is lost with the process
            os._exit(1)
        return self.rows[place]


def score(model: nn.Module, loader: Any) -> None:
    score_blocks(model, loader, "rgn")


def choose(model: nn.Module, loader: Any) -> None:
    get_surgical_model(model, SurgicalConfig(blocks="auto"), loader)


@pytest.mark.parametrize("act", [score, choose])
@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), None])
def test_where_memory_or_a_loading_process_is_lost_the_model_is_as_it_was(
    vit: Toy, act: Callable[[nn.Module, Any], None], fault: Exception | None
) -> None:
    model = vit.model().train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if fault is not None and len(calls) == 3:
            raise fault

    model.register_forward_hook(fail)
    loader = DataLoader(Dying(vit), batch_size=None, num_workers=1) if fault is None else batches(vit, 8)
    with pytest.raises(RuntimeError if fault is None else type(fault)) as caught:
        act(model, loader)
    assert machine_fault(caught.value)
    assert all(parameter.requires_grad == (parameter is not frozen) for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules()) and not hasattr(model, "peft_config")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
