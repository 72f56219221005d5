"""16-bit weights step as float32 ones do, and round to what the model runs on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from surgical_peft import SurgicalConfig, SurgicalError, create_surgical_optimizer, policies, surgical_optimizer
from surgical_peft.precision import master_weights
from tests.support.precision import RoundsAtRandom, step, trained, wrapped
from tests.support.toys import TOYS

BF16, FP16 = torch.bfloat16, torch.float16
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {}),  # makes its state with the optimizer, not at the first step
    "adafactor": (Adafactor, {"relative_step": False, "scale_parameter": False}),
}
if find_spec("bitsandbytes") is not None:
    from bitsandbytes.optim import AdamW8bit

    OPTIMIZERS["8 bit"] = AdamW8bit, {"min_8bit_size": 16}  # loads its state in a way of its own


def masters(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    return {weight: state[master_weights.KEY] for weight, state in optimizer.state.items()}


class Reference:
    """The rule itself: a float32 copy of each weight, stepped on by the same optimizer with the same gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, cls: Any, **kwargs: Any) -> None:
        self.groups = [
            {**group, "params": [nn.Parameter(weight.detach().float()) for weight in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.copies = [copied for group in self.groups for copied in group["params"]]
        self.optimizer = cls(self.groups, **kwargs)

    def step(self) -> None:
        for weight, copied in zip(self.weights, self.copies, strict=True):
            copied.grad = None if weight.grad is None else weight.grad.float()
        self.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
def test_any_optimizer_steps_as_on_a_float32_copy(name: str, dtype: torch.dtype) -> None:
    cls, kwargs = OPTIMIZERS[name]
    model = wrapped(dtype)
    optimizer = create_surgical_optimizer(model, cls, lr=1e-3, weight_decay=0.1, **kwargs)
    reference = Reference(optimizer, cls, lr=1e-3, **kwargs)
    for seed in range(4):
        step(model, optimizer, seed)
        reference.step()
    for weight, copied in zip(reference.weights, reference.copies, strict=True):
        assert torch.equal(masters(optimizer)[weight], copied)
        assert weight.dtype == dtype
        assert torch.equal(weight, copied.to(dtype))


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2", "t5", "qwen3_moe"])
def test_the_norms_of_every_toy_move(family: str) -> None:
    moved = {}
    for on in (True, False):
        model = get_peft_model(TOYS[family].model().to(BF16), SurgicalConfig(blocks="all", target_modules="all-norm"))
        optimizer = create_surgical_optimizer(model.train(), torch.optim.AdamW, lr=3e-4, master_weights=on)
        before = [weight.detach().clone() for weight in trained(model)]
        batch = {k: v.to(BF16) if v.is_floating_point() else v for k, v in TOYS[family].batch().items()}
        for _ in range(12):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        large = [(b.abs() > 0.5) for b in before]  # smaller ones have steps of their own
        pairs = list(zip(trained(model), before, large, strict=True))
        moved[on] = sum(int(((a != b) & where).sum()) for a, b, where in pairs) / sum(int(w.sum()) for w in large)
    assert moved[True] > 0.2
    assert moved[False] < 0.1


def test_gradients_are_clipped_and_freed_as_without_masters() -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1)
    before = [weight.detach().float() for weight in trained(model)]
    model(**TOYS["llama"].batch()).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = [masters(optimizer)[weight] - value for weight, value in zip(trained(model), before, strict=True)]
    assert torch.cat([each.flatten() for each in moved]).norm() == pytest.approx(1e-4, rel=2e-2)
    assert all(weight.grad.dtype == BF16 for weight in trained(model))
    assert all(master.grad is None for master in masters(optimizer).values())
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in trained(model))


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_by_bit(name: str) -> None:
    cls, kwargs = OPTIMIZERS[name]
    model = wrapped()
    optimizer = create_surgical_optimizer(model, cls, lr=1e-4, **kwargs)
    for seed in range(3):
        step(model, optimizer, seed)
    again = wrapped()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = create_surgical_optimizer(again, cls, lr=1e-4, **kwargs)
    resumed.load_state_dict(saved_and_loaded(optimizer))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    for one, other in zip(trained(model), trained(again), strict=True):
        assert torch.equal(one, other)
        mine, theirs = optimizer.state[one], resumed.state[other]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert not isinstance(value, Tensor) or torch.equal(value, theirs[key]), key


def test_a_state_from_before_there_were_masters_is_taken() -> None:
    model = wrapped()
    old = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, master_weights=False)
    step(model, old)
    new = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    new.load_state_dict(saved_and_loaded(old))
    step(model, new)
    assert all(state["exp_avg"].dtype == torch.float32 and state["step"] == 2 for state in new.state.values())
    assert len(masters(new)) == len(trained(model))


def test_a_state_that_does_not_fit_leaves_the_optimizer_as_it_was() -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    other = create_surgical_optimizer(wrapped(blocks=[0]), torch.optim.AdamW, lr=1e-3)
    with pytest.raises(SurgicalError):
        optimizer.load_state_dict(other.state_dict())
    assert {id(w) for g in optimizer.param_groups for w in g["params"]} == {id(w) for w in trained(model)}


def _copied(weight: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def _through_data(weight: nn.Parameter, value: Tensor) -> None:
    weight.data.copy_(value)


def _new_data(weight: nn.Parameter, value: Tensor) -> None:
    weight.data = value.clone()


@pytest.mark.parametrize("change", [_copied, _through_data, _new_data])
def test_a_weight_that_something_else_sets_stays_set(change: Any) -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-4)
    step(model, optimizer)
    kept = {weight: masters(optimizer)[weight].clone() for weight in trained(model)}
    changed, *others = trained(model)
    value = torch.full_like(changed, 0.5)
    change(changed, value)
    step(model, optimizer)
    assert torch.equal(changed, value)
    assert torch.allclose(masters(optimizer)[changed], value.float(), atol=1e-3)
    for weight in others:  # what nobody changed keeps what is below its precision
        assert torch.allclose(masters(optimizer)[weight], kept[weight], atol=1e-3)
        assert not torch.equal(masters(optimizer)[weight], weight.float())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_step_with_a_closure_sees_the_weights_and_their_gradients(cls: Any) -> None:
    matrix = {"blocks": [0], "target_modules": ["o_proj"]}
    model = wrapped(**matrix)
    optimizer = create_surgical_optimizer(model, cls, lr=0.1)
    losses = []

    def closure() -> Tensor:
        assert [w for g in optimizer.param_groups for w in g["params"]] == trained(model)
        optimizer.zero_grad()
        loss = model(**TOYS["llama"].batch()).loss
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(5):
        optimizer.step(closure)
    (weight,) = trained(model)
    assert losses[-1] < losses[0]
    assert torch.equal(weight, masters(optimizer)[weight].to(BF16))


def test_a_step_that_raised_leaves_the_weights_in_their_places() -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    step(model, optimizer)
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        step(model, optimizer)
    assert len(masters(optimizer)) == len(trained(model))
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in trained(model))
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    step(model, optimizer)
    assert {id(w) for g in optimizer.param_groups for w in g["params"]} == {id(w) for w in trained(model)}


@pytest.mark.parametrize("state_policy", ["keep", "reset", "offload"])
def test_masks_drop_or_move_moments_and_keep_masters(state_policy: str) -> None:
    model = wrapped(blocks=[0, 1, 2])
    policy = policies.badam(every=1, always=[], order="ascending", state_policy=state_policy)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policy)
    for seed in range(2):
        frozen = {weight: weight.detach().clone() for weight in model.parameters() if not weight.requires_grad}
        step(model, optimizer, seed)
        assert all(torch.equal(weight, value) for weight, value in frozen.items())
    have = {group["block"] for group in optimizer.param_groups for w in group["params"] if w in masters(optimizer)}
    assert have == {"0", "1"}  # the third block's turn has come
    assert all(("exp_avg" in state) == (state_policy != "reset") for state in optimizer.state.values())


@pytest.mark.parametrize("policy", [policies.badam(every=4), policies.lisa(1, every=4, state_policy="reset")])
def test_small_steps_add_up_over_the_turns_of_a_block(policy: Any) -> None:
    moved = []
    for dtype in (torch.float32, BF16):
        model = wrapped(dtype, target_modules="all-norm")
        optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=2e-3, policy=policy)
        before = [weight.detach().clone().float() for group in optimizer.param_groups for weight in group["params"]]
        for seed in range(48):
            step(model, optimizer, seed % 4)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        after = [optimizer.state[weight].get(master_weights.KEY, weight) for weight in weights]
        moved.append(sum(float((a - b).abs().sum()) for a, b in zip(after, before, strict=True)))
    assert moved[1] == pytest.approx(moved[0], rel=0.1)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(through: Any, dtype: torch.dtype) -> None:
    model = wrapped(dtype)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    step(model, optimizer)
    again, other = through((model, optimizer))
    assert isinstance(other, torch.optim.AdamW)
    for seed in range(1, 3):
        step(model, optimizer, seed)
        step(again, other, seed)
    for one, copied in zip(trained(model), trained(again), strict=True):
        assert torch.equal(one, copied)
        assert optimizer.state[one].keys() == other.state[copied].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[copied][key])
    through(optimizer).step()  # alone: on weights of its own
    through(other).step()


@pytest.mark.parametrize("master_weights", [True, False])
def test_no_copy_leaves_its_policy_behind(master_weights: bool) -> None:
    model = wrapped()
    for policy in (policies.layer_decay(0.5), policies.lisa(1)):
        optimizer = create_surgical_optimizer(
            model, torch.optim.SGD, lr=0.1, policy=policy, master_weights=master_weights
        )
        for through in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(SurgicalError, match="load_state_dict"):
                through(optimizer)


@pytest.mark.parametrize(
    "policy", [None, policies.layer_decay(0.5), policies.badam(every=1), policies.auto_rgn("step")]
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_a_group_that_is_added_later_is_trained_at_its_own_rate(policy: Any, dtype: torch.dtype) -> None:
    model = wrapped(dtype, blocks=[1, 2])
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policy)
    late = list(model.get_base_model().model.layers[0].requires_grad_(True).parameters())
    optimizer.add_param_group({"params": late, "lr": 0.25})
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[-1]["lr"]))
    kept = [weight.detach().float().clone() for weight in late]
    for seed in range(2):
        step(model, optimizer, seed)
        kept = [value - 0.25 * weight.grad.float() for value, weight in zip(kept, late, strict=True)]
    assert seen == [0.25, 0.25]
    for value, weight in zip(kept, late, strict=True):
        assert weight.requires_grad
        torch.testing.assert_close(optimizer.state[weight].get(master_weights.KEY, weight.detach()), value)
    if dtype == FP16:
        assert all(weight.grad.dtype == torch.float32 for weight in late)
    again = create_surgical_optimizer(wrapped(dtype, blocks=[1, 2]), torch.optim.SGD, lr=0.1, policy=policy)
    with pytest.raises(SurgicalError, match="added"):
        again.load_state_dict(optimizer.state_dict())


def test_a_model_that_is_cast_after_the_optimizer_was_made_gets_masters() -> None:
    model = wrapped(torch.float32)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    step(model, optimizer)
    model.to(BF16)
    step(model, optimizer)
    assert len(masters(optimizer)) == len(trained(model))


def test_float16_is_trained_with_a_scaler() -> None:
    model = wrapped(FP16)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=FP16):
            loss = model(**TOYS["llama"].batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    second = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-3)
    del optimizer
    gc.collect()
    step(model, second)  # the first one, gone, has not taken the float32 gradients along
    assert all(weight.grad.dtype == torch.float32 for weight in trained(model))
    del second
    gc.collect()
    assert all(weight.grad_dtype == FP16 for weight in trained(model))  # type: ignore[attr-defined]


class Counting(torch.optim.SGD):
    """Moves its weights when it is switched, as schedule-free optimizers do."""

    def eval(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(1e-4)


def test_what_an_optimizer_does_when_it_is_switched_happens_to_the_masters() -> None:
    model = wrapped()
    optimizer: Any = create_surgical_optimizer(model, Counting, lr=1e-6)
    step(model, optimizer)
    before = {weight: master.clone() for weight, master in masters(optimizer).items()}
    optimizer.eval()
    for weight, master in masters(optimizer).items():
        assert torch.equal(master, before[weight] + 1e-4)
        assert torch.equal(weight, master.to(BF16))


@pytest.mark.skipif("8 bit" not in OPTIMIZERS, reason="needs bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("by_module", [True, False])
def test_settings_of_single_weights_hold(by_module: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes knows the weights by their ids, or by their places in the groups, which here are ours."""
    from bitsandbytes.optim import GlobalOptimManager

    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    manager = GlobalOptimManager.get_instance()
    model = wrapped(dtype)
    cls, kwargs = OPTIMIZERS["8 bit"]
    layers = model.get_base_model().model.layers
    chosen, late = layers[1].mlp.up_proj, layers[2].mlp.up_proj
    manager.override_config(late.weight, "optim_bits", 32)
    manager.register_parameters(model.parameters())
    optimizer = create_surgical_optimizer(model, cls, lr=1e-3, **kwargs)
    if by_module:
        manager.register_module_override(chosen, "weight", {"optim_bits": 32})
    else:
        manager.override_config(chosen.weight, "optim_bits", 32)
    step(model, optimizer)
    large = {weight for weight in trained(model) if weight.numel() >= 16}
    whole = {weight for weight in large if optimizer.state[weight]["state1"].dtype == torch.float32}
    assert whole == {chosen.weight, late.weight}
    before = chosen.weight.detach().clone()
    manager.override_config(chosen.weight, "lr", 1e-30)
    step(model, optimizer)
    assert torch.equal(chosen.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_no_masters_where_none_are_needed_or_wanted(dtype: torch.dtype) -> None:
    model = wrapped(dtype)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, master_weights=dtype == torch.float32)
    step(model, optimizer)
    assert not any(master_weights.KEY in state for state in optimizer.state.values())


@pytest.mark.parametrize("on", [True, False])
def test_none_for_an_optimizer_that_rounds_stochastically(on: bool) -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, RoundsAtRandom, lr=1e-3, bf16_stochastic_round=on)
    step(model, optimizer)
    assert any(master_weights.KEY in state for state in optimizer.state.values()) != on


def test_only_what_is_16_bit_has_a_master() -> None:
    model = TOYS["llama"].model()
    layer = model.model.layers[0]
    layer.mlp.to(BF16)
    for module in (layer.mlp,):
        module.register_forward_pre_hook(lambda module, args: tuple(each.to(BF16) for each in args))
        module.register_forward_hook(lambda module, args, output: output.float())
    tuned = get_peft_model(model, SurgicalConfig(blocks=[0])).train()
    optimizer = create_surgical_optimizer(tuned, torch.optim.AdamW, lr=1e-3)
    step(tuned, optimizer)
    have = {weight for weight, state in optimizer.state.items() if master_weights.KEY in state}
    assert have == {weight for weight in trained(tuned) if weight.dtype == BF16}
    assert 0 < len(have) < len(trained(tuned))


def test_trainer_steps_on_masters_of_a_bfloat16_model(tmp_path: Any) -> None:
    batch = TOYS["llama"].batch(size=16)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    ends = {}
    for on in (True, False):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
        )
        model = wrapped()
        optimizer = surgical_optimizer(args, policies.layer_decay(0.9), master_weights=on)
        trainer = Trainer(model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
        trainer.train()
        ends[on] = sum(master_weights.KEY in state for state in trainer.optimizer.state.values())
    assert ends == {True: len(trained(model)), False: 0}


@pytest.mark.parametrize("lr", [None, "fast", "1e-3", 0, 0.0, -1e-3, float("nan"), float("inf"), True])
def test_a_rate_that_is_none_is_refused(lr: Any) -> None:
    with pytest.raises(SurgicalError, match="lr="):
        create_surgical_optimizer(wrapped(), torch.optim.AdamW, lr=lr)


@pytest.mark.parametrize("weight_decay", [None, "much", -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(weight_decay: Any) -> None:
    with pytest.raises(SurgicalError, match="weight_decay="):
        create_surgical_optimizer(wrapped(), torch.optim.AdamW, lr=1e-3, weight_decay=weight_decay)


def test_an_optimizer_that_takes_matrices_only_gets_them_or_is_refused() -> None:
    with pytest.raises(SurgicalError, match="target_modules"):
        create_surgical_optimizer(wrapped(), torch.optim.Muon, lr=1e-3)
    model = wrapped(blocks=[0], target_modules="all-linear")
    optimizer = create_surgical_optimizer(model, torch.optim.Muon, lr=1e-3)
    step(model, optimizer)
    assert len(masters(optimizer)) == len(trained(model)) == 7


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = TOYS["llama"].build()
    with pytest.raises(SurgicalError, match="meta"):
        create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)


def test_float16_under_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(SurgicalError, match="bfloat16"):
        create_surgical_optimizer(wrapped(FP16), torch.optim.AdamW, lr=1e-3)


def test_a_policy_that_forgets_moments_keeps_masters() -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-4)
    step(model, optimizer)
    before = masters(optimizer)
    master_weights.forget_moments(optimizer, list(optimizer.state))
    assert {weight: id(master) for weight, master in masters(optimizer).items()} == {
        w: id(m) for w, m in before.items()
    }
    step(model, optimizer)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_weight_that_has_only_a_master_is_saved_and_loaded() -> None:
    model = wrapped()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-4)
    step(model, optimizer)
    master_weights.forget_moments(optimizer, trained(model)[:3])
    resumed = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-4)
    resumed.load_state_dict(saved_and_loaded(optimizer))
    for weight, master in masters(optimizer).items():
        assert torch.equal(masters(resumed)[weight], master)
    assert len(masters(copy.deepcopy(optimizer))) == len(trained(model))
    step(model, resumed)
