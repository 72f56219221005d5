"""`doctor` finds each planted fault where it was planted, none where there is none, and leaves no trace."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, AdamW, Optimizer
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from surgical_peft import (
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    doctor,
    policies,
    surgical_optimizer,
)
from surgical_peft.diagnosis.diagnosis import FAULTS
from tests.support.families import FAMILIES

LLAMA = FAMILIES["llama"]
LAST = "model.layers.2."


@dataclass
class Patient:
    """A training with one fault in it: what to give `doctor`, and the tensors that have the fault."""

    model: Any
    optimizer: Optimizer
    where: Callable[[str], bool]
    batch: Any
    loss_fn: Any = None
    besides: tuple[str, ...] = ()  # faults that come with it


def llama(*trained: str, family: str = "llama") -> Any:
    """A bare model in which all is trained, or what begins so."""
    model: Any = FAMILIES[family].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or name.startswith(trained))
    return model


def trained_by(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def in_last(name: str) -> bool:
    return name.startswith(LAST)


def unused() -> Patient:
    model = llama(LAST)
    model.model.layers[2].mlp.forward = lambda hidden: hidden  # a monkey patch that forgot the weights
    return Patient(model, trained_by(model), lambda name: name.startswith(f"{LAST}mlp"), LLAMA.batch())


def no_gradient() -> Patient:
    model = llama("model.layers.0", "model.layers.2")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    return Patient(model, trained_by(model), lambda name: name.startswith("model.layers.0"), LLAMA.batch())


def zero_gradient() -> Patient:
    model = llama(LAST)
    loss = lambda model, batch: 0 * model(**batch).loss  # noqa: E731
    return Patient(model, trained_by(model), in_last, LLAMA.batch(), loss)


def bad_gradient() -> Patient:
    model = llama(LAST)
    loss = lambda model, batch: float("nan") * model(**batch).loss  # noqa: E731
    return Patient(model, trained_by(model), in_last, LLAMA.batch(), loss)


def not_in_optimizer() -> Patient:
    model = llama("model.layers.0")
    optimizer = trained_by(model)
    model.model.layers[2].requires_grad_(True)
    return Patient(model, optimizer, in_last, LLAMA.batch())


def frozen_in_optimizer() -> Patient:
    model = llama("model.layers.0", LAST)
    optimizer = trained_by(model)
    model.model.layers[2].requires_grad_(False)
    return Patient(model, optimizer, in_last, LLAMA.batch())


def not_of_model() -> Patient:
    model = llama(LAST, "lm_head")
    optimizer = trained_by(model)
    model.lm_head = nn.Linear(16, 24, bias=False).requires_grad_(False)
    return Patient(model, optimizer, lambda name: "[24, 16]" in name, LLAMA.batch())


def twice() -> Patient:
    model = llama(LAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, which is easily overlooked
        optimizer = SGD([*model.model.layers[2].parameters(), model.model.layers[2].mlp.up_proj.weight], lr=1e-2)
    return Patient(model, optimizer, lambda name: name == f"{LAST}mlp.up_proj.weight", LLAMA.batch())


def decayed() -> Patient:
    model = llama(LAST)
    return Patient(
        model,
        AdamW(model.model.layers[2].parameters()),
        lambda name: name.startswith(LAST) and "norm" in name,
        LLAMA.batch(),
    )


def no_master() -> Patient:
    model = llama(LAST).bfloat16()
    optimizer = SGD(model.model.layers[2].parameters(), lr=1e-9)
    return Patient(model, optimizer, in_last, LLAMA.batch(), besides=("not_moved",))


def not_moved() -> Patient:
    model = llama(LAST)
    return Patient(model, SGD(model.model.layers[2].parameters(), lr=0.0), in_last, LLAMA.batch())


def moved_frozen() -> Patient:
    family = FAMILIES["resnet"]
    model = family.model()
    model.resnet.requires_grad_(False)  # type: ignore[operator, union-attr]
    is_statistic = lambda name: "running" in name  # noqa: E731
    return Patient(model, trained_by(model), is_statistic, family.batch())


def untied() -> Patient:
    model = llama(family="llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return Patient(model, trained_by(model), lambda name: name == "lm_head.weight", LLAMA.batch())


def unknown_name() -> Patient:
    model = llama(LAST)
    weight_norm(model.model.layers[2].mlp.up_proj)
    return Patient(model, trained_by(model), lambda name: "parametrizations" in name, LLAMA.batch())


PLANTED = [
    *(unused, no_gradient, zero_gradient, bad_gradient, not_in_optimizer, frozen_in_optimizer, not_of_model),
    *(twice, decayed, no_master, not_moved, moved_frozen, untied, unknown_name),
]


def test_every_fault_is_planted() -> None:
    assert [plant.__name__ for plant in PLANTED] == list(FAULTS) and len(FAULTS) >= 12


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_fault_is_found_where_it_is_and_nowhere_else(plant: Callable[[], Patient]) -> None:
    patient = plant()
    diagnosis = doctor((patient.model, patient.optimizer), patient.batch, patient.loss_fn)
    assert set(diagnosis.faults) == {plant.__name__, *patient.besides}
    expected = [tensor.name for tensor in diagnosis.tensors if patient.where(tensor.name)]
    assert expected and diagnosis.faults[plant.__name__] == expected
    assert not diagnosis.is_healthy and plant.__name__ in str(diagnosis)
    assert json.loads(diagnosis.to_json())["faults"] == diagnosis.faults


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_has_a_fault(name: str) -> None:
    family = FAMILIES[name]
    model = get_peft_model(family.model(), SurgicalConfig(blocks=[family.first, family.last]))
    optimizer = create_surgical_optimizer(model, AdamW, lr=1e-3, weight_decay=0.01)
    diagnosis = doctor((model, optimizer), family.batch())
    assert diagnosis.is_healthy, diagnosis
    reached = {tensor.name for tensor in diagnosis.tensors if tensor.gradient == "finite"}
    assert reached == {tensor.name for tensor in diagnosis.tensors if tensor.moved} and reached
    assert "No faults" in str(diagnosis)


def test_lora_in_16_bits_under_a_policy_is_healthy() -> None:
    model = get_peft_model(
        llama().bfloat16(), SurgicalConfig(blocks=[1, 2], lora=LoraConfig(target_modules=["q_proj"], r=2))
    )
    optimizer = create_surgical_optimizer(model, AdamW, lr=1e-3, policy=policies.lisa(num_blocks=1, every=1))
    resting = [p for p in model.parameters() if not p.requires_grad and any(p is q for q in optimizer.state)]
    diagnosis = doctor((model, optimizer), LLAMA.batch())
    assert diagnosis.is_healthy, diagnosis
    assert all(tensor.master for tensor in diagnosis.tensors if tensor.moved)
    assert not resting and any(tensor.engine == "merged" for tensor in diagnosis.tensors)


def test_a_warmup_from_zero_is_no_fault() -> None:
    model = llama(LAST)
    optimizer = trained_by(model)
    get_linear_schedule_with_warmup(optimizer, 10, 100)
    assert doctor((model, optimizer), LLAMA.batch()).is_healthy
    assert optimizer.param_groups[0]["lr"] == 0


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """All that a step could leave behind, as numbers."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    states = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    tensors += [value for _, value in states if isinstance(value, torch.Tensor)]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    modes = [module.training for module in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    randomness = [random.random(), float(np.random.rand()), torch.rand(1).item()]  # drawn: both draw the same
    plain = [key for key, _ in states], copy.deepcopy(groups), modes, flags, randomness
    return [[tensor.clone() for tensor in tensors], plain]


@pytest.mark.parametrize(
    ("name", "policy", "dtype"),
    [("resnet", None, torch.float32), ("llama", policies.lisa(num_blocks=1, every=2), torch.bfloat16)],
)
def test_all_is_put_back_and_training_goes_on_as_if_nothing_had_been(name: str, policy: Any, dtype: Any) -> None:
    family, ends = FAMILIES[name], []
    for is_seen in (True, False):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        model = get_peft_model(family.model().to(dtype), SurgicalConfig(blocks="all")).train()
        optimizer = create_surgical_optimizer(model, AdamW, lr=1e-2, policy=policy)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.batch().items()}
        for number in range(3):
            if is_seen and number != 1:  # before the first step, and with a state and a gradient
                before, state = everything(model, optimizer), torch.get_rng_state()
                random_states = random.getstate(), np.random.get_state()
                assert doctor((model, optimizer), batch).is_healthy
                assert torch.equal(torch.get_rng_state(), state)
                assert random.getstate() == random_states[0]
                random.setstate(random_states[0])
                after = [everything(model, optimizer)[0], before[1]]
                assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
                assert len(before[0]) == len(after[0])
            else:
                everything(model, optimizer)  # draws as much
            model(**batch).loss.backward()
            optimizer.step()
            if number != 1:
                optimizer.zero_grad()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_an_error_of_the_step_leaves_no_trace_either() -> None:
    class Fails(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            torch.rand(3)
            raise RuntimeError("mine")

    model = llama(LAST)
    optimizer = Fails(model.model.layers[2].parameters(), lr=0.1, momentum=0.9)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"):
        doctor((model, optimizer), LLAMA.batch())
    assert torch.equal(torch.get_rng_state(), state) and not model.training and not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Counting(Trainer):
    """Notes what it sees, as the trainers of TRL do."""

    tokens = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.tokens += inputs["input_ids"].numel()
        self._metrics.setdefault("train", []).append(1)
        return super().compute_loss(model, inputs, *args, **kwargs)

    _metrics: Any


def trainer_of(folder: Path, policy: Any = None) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.model(), SurgicalConfig(blocks=[0, 1, 2]))
    rows = [{key: value[at] for key, value in LLAMA.batch(size=8).items()} for at in range(8)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "warmup_steps": 2, "use_cpu": True}
    args = TrainingArguments(str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    optimizer: Any = surgical_optimizer(args, policy)
    trainer = Counting(model, args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)  # type: ignore[arg-type]
    trainer._metrics = {}
    return trainer


@pytest.mark.parametrize("policy", [None, policies.lisa(num_blocks=1, every=1)], ids=str)
def test_a_trainer_before_it_trains(tmp_path: Path, policy: Any) -> None:
    ends = []
    for is_seen in (True, False):
        trainer = trainer_of(tmp_path, policy)
        if is_seen:
            flags = [parameter.requires_grad for parameter in trainer.model.parameters()]  # type: ignore[union-attr]
            diagnosis = doctor(trainer)
            assert diagnosis.is_healthy, diagnosis
            assert trainer.optimizer is None and not trainer._metrics and not trainer.tokens  # type: ignore[attr-defined]
            assert flags == [parameter.requires_grad for parameter in trainer.model.parameters()]  # type: ignore[union-attr]
        trainer.train()
        ends.append(trainer.model.state_dict())  # type: ignore[union-attr]
        assert doctor(trainer, LLAMA.batch()).is_healthy  # and after
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_what_is_no_training_is_refused(tmp_path: Path) -> None:
    model = llama(LAST)
    with pytest.raises(SurgicalError, match="batch"):
        doctor((model, trained_by(model)))
    with pytest.raises(SurgicalError, match="LlamaForCausalLM"):
        doctor(model, LLAMA.batch())
    with pytest.raises(SurgicalError, match="int"):
        doctor((model, 3), LLAMA.batch())  # type: ignore[arg-type]
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = None
    with pytest.raises(SurgicalError, match="train_dataset"):
        doctor(trainer)
    with torch.device("meta"):
        empty = LLAMA.build()
    with pytest.raises(SurgicalError, match="meta"):
        doctor((empty, trained_by(empty)), LLAMA.batch())
