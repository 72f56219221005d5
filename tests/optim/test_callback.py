"""What `SurgicalCallback` logs and hands on; its probes are tested with the policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surgical_peft import (
    SurgicalCallback,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    policies,
    surgical_optimizer,
)
from surgical_peft.optim.history import History, read_history
from surgical_peft.policies.policy import Policy
from tests.support.toys import TOYS, Toy

BLOCKS = ["0", "5", "head"]


class Tracker(TrainerCallback):
    """Keeps what it is given to log, as TensorBoard's callback does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trained(toy: Toy, policy: Policy | None, folder: Path, callbacks: list[Any], **kwargs: Any) -> Trainer:
    batch = toy.batch(size=16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, max_steps=6, save_strategy="no", logging_steps=2,
        per_device_train_batch_size=4, disable_tqdm=True, **kwargs,
    )  # fmt: skip
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0, 5, "head"]))
    extra: dict[str, Any] = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)}
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks, **extra)  # type: ignore[arg-type]
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["auto_rgn", "bvg_ls", "lisa", "layer_decay"])
def test_factors_and_scores_are_logged_as_numbers(name: str, vit: Toy, tmp_path: Path) -> None:
    tracker = Tracker()
    policy = policies.lisa(num_blocks=1, every=1) if name == "lisa" else getattr(policies, name)()
    trainer = trained(vit, policy, tmp_path, [SurgicalCallback(), tracker])
    kept = [log for log in trainer.state.log_history if "loss" in log]
    seen = [log for log in tracker.logs if "loss" in log]
    assert len(kept) == len(seen) == 3
    for log, other in zip(kept, seen, strict=True):
        assert {key: value for key, value in log.items() if key != "step"} == other
        assert all(isinstance(value, float | int) for value in log.values())
        factors = [log[f"surgical/lr_multiplier/{block}"] for block in BLOCKS]
        assert log["surgical/selected"] == sum(factor > 0 for factor in factors)
        scores = [key for key in log if key.startswith("surgical/score/")]
        assert scores == ([f"surgical/score/{b}" for b in BLOCKS] if name in ("auto_rgn", "bvg_ls") else [])
        row = [row for row in read_history(tmp_path / "surgical_history.jsonl") if row["step"] <= log["step"]][-1]
        assert row["lr_multiplier"] == pytest.approx(dict(zip(BLOCKS, factors, strict=True)), rel=1e-5)
    if name == "layer_decay":
        assert factors == pytest.approx([0.75**12, 0.75**7, 1.0])
    assert (tmp_path / "surgical_history.png").exists()


def test_a_tensor_policy_logs_the_mean_over_a_blocks_entries(vit: Toy, tmp_path: Path) -> None:
    trainer = trained(vit, policies.auto_rgn(granularity="tensor"), tmp_path, [SurgicalCallback()])
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    groups = [group for group in trainer.optimizer.optimizer.param_groups if group["block"] == "5"]
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    mean = sum(n * group["lr_multiplier"] for n, group in zip(sizes, groups, strict=True)) / sum(sizes)
    assert len(groups) == 16
    assert log["surgical/lr_multiplier/5"] == pytest.approx(mean)


def test_without_a_policy_nothing_is_logged_or_written(vit: Toy, tmp_path: Path) -> None:
    trainer = trained(vit, None, tmp_path, [SurgicalCallback()])
    assert not any(key.startswith("surgical/") for log in trainer.state.log_history for key in log)
    assert not list(tmp_path.glob("surgical_history*"))


def test_a_training_that_is_over_before_its_last_stage_may_be_ended(vit: Toy, tmp_path: Path) -> None:
    """It stopped early, and was interrupted before it had saved: the rerun has no step left."""
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 5, "head"]))
    policy = policies.stages([{"blocks": ["head"], "epochs": 5}, {"blocks": "all"}])
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policy)
    given = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    over = TrainerState(global_step=3, max_steps=3, num_train_epochs=1)
    SurgicalCallback().on_train_begin(given[0], over, given[1], optimizer=optimizer, model=model)
    with pytest.raises(SurgicalError):
        begun = TrainerState(global_step=2, max_steps=3, num_train_epochs=1)
        SurgicalCallback().on_train_begin(given[0], begun, given[1], optimizer=optimizer, model=model)


def test_a_loop_of_ones_own_that_begins_again_begins_its_schedule_again(vit: Toy, tmp_path: Path) -> None:
    """Without Trainer, whose end of training would have ended the schedule."""
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0, 5, "head"]))
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policies.lisa(1, every=1))
    callback, state = SurgicalCallback(), TrainerState(max_steps=3, num_train_epochs=1)
    given: Any = (TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl())
    begun = []
    for _ in range(2):
        callback.on_train_begin(*given, optimizer=optimizer, model=model)
        begun.append(optimizer.param_groups[0]["surgical"]["step"])
        for _ in range(2):
            model(**vit.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert begun == [0, 0] and optimizer.param_groups[0]["surgical"]["step"] == 2


def test_probes_use_the_loss_they_are_given(vit: Toy, tmp_path: Path) -> None:
    batches: list[int] = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(len(batch["labels"]))
        return model(pixel_values=batch["pixel_values"]).logits.square().mean()

    trained(vit, policies.auto_rgn(every=2, num_batches=3), tmp_path, [SurgicalCallback(loss_fn=loss)])
    assert batches == [4] * 9  # before the steps 1, 3 and 5


def test_rate_times_factor_in_the_log_is_what_was_used(vit: Toy, tmp_path: Path) -> None:
    used: list[dict[str, float]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].optimizer.register_step_pre_hook(
                lambda o, a, k: used.append({group["block"]: group["lr"] for group in o.param_groups})
            )

    schedule = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    for policy in (policies.layer_decay(), policies.auto_rgn()):
        used.clear()
        trainer = trained(vit, policy, tmp_path, [SurgicalCallback(), Look()], **schedule)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        for log, step in zip(logs, used[1::2], strict=True):
            told = {block: log["learning_rate"] * log[f"surgical/lr_multiplier/{block}"] for block in BLOCKS}
            assert told == pytest.approx(step)
        assert len({log["learning_rate"] for log in logs}) > 1


# ---- trainers that call their model in another way


class Features(nn.Module):
    """As a SentenceTransformer: a dict of features, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = TOYS["bert"].model()

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": self.bert(input_ids=features["input_ids"]).logits}


class OwnCall(Trainer):
    """As a SentenceTransformerTrainer."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own_loss(model, inputs)


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch)["logits"], batch["labels"])


PROBING = {
    "auto_rgn-epoch": policies.auto_rgn(every="epoch", num_batches=1),
    "auto_rgn-2": policies.auto_rgn(every=2, num_batches=1),
    "auto_rgn_paper": policies.auto_rgn_paper(),
    "auto_snr": policies.auto_snr(0.1, num_batches=2, granularity="block"),
}


def own_call(policy: Policy, folder: Path, callback: SurgicalCallback, save: str = "no") -> OwnCall:
    batch = TOYS["bert"].batch(size=16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, max_steps=6, save_strategy=save, save_steps=3,
        per_device_train_batch_size=4, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    extra: dict[str, Any] = {"optimizer_cls_and_kwargs": surgical_optimizer(args, policy)}
    return OwnCall(model=Features(), args=args, train_dataset=data, callbacks=[callback], **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", PROBING.values(), ids=PROBING)
def test_a_probe_under_a_trainer_with_a_call_of_its_own(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the first step, also by a run that resumes; with the loss, it works."""
    monkeypatch.setattr(History, "plot", lambda *_: None)
    trainer = own_call(policy, tmp_path, SurgicalCallback(own_loss), save="steps")
    trainer.train()
    assert trainer.state.global_step == 6
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = own_call(policy, tmp_path / "again", SurgicalCallback())
        with pytest.raises(SurgicalError, match=r"SurgicalCallback\(loss_fn"):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == (3 if checkpoint else 0)
        assert all(p.requires_grad for p in trainer.model.parameters())


def test_the_papers_auto_rgn_drops_the_moments_at_each_epoch(vit: Toy, tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(max(float(each["step"]) for each in kwargs["optimizer"].state.values()))

    for policy, expected in (
        (policies.auto_rgn_paper(), [1, 2, 3, 4, 1, 2]),
        (policies.auto_rgn(every="epoch"), [1, 2, 3, 4, 5, 6]),
    ):
        steps = Steps()
        trained(vit, policy, tmp_path, [SurgicalCallback(), steps])
        assert steps.seen == expected
