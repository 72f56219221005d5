"""What every policy must show; a new file in `policies/` is picked up by itself."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments, default_data_collator

from surgical_peft import SurgicalCallback, SurgicalConfig, SurgicalError, create_surgical_optimizer, policies
from surgical_peft.policies.policy import Policy, TrainingState
from tests.support import families
from tests.support.toys import Toy

STEPS_AN_EPOCH = 2
SHARED = {"policy", "gradient_norms"}  # files of `policies/` that are no policy


@dataclass(frozen=True)
class LoudestOnly(Policy):
    """A user's own: the unit with the largest gradient at the full rate, the others at `rest`."""

    rest: float = 0.25

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        sizes = {u.name: sum(float(p.grad.norm()) for p in u.parameters if p.grad is not None) for u in training.units}
        return {name: 1.0 if size == max(sizes.values()) else self.rest for name, size in sizes.items()}


@dataclass(frozen=True)
class AnyOne(Policy):
    """A user's own: one block at random, by a torch generator whose state is among the policy's."""

    hard: bool = True
    state_policy: str = "offload"

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        generator = torch.Generator()
        if "generator" in training.state:
            generator.set_state(training.state["generator"])
        drawn = training.names[int(torch.randint(len(training.names), (1,), generator=generator))]
        training.state["generator"] = generator.get_state()
        return training.only([drawn])


# What a policy cannot be called without, and cadences that come round within a few steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "auto_snr": {"threshold": 0.5},
    "badam": {"every": 2},
    "grass": {"num_blocks": 1, "every": 1, "refresh": 2, "num_batches": 1},
    "lisa": {"num_blocks": 1, "every": 1},
    "lp_ft": {"epochs": 1},
    "misa": {"share": 0.5, "every": 2},
    "progressive_freezing": {"interval": 2},
    "sample_by_score": {"num_blocks": 1, "every": 1},
    "stages": {"plan": [{"blocks": [0], "steps": 1}, {"blocks": "all", "steps": 2}, {"blocks": [-1]}]},
    "two_stage": {"counts": [5, 3, 1], "epochs": 1},
}
MORE: dict[str, Callable[[], Policy]] = {
    "auto_rgn-epoch": lambda: policies.auto_rgn(every="epoch", num_batches=2),
    "auto_rgn-every-2": lambda: policies.auto_rgn(every=2, num_batches=1, granularity="tensor"),
    "auto_snr-soft-blocks": lambda: policies.auto_snr(0.5, granularity="block", hard=False),
    "bvg_ls-masked": lambda: policies.bvg_ls(momentum="masked"),
    "gradual_unfreezing-up": lambda: policies.gradual_unfreezing("first_to_last", every=1),
    "lisa-soft": lambda: policies.lisa(num_blocks=1, every=1, hard=False),
    "badam-keep": lambda: policies.badam(every=1, order="descending", state_policy="keep"),
    "LoudestOnly": LoudestOnly,
    "AnyOne": AnyOne,
}


def maker(name: str) -> Callable[[], Policy]:
    return lambda: getattr(policies, name)(**SETTINGS.get(name, {}))


MAKERS = {**{name: maker(name) for name in policies.__all__}, **MORE}
FAMILIES = [
    families.FAMILIES[name] for name in ("vit", "qwen3_moe", "t5")
]  # experts without a gradient; two stacks and no head
CASES = [
    (name, toy)
    for name in MAKERS
    for toy in FAMILIES
    if (name not in MORE or toy.name != "t5")  # for other settings of the same
    and (name not in ("lp_ft", "two_stage") or "head" in toy.blocks)
    and (name != "two_stage" or toy.name == "vit")  # its loss is for classes
    and (name != "stages" or toy.name != "t5")  # whose blocks have other names
]
every_case = pytest.mark.parametrize(("name", "toy"), CASES, ids=[f"{name}-{toy.name}" for name, toy in CASES])
every_policy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@dataclass
class Loop:
    """A training loop that tells `SurgicalCallback` what Trainer tells it."""

    toy: Toy
    model: PeftModel
    optimizer: torch.optim.Optimizer
    folder: Path
    step: int = 0

    @classmethod
    def start(cls, toy: Toy, policy: Policy, folder: Path) -> Loop:
        blocks = [toy.first, toy.last, *(["head"] if "head" in toy.blocks else [])]
        model = get_peft_model(toy.model(), SurgicalConfig(blocks=blocks)).train()
        optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, policy=policy)
        return cls(toy, model, optimizer, folder)

    def run(self, steps: int, each: Callable[[], None] = lambda: None) -> list[list[float]]:
        """Trains, and gives the factors used at each step; `each` is called before every optimizer step."""
        args = TrainingArguments(str(self.folder), report_to="none", use_cpu=True, per_device_train_batch_size=4)
        batch = self.toy.batch(size=8)
        data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
        loader = DataLoader(data, batch_size=4, collate_fn=default_data_collator)  # type: ignore[arg-type]
        callback, control = SurgicalCallback(), TrainerControl()
        given = {"model": self.model, "optimizer": self.optimizer, "train_dataloader": loader}
        factors = []
        for at in range(self.step, self.step + steps):
            length = {"max_steps": 100, "num_train_epochs": 50}
            state = TrainerState(global_step=at, epoch=at / STEPS_AN_EPOCH, train_batch_size=4, **length)
            if at == self.step:
                callback.on_train_begin(args, state, control, **given)
            if at % STEPS_AN_EPOCH == 0 or at == self.step:
                callback.on_epoch_begin(args, state, control, **given)
            callback.on_step_begin(args, state, control, **given)
            torch.manual_seed(at)  # dropout
            self.model.zero_grad()
            self.model(**self.toy.batch(at)).loss.backward()
            each()
            drawn = torch.get_rng_state(), random.getstate()
            self.optimizer.step()
            assert torch.equal(drawn[0], torch.get_rng_state())
            assert drawn[1] == random.getstate()
            factors.append(list(self.optimizer.block_rates.used.values()))  # type: ignore[attr-defined]
        self.step += steps
        return factors


def through_a_file(value: object) -> dict:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_file_is_a_policy_and_every_policy_a_file() -> None:
    """A name that is not a file's is a preset in the file of another: `auto_rgn_paper`, `discriminative`."""
    files = {path.stem for path in Path(policies.__file__).parent.glob("*.py")} - {"__init__", *SHARED}
    assert files <= set(policies.__all__)
    homes = {name: getattr(policies, name).__module__ for name in policies.__all__}
    assert {home.rpartition(".")[2] for home in homes.values()} == files
    assert {name for name, _ in CASES} == set(MAKERS)
    assert not SETTINGS.keys() - homes.keys()


@every_case
def test_a_step_moves_what_has_a_rate_and_nothing_else(name: str, toy: Toy, tmp_path: Path) -> None:
    loop = Loop.start(toy, MAKERS[name](), tmp_path)
    start = {key: p.detach().clone() for key, p in loop.model.named_parameters()}
    candidates = {key for key, p in loop.model.named_parameters() if any(p is q for q in trained(loop))}
    rates = [group["lr"] for group in loop.optimizer.param_groups]
    assert all(rate > 0 for rate in rates)
    for _ in range(6):
        before = {id(p): p.detach().clone() for p in trained(loop)}
        policy = loop.optimizer.block_rates.policy  # type: ignore[attr-defined]

        def look(policy: Policy = policy) -> None:
            """Before the step: a hard mask left no gradient and, where it is to be dropped, no state."""
            for group in loop.optimizer.param_groups if policy.hard else []:
                for p in group["params"]:
                    assert p.requires_grad == (group["lr_multiplier"] > 0)
                    assert p.requires_grad or p.grad is None
                    assert p.requires_grad or policy.state_policy != "reset" or p not in loop.optimizer.state

        factors = loop.run(1, look)[0]
        used = loop.optimizer.block_rates.used  # type: ignore[attr-defined]
        assert all(0 <= factor < float("inf") for factor in factors)
        assert max(factors) > 0
        assert [group["lr"] for group in loop.optimizer.param_groups] == rates
        moved = {group["unit"] for group in loop.optimizer.param_groups for p in group["params"]
                 if not torch.equal(p, before[id(p)])}  # fmt: skip
        assert moved
        assert moved <= {unit for unit, factor in used.items() if factor > 0}
    for key, p in loop.model.named_parameters():
        assert torch.isfinite(p).all()
        assert key in candidates or torch.equal(p, start[key])
    loop.optimizer.block_rates.release()  # type: ignore[attr-defined]
    assert all(p.requires_grad for p in trained(loop))


def trained(loop: Loop) -> list[torch.nn.Parameter]:
    return [p for group in loop.optimizer.param_groups for p in group["params"]]


@every_case
def test_state_through_a_file_continues_bitwise(name: str, toy: Toy, tmp_path: Path) -> None:
    one = Loop.start(toy, MAKERS[name](), tmp_path / "one")
    one.run(3)
    weights, state = through_a_file((one.model.state_dict(), one.optimizer.state_dict()))
    factors = one.run(4)

    other = Loop.start(toy, MAKERS[name](), tmp_path / "other")
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(state)
    other.step = 3
    assert other.run(4) == factors
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    assert all(torch.equal(p, q) and p.requires_grad == q.requires_grad for (_, p), (_, q) in pairs)


@every_policy
def test_two_of_the_same_settings_are_one_policy(make: Callable[[], Policy]) -> None:
    """A checkpoint knows its policy by this text, so it must not hold addresses."""
    assert make() == make()
    assert str(make()) == str(make())
    assert " at 0x" not in str(make())


@every_policy
def test_a_checkpoint_of_another_policy_is_refused_by_both_names(make: Callable[[], Policy]) -> None:
    def optimizer(policy: Policy) -> torch.optim.Optimizer:
        model = get_peft_model(FAMILIES[0].model(), SurgicalConfig(blocks=[0, -1, "head"]))
        return create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=policy)

    saved, other = optimizer(make()).state_dict(), policies.static({0: 0.125})
    with pytest.raises(SurgicalError) as refused:
        optimizer(other).load_state_dict(saved)
    assert str(make()) in str(refused.value)
    assert str(other) in str(refused.value)


@pytest.mark.parametrize("name", policies.__all__)
def test_docstring_has_source_and_example(name: str) -> None:
    text = getattr(policies, name).__doc__
    assert "Source: " in text or text.startswith("Constant")
    assert "Example:\n        >>> " in text


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() | {"bvg_ls", "gradual_unfreezing", "auto_rgn_paper"}))
def test_a_model_with_nothing_to_train_is_refused(name: str, vit: Toy) -> None:
    model = vit.model().requires_grad_(False)
    with pytest.raises(SurgicalError, match="nothing to train"):
        create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, policy=MAKERS[name]())


@pytest.mark.parametrize(("name", "make"), MAKERS.items(), ids=MAKERS)
def test_deepspeed_is_for_constant_factors(
    name: str, make: Callable[[], Policy], vit: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("surgical_peft.scoring.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("surgical_peft.scoring.distributed.AcceleratorState", lambda: state)
    model, policy = vit.model(), make()
    if name in ("discriminative", "layer_decay", "static"):
        create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policy)
        return
    with pytest.raises(SurgicalError, match=r"DeepSpeed.*layer_decay\(\).*FSDP"):
        create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policy)
