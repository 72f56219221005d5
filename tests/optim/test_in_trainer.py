"""What Trainer offers around a training works with our optimizer and callback, also under a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from surgical_peft import SurgicalCallback, SurgicalConfig, policies, surgical_optimizer
from surgical_peft.policies.policy import Policy
from tests.support.toys import TOYS

BERT = TOYS["bert"]
POLICIES = {"none": None, "lisa": policies.lisa(num_blocks=1, every=1), "probe": policies.auto_rgn(every=2)}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def rows(labels: Any = None) -> list[dict[str, Any]]:
    batch = BERT.batch(size=16)
    batch["labels"] = batch["labels"] if labels is None else labels
    return [{name: values[i] for name, values in batch.items()} for i in range(16)]


def trainer_of(
    folder: Path,
    policy: Policy | None = None,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    callbacks: Any = (),
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), **{**settings, **quiet, **arguments})  # type: ignore[arg-type]
    data = data or rows()
    return Trainer(
        model=get_peft_model(model or BERT.model(), SurgicalConfig(blocks=[0, 1, "head"])),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        optimizer_cls_and_kwargs=surgical_optimizer(args, policy),  # type: ignore[arg-type]
        callbacks=[SurgicalCallback(), *callbacks],
        **(options or {}),
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone() for name, value in trainer.model.named_parameters() if "surgical_" not in name
    }


@each_policy
def test_evaluation_before_training(policy: Policy | None, tmp_path: Path) -> None:
    """It said "found no surgical optimizer", though one was given."""
    trainer = trainer_of(tmp_path, policy)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


@each_policy
def test_early_stopping_gives_back_the_best(policy: Policy | None, tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss"}
    stop = [Worse(), EarlyStoppingCallback(early_stopping_patience=2)]
    trainer = trainer_of(tmp_path, policy, callbacks=stop, load_best_model_at_end=True, **every)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1
    best = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    for name, weight in best.items():
        assert torch.equal(trainer.model.get_parameter(name), weight), name
    assert len(best) == len([name for name, p in trainer.model.named_parameters() if p.requires_grad])


class Interrupt(TrainerCallback):
    """Ctrl-C in the step after 3."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@each_policy
def test_a_training_goes_on_after_control_c(policy: Policy | None, tmp_path: Path) -> None:
    straight = trainer_of(tmp_path / "straight", policy)
    straight.train()
    broken = trainer_of(tmp_path / "broken", policy, callbacks=[Interrupt()], save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert all(weight.requires_grad for name, weight in broken.model.named_parameters() if "encoder.layer.0." in name)
    broken.remove_callback(Interrupt)
    other = trainer_of(tmp_path / "broken", policy, save_steps=2)  # as after a restart
    for trainer in (broken, other):
        trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
        expected = weights(straight)
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(trainer).items())


def test_a_probe_goes_by_the_loss_that_trains(tmp_path: Path) -> None:
    """It scored by the model's own loss, without a word, whatever `compute_loss_func` made of it."""
    seen: list[bool] = []
    weighing = torch.tensor([1.0, 1.0, 5.0])

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        seen.append(num_items_in_batch is None)  # Trainer gives it, a probe has none to give
        return nn.functional.cross_entropy(outputs.logits, labels, weighing)

    policy = policies.auto_rgn(every=3, num_batches=2)
    trainer_of(tmp_path, policy, options={"compute_loss_func": loss}).train()
    assert sum(seen) == 4 and len(seen) == 4 + 6
    trainer_of(tmp_path / "smooth", policy, label_smoothing_factor=0.1).train()


@each_policy
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_kinds_of_labels(kind: str, policy: Policy | None, tmp_path: Path) -> None:
    labels = torch.rand(16, 1) if kind == "regression" else (torch.rand(16, 3) > 0.5).float()
    config = BERT.model().config
    config.num_labels, config.problem_type = labels.shape[1], kind  # type: ignore[union-attr]
    trainer = trainer_of(tmp_path, policy, model=BertForSequenceClassification(config), data=rows(labels))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
