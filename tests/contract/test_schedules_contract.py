"""Every policy trains the same at each step whatever feeds and drives it, and leaves nothing behind.

All examples are alike and the rate is too small to move a weight, so gradients are those of the step before, and what
a policy reads off them is the same in every run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from surgical_peft import SurgicalCallback, SurgicalError, create_surgical_optimizer, policies, surgical_optimizer
from surgical_peft.optim.history import History
from surgical_peft.policies import Stage
from surgical_peft.policies.policy import Policy
from tests.contract.test_policies_contract import MAKERS
from tests.support.plain import Net, Plain

STEPS, STEPS_AN_EPOCH = 9, 4
TOY = Plain("linear", lambda: Net(*[nn.Linear(8, 8) for _ in range(3)]), (), "0", "2")
Sets = list[dict[str, float]]
BY_EPOCH: dict[str, Callable[[], Policy]] = {
    "gradual_unfreezing": policies.gradual_unfreezing,
    "lp_ft": lambda: policies.lp_ft(epochs=1),
    "two_stage": lambda: policies.two_stage(counts=[5, 3, 1], epochs=2),
    "stages": lambda: policies.stages([Stage("head", epochs=1), Stage([1], epochs=1), Stage()]),
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, "plot", lambda *_: None)


class Table(torch.utils.data.Dataset):
    """Examples that are all alike."""

    def __init__(self, examples: int = 4 * STEPS_AN_EPOCH) -> None:
        self.row = {key: value[0] for key, value in TOY.batch().items()}
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return self.row


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, examples: int = 4 * STEPS_AN_EPOCH) -> None:
        self.table = Table(examples)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([self.table[at] for at in range(len(self.table))])


DATA: dict[str, Callable[[], Any]] = {"table": Table, "stream": Stream}
every_policy = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in MAKERS for kind in DATA if kind == "table" or name in policies.__all__]
)


@dataclass
class Look(TrainerCallback):
    """What may be trained at each step, with the factor of its block; interrupts in step `until` at `place`."""

    until: int | None = None
    place: str = ""
    sets: Sets = field(default_factory=list)

    def see(self, model: nn.Module, optimizer: Any) -> None:
        while not hasattr(optimizer, "block_rates"):
            optimizer = optimizer.optimizer
        factors = {id(p): group["lr_multiplier"] for group in optimizer.param_groups for p in group["params"]}
        self.sets.append({name: factors[id(p)] for name, p in model.named_parameters() if p.requires_grad})
        if len(self.sets) == self.until and self.place != "step begin":
            weight = next(p for p in model.parameters() if p.requires_grad)
            self.handle: Any = (
                weight.register_hook(stop)
                if self.place == "backward"
                else model.register_forward_pre_hook(stop)
                if self.place == "forward"
                else optimizer.register_step_pre_hook(stop)
            )
        elif len(self.sets) == self.until:
            stop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.see(kwargs["model"], kwargs["optimizer"])


class Interrupted(BaseException):
    """As Ctrl-C: no `Exception`."""


def stop(*_: Any) -> None:
    raise Interrupted


@dataclass
class Before:
    """A model, and what it must be like again."""

    model: nn.Module = field(default_factory=lambda: TOY.model().train())

    def __post_init__(self) -> None:
        self.state = self.now()

    def now(self) -> list[Any]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()]
        return [hooks, [p.requires_grad for p in self.model.parameters()]]

    def check(self) -> None:
        assert self.now() == self.state


def needs_callback(policy: Policy) -> bool:
    return bool(policy.probe_batches or policy.by_epoch)


def trainer_for(
    before: Before, policy: Policy, data: Any, look: Look, folder: Path, loud: bool = True, **more: Any
) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-30, "save_strategy": "no"}
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **{**settings, **more}
    )
    return Trainer(
        model=before.model,
        args=args,
        train_dataset=data,
        optimizer_cls_and_kwargs=surgical_optimizer(args, policy),  # type: ignore[arg-type]
        callbacks=[*([SurgicalCallback()] if loud else []), look],
    )


def by_trainer(policy: Policy, kind: str, folder: Path, **more: Any) -> Sets:
    before, look = Before(), Look()
    trainer_for(before, policy, DATA[kind](), look, folder, **more).train()
    before.check()
    assert len(look.sets) == STEPS
    return look.sets


def by_hand(before: Before, policy: Policy, kind: str, look: Look, folder: Path) -> None:
    """A loop of one's own; where a policy must be told of epochs and data, it tells the callback."""
    optimizer = create_surgical_optimizer(before.model, torch.optim.AdamW, lr=1e-30, policy=policy)
    loader = DataLoader(DATA[kind](), batch_size=4, collate_fn=default_data_collator)
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=4)
    state = TrainerState(max_steps=STEPS, num_train_epochs=STEPS, train_batch_size=4)
    callback = SurgicalCallback() if needs_callback(policy) else TrainerCallback()
    told = {"model": before.model, "optimizer": optimizer, "train_dataloader": loader}
    callback.on_train_begin(args, state, TrainerControl(), **told)
    while state.global_step < STEPS:
        callback.on_epoch_begin(args, state, TrainerControl(), **told)
        for batch in loader:
            callback.on_step_begin(args, state, TrainerControl(), **told)
            look.see(before.model, optimizer)
            before.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step += 1
            if state.global_step == STEPS:
                break


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sets]:
    """Of each policy, what it trains at each step of a run on a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "plot", lambda *_: None)
        folder = tmp_path_factory.mktemp("reference")
        return {
            name: by_trainer(make(), "table", folder, loud=needs_callback(make())) for name, make in MAKERS.items()
        }


@every_policy
def test_a_trainer_that_is_interrupted_or_runs_again_starts_anew(
    name: str, kind: str, references: dict[str, Sets], tmp_path: Path
) -> None:
    policy, before = MAKERS[name](), Before()
    look = Look(until=7, place="backward")
    trainer = trainer_for(before, policy, DATA[kind](), look, tmp_path, loud=needs_callback(policy))
    if kind == "stream" and policy.probe_batches:
        with pytest.raises(SurgicalError, match="stream"):
            trainer.train()
        assert not look.sets
        before.check()
        return
    with pytest.raises(Interrupted) as caught:  # which holds all that was at work
        trainer.train()
    before.check()
    look.handle.remove()
    if name != "AnyOne":  # which draws anew whenever it is asked
        trainer.add_callback(SurgicalCallback()) if not needs_callback(policy) else None
    look.until, look.sets = None, []
    trainer.train()
    before.check()
    assert look.sets == references[name]
    assert caught.value


@every_policy
def test_a_loop_of_ones_own_leaves_nothing_behind(
    name: str, kind: str, references: dict[str, Sets], tmp_path: Path
) -> None:
    policy, before, look = MAKERS[name](), Before(), Look(until=5)
    if kind == "stream" and policy.probe_batches:
        with pytest.raises(SurgicalError, match="stream"):
            by_hand(before, policy, kind, look, tmp_path)
        before.check()
        return
    gc.disable()
    try:  # without a collection: an optimizer must not be part of a cycle
        look.place = "step begin"
        with pytest.raises(Interrupted):
            by_hand(before, policy, kind, look, tmp_path)
        before.check()
        for _ in range(2):
            look = Look()
            by_hand(before, policy, kind, look, tmp_path)
            before.check()
            assert look.sets == references[name]
    finally:
        gc.enable()


@pytest.mark.parametrize("loud", [True, False], ids=["callback", "alone"])
@pytest.mark.parametrize("place", ["step begin", "forward", "backward", "step", "data", "epoch begin"])
def test_wherever_a_trainer_is_interrupted(place: str, loud: bool, tmp_path: Path) -> None:
    class Broken(Stream):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from [self.table[at] for at in range(12)]
            stop()

    class AtEpoch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                stop()

    before, policy = Before(), policies.lisa(num_blocks=1, every=1)
    look = Look(until=2 if place not in ("data", "epoch begin") else None, place=place)
    data = Broken() if place == "data" else Table()
    trainer = trainer_for(before, policy, data, look, tmp_path, loud)
    if place == "epoch begin":
        trainer.add_callback(AtEpoch())
    with pytest.raises(Interrupted):
        trainer.train()
    if place == "forward":
        look.handle.remove()
    before.check()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(set(rates)) == 1
    assert 1 <= len(look.sets) <= 4


@pytest.mark.parametrize("loud", [True, False], ids=["callback", "alone"])
@pytest.mark.parametrize("name", ["gradual_unfreezing-up", "lisa", "progressive_freezing"])
def test_smaller_batches_begin_the_schedule_anew(
    name: str, loud: bool, references: dict[str, Sets], tmp_path: Path
) -> None:
    """Trainer begins again within one `train()` when the memory does not do."""

    class Full(Look):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            if state.train_batch_size == 4 and state.global_step == 3:
                raise RuntimeError("CUDA out of memory.")

    before, look = Before(), Full()
    trainer_for(before, MAKERS[name](), Table(), look, tmp_path, loud, auto_find_batch_size=True).train()
    assert look.sets[:4] == references[name][:4]
    assert look.sets[4:] == references[name]
    before.check()


class Own:
    """What trains in a way of its own, for a Trainer to inherit."""

    def train(self: Any) -> None:
        self.create_optimizer()
        Look().see(self.model, self.optimizer)
        for _ in range(2):
            self.model(**TOY.batch()).loss.backward()
            self.optimizer.step()


class Mixed(Own, Trainer): ...


class Overriding(Trainer):
    train = Own.train  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Mixed, Overriding])
def test_a_trainer_that_trains_in_a_way_of_its_own_leaves_nothing_behind(kind: type[Trainer], tmp_path: Path) -> None:
    before, policy = Before(), policies.lisa(1, every=1)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=1e-3)
    made = surgical_optimizer(args, policy)
    trainer = kind(model=before.model, args=args, optimizer_cls_and_kwargs=made)  # type: ignore[arg-type]
    trainer.train()
    before.check()
    assert trainer.optimizer.param_groups[0]["surgical"]["step"] == 2
    trainer.train()
    before.check()
    assert trainer.optimizer.param_groups[0]["surgical"]["step"] == 2  # it began anew


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ["gradual_unfreezing", "stages"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name: str, kind: str, tmp_path: Path) -> None:
    """Within the first pass, at its end, within the second: a stream's is begun anew by Trainer."""
    steps = 2 * STEPS_AN_EPOCH + 1
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "learning_rate": 1e-2}
    policy, straight = BY_EPOCH[name](), Look()
    model = Before()
    trainer_for(model, policy, DATA[kind](), straight, tmp_path, **settings).train()
    assert len({frozenset(each) for each in straight.sets}) > 1
    for done in (2, 4, 6):
        look, resumed = Look(), Before()
        trainer = trainer_for(resumed, policy, DATA[kind](), look, tmp_path / "again", **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{done}"))
        assert look.sets == straight.sets[done:], done
        pairs = zip(resumed.model.parameters(), model.model.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", BY_EPOCH)
def test_accumulation_and_length_in_epochs_change_no_epoch(name: str, tmp_path: Path) -> None:
    reference = by_trainer(BY_EPOCH[name](), "table", tmp_path)
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for kind in DATA:
        assert by_trainer(BY_EPOCH[name](), kind, tmp_path, **small) == reference
    length = {"max_steps": -1, "num_train_epochs": STEPS / STEPS_AN_EPOCH}
    assert by_trainer(BY_EPOCH[name](), "table", tmp_path, **length) == reference


def test_a_second_optimizer_starts_clean_and_the_first_takes_no_further_part() -> None:
    before = Before()
    first = create_surgical_optimizer(before.model, torch.optim.AdamW, lr=1e-30, policy=MAKERS["stages"]())
    assert before.now() != before.state
    second = create_surgical_optimizer(before.model, torch.optim.AdamW, lr=1e-30)
    before.check()
    assert sum(len(group["params"]) for group in second.param_groups) == len(list(before.model.parameters()))
    for _ in range(4):
        before.model(**TOY.batch()).loss.backward()
        first.step()
        second.step()
        before.check()


def test_what_is_frozen_by_hand_meanwhile_stays_frozen() -> None:
    before = Before()
    policy = policies.stages([Stage([0, 1], steps=1), Stage()])
    optimizer = create_surgical_optimizer(before.model, torch.optim.AdamW, lr=1e-30, policy=policy)
    by_hand = before.model.get_parameter("layers.0.weight").requires_grad_(False)
    for _ in range(2):
        before.model(**TOY.batch()).loss.backward()
        optimizer.step()
    del optimizer
    assert [name for name, p in before.model.named_parameters() if not p.requires_grad] == ["layers.0.weight"]
    by_hand.requires_grad_(True)
    before.check()
