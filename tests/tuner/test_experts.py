"""Single experts: only they move, only they are saved, whatever the optimizer, the adapter or the precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from surgical_peft import (
    BlockMap,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    export_to_peft,
    policies,
    score_blocks,
)
from surgical_peft.blocks.unwrap import bare_parameter_name, idle_parameters
from surgical_peft.diagnosis.doctor import doctor
from surgical_peft.export.emit import emit
from surgical_peft.export.export import export
from surgical_peft.export.patch import apply_patch
from surgical_peft.export.targets import Choice
from surgical_peft.tuner.tensors.row_names import pick, split_row, tensor_of, with_rows
from tests.support.mixtures import MIXTURES
from tests.support.toys import Toy
from tests.support.wrapping import logits, nudge, trainable, weights

QWEN = MIXTURES["qwen3_moe"]
EXPERTS = "model.layers.1.mlp.experts"


def config(*experts: str, blocks: Any = ("1",), **settings: Any) -> SurgicalConfig:
    return SurgicalConfig(blocks=list(blocks), target_modules=list(experts or ["experts[3]"]), **settings)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they stand, under the base model's own names."""
    named = model.named_parameters()
    return {bare_parameter_name(name): p.detach().clone() for name, p in named if "surgical_" not in name}


def moved_experts(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, list[int]]:
    """For each weight that has changed the rows of it that have."""
    changed = {name: tensor for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    return {
        name: [at for at, row in enumerate(tensor) if not torch.equal(row, after[name][at])]
        for name, tensor in changed.items()
    }


def train(model: nn.Module, toy: Toy, steps: int = 2, lr: float = 1e-2) -> nn.Module:
    """By an optimizer that was handed everything, with momentum and decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        model(**toy.batch(step)).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", list(MIXTURES))
def test_only_the_chosen_experts_move_and_only_they_are_in_the_file(name: str, tmp_path: Path) -> None:
    toy = MIXTURES[name]
    base = toy.model()
    before = state_of(base)
    model = get_peft_model(base, config("experts[1]", "experts[3]", blocks=[toy.last]))
    after = state_of(train(model, toy))
    moved = moved_experts(before, after)
    assert moved
    if name == "nllb_moe":
        assert {path.split(".experts.")[1].split(".")[0] for path in moved} <= {"expert_1", "expert_3"}
    else:
        assert set(map(tuple, moved.values())) == {(1, 3)}
        assert all(".experts." in path for path in moved)
    model.save_pretrained(tmp_path)
    saved = weights(tmp_path)
    assert all("[1]" in key or "[3]" in key or "expert_" in key for key in saved)
    assert {tensor_of(key.removeprefix("base_model.model.")) for key in saved} >= set(moved)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    fresh = PeftModel.from_pretrained(toy.model(), tmp_path)
    assert torch.equal(logits(fresh.eval(), toy.batch()), logits(model.eval(), toy.batch()))


def test_the_code_in_the_card_applies_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nudge(get_peft_model(QWEN.model(), config("experts[0]", "router")))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = next(part for part in card.split("```python\n") if "load_file" in part).partition("```")[0]
    lines = [line for line in code.splitlines() if "from_pretrained" not in line and "transformers" not in line]
    monkeypatch.chdir(tmp_path)
    plain = QWEN.model()
    exec("\n".join(lines), {"base_model": plain})
    assert torch.equal(logits(plain, QWEN.batch()), logits(model, QWEN.batch()))
    assert "--format merged" in card


@pytest.mark.parametrize("kind", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_expert_gets_the_gradient_that_it_has_in_full_training(kind: str, checkpointed: bool) -> None:
    whole, base = QWEN.model(), QWEN.model()
    for model in (whole, base):
        model.set_experts_implementation(kind)  # type: ignore[operator]
    whole(**QWEN.batch()).loss.backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    model = get_peft_model(base, config("experts[1:3]", blocks=["0", "1"]))
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.train()
    model(**QWEN.batch()).loss.backward()
    trained = {bare_parameter_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, pick(expected, name))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("keep_base", ["device", "cpu", "none"])
def test_base_and_adapter_stand_in_turn(keep_base: str) -> None:
    base = logits(QWEN.model(), QWEN.batch())
    model = nudge(get_peft_model(QWEN.model(), config(keep_base=keep_base)))
    tuned = logits(model, QWEN.batch())
    assert not torch.equal(base, tuned)
    if keep_base == "none":
        with pytest.raises(SurgicalError, match="keep_base"), model.disable_adapter():
            pass
        assert torch.equal(logits(model.merge_and_unload(), QWEN.batch()), tuned)
        return
    with model.disable_adapter():
        assert torch.equal(logits(model, QWEN.batch()), base)
    assert torch.equal(logits(model, QWEN.batch()), tuned)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged, QWEN.batch()), tuned)
    plain = model.unload()
    assert torch.equal(logits(plain, QWEN.batch()), base)
    for bare in (merged, plain):
        assert bare.state_dict().keys() == QWEN.model().state_dict().keys()
        experts = bare.get_submodule(EXPERTS)
        assert not experts._forward_hooks and not experts._forward_pre_hooks and not experts._modules.get("surgical_")
        assert experts.down_proj.requires_grad


def test_adapters_of_one_expert_and_of_another() -> None:
    base = state_of(QWEN.model())
    model = get_peft_model(QWEN.model(), config("experts[3]"), "a")
    nudge(model, 1)
    model.add_adapter("b", config("experts[3]", "experts[0]"))
    model.add_adapter("c", config("experts[1]"))
    model.set_adapter("b")
    nudge(model, 2)
    b = state_of(model)
    assert set(map(tuple, moved_experts(base, b).values())) == {(0, 3)}
    model.set_adapter("a")
    a = state_of(model)
    assert set(map(tuple, moved_experts(base, a).values())) == {(3,)}
    assert [name for name in trainable(model) if "[3]" not in name] == []
    model.base_model.set_adapter(["a", "c"])
    assert {split_row(name)[1] for name in trainable(model)} == {1, 3}  # type: ignore[index]
    nudge(model, 3)
    assert set(map(tuple, moved_experts(base, state_of(model)).values())) == {(1, 3)}
    with pytest.raises(SurgicalError, match="'a', 'b'"):
        model.base_model.set_adapter(["a", "b"])
    model.set_adapter("b")
    assert moved_experts(b, state_of(model)) == {}
    model.delete_adapter("a")
    model.delete_adapter("c")
    assert moved_experts(b, state_of(model)) == {}
    model.delete_adapter("b")
    assert moved_experts(base, state_of(model)) == {}
    assert not model.base_model.model.get_submodule(EXPERTS)._forward_hooks


def test_an_adapter_saved_among_others_is_loaded_beside_others(tmp_path: Path) -> None:
    model = get_peft_model(QWEN.model(), config("experts[3]"), "a")
    nudge(model, 1)
    model.add_adapter("b", config("experts[2]"))
    model.save_pretrained(tmp_path)  # while b is parked
    assert all("[2]" in key for key in weights(tmp_path / "b"))
    other = PeftModel.from_pretrained(QWEN.model(), tmp_path / "b", adapter_name="b", low_cpu_mem_usage=True)
    other.load_adapter(str(tmp_path / "a"), "a", low_cpu_mem_usage=True)
    other.set_adapter("a")
    assert torch.equal(logits(other.eval(), QWEN.batch()), logits(model.eval(), QWEN.batch()))


def test_a_graph_holds_while_the_adapter_is_disabled_and_no_other_may_stand_in_its_backward_pass() -> None:
    model = get_peft_model(QWEN.model(), config())
    loss = model(**QWEN.batch()).loss
    with model.disable_adapter(), torch.no_grad():  # DPO's reference
        model(**QWEN.batch())
    loss.backward()
    alone = get_peft_model(QWEN.model(), config())
    alone(**QWEN.batch()).loss.backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    loss = model(**QWEN.batch()).loss
    with model.disable_adapter(), pytest.raises(SurgicalError, match="backward"):
        loss.backward()


def test_a_model_that_is_moved_or_copied_trains_on() -> None:
    model = get_peft_model(QWEN.model(), config())
    for other in (copy.deepcopy(model), model.bfloat16()):
        before = state_of(other)
        after = state_of(train(other, QWEN, 2))
        assert set(map(tuple, moved_experts(before, after).values())) == {(3,)}
        with other.disable_adapter():
            assert set(map(tuple, moved_experts(after, state_of(other)).values())) == {(3,)}


def test_small_steps_on_bfloat16_experts_add_up_in_masters() -> None:
    model = get_peft_model(QWEN.model().bfloat16(), config())
    before = state_of(model)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-5, weight_decay=0.1)
    for _ in range(3):
        model(**QWEN.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    masters = [state["master_weight"] for state in optimizer.state.values()]
    assert len(masters) == 2 and all(master.dtype == torch.float32 for master in masters)
    rows = [pick(before, bare_parameter_name(name)).float() for name in trainable(model)]
    assert all(not torch.equal(*pair) for pair in zip(masters, rows, strict=True))
    assert set(map(tuple, moved_experts(before, state_of(model)).values())) <= {(3,)}


def test_what_trains_is_told_by_the_map_the_counts_and_doctor() -> None:
    model = get_peft_model(QWEN.model(), config("experts[3]", "experts[1]"))
    blocks = BlockMap.find(model)
    assert {blocks.block_of(name) for name in trainable(model)} == {"1"}
    assert not {id(p) for p in model.parameters() if p.requires_grad} & idle_parameters(model)
    assert model.get_nb_trainable_parameters()[0] == 2 * (16 * 8 + 16 * 16)
    assert not any("[" in key for key in model.state_dict() if "__base__" not in key)
    diagnosis = doctor((model, create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3)), QWEN.batch())
    assert diagnosis.is_healthy, diagnosis
    assert [row.name for row in diagnosis.tensors if row.trainable and "experts.down_proj[3]" in row.name]


def test_scores_of_a_wrapped_model_are_those_of_the_bare_one() -> None:
    bare, wrapped = (
        score_blocks(model, [QWEN.batch()], criterion="grad_norm", num_batches=1)
        for model in (QWEN.model(), get_peft_model(QWEN.model(), config()))
    )
    assert wrapped.values == pytest.approx(bare.values) and wrapped.sizes == bare.sizes


def test_training_resumes_exactly_under_a_policy_that_freezes(tmp_path: Path) -> None:
    def steps(model: nn.Module, numbers: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
        policy = policies.lisa(num_blocks=1, every=1)
        optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, policy=policy)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in numbers:
            model(**QWEN.batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()

    straight = get_peft_model(QWEN.model(), config(blocks=["0", "1"]))
    steps(straight, range(6))
    model = get_peft_model(QWEN.model(), config(blocks=["0", "1"]))
    state = steps(model, range(3))
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(QWEN.model(), tmp_path, is_trainable=True)
    steps(resumed, range(3, 6), state)
    moved = moved_experts(state_of(QWEN.model()), state_of(straight))
    assert len(moved) == 4 and set(map(tuple, moved.values())) == {(3,)}
    assert moved_experts(state_of(straight), state_of(resumed)) == {}


def test_rows_of_a_batch_go_through_experts_of_their_adapters() -> None:
    model = get_peft_model(QWEN.model(), config(), "a")
    model.add_adapter("b", config("experts[1]", "experts[3]"))
    nudge(model, 1)
    model.set_adapter("b")
    nudge(model, 2)
    model.eval()
    batch = {"input_ids": QWEN.batch()["input_ids"]}
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model, batch)
    with model.disable_adapter():
        alone["__base__"] = logits(model, batch)
    names = ["b", "a", "__base__", "b"]
    mixed = logits(model, {**batch, "adapter_names": names})  # type: ignore[dict-item]
    torch.testing.assert_close(mixed, torch.stack([alone[name][at] for at, name in enumerate(names)]))


@pytest.mark.parametrize("format", ["merged", "delta", "patch"])
def test_an_export_holds_the_experts(format: str, tmp_path: Path) -> None:
    QWEN.model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = nudge(get_peft_model(base, config(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", format)
    if format == "delta":
        export(tmp_path / "out", tmp_path / "again", "adapter")
        one, other = weights(tmp_path / "adapter"), weights(tmp_path / "again")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    else:
        if format == "patch":
            apply_patch(tmp_path / "out" / "patch", tmp_path / "base")
        folder = tmp_path / ("base" if format == "patch" else "out")
        merged = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(merged, QWEN.batch()), logits(model, QWEN.batch()))


def test_what_cannot_hold_single_experts_refuses_them(tmp_path: Path) -> None:
    nudge(get_peft_model(QWEN.model(), config())).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SurgicalError, match="merged or delta"):
        export_to_peft(tmp_path / "adapter", tmp_path / "out", base_model=QWEN.model())
    with pytest.raises(SurgicalError, match="merged or delta"):
        export(tmp_path / "adapter", tmp_path / "out", "lora", base_model=QWEN.model(), rank=2)
    with pytest.raises(SurgicalError, match="experts"):
        emit(Choice.of(QWEN.model(), "base", config()), "trl")


@pytest.mark.parametrize(
    ("experts", "why"),
    [
        ("experts[4]", "0 to 3"),
        ("experts[-5]", "0 to 3"),
        ("experts[2:9]", "0 to 3"),
        ("experts[2:2]", "selects no expert"),
        ("experts[x]", "0 to 3"),
        ("experts[]", "0 to 3"),
        ("mlp[0]", "only experts are numbered"),
        ("experts.q", "only attention has projections"),
    ],
)
def test_an_expert_that_does_not_exist_is_refused_with_those_that_do(experts: str, why: str) -> None:
    model = QWEN.model()
    before = model.state_dict().keys()
    with pytest.raises(SurgicalError, match=why):
        get_peft_model(model, config(experts))
    assert model.state_dict().keys() == before


def test_weights_that_are_not_of_one_expert_each_are_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 16))
            self.scale = nn.Parameter(torch.randn(16))

    model = QWEN.model()
    model.set_submodule(EXPERTS, Shared())
    with pytest.raises(SurgicalError, match="'experts'"):
        get_peft_model(model, config())


def test_one_weight_is_tuned_whole_or_by_its_experts() -> None:
    model = get_peft_model(QWEN.model(), config("experts[3]"), "rows")
    with pytest.raises(SurgicalError, match="single experts"):
        model.add_adapter("whole", config("experts"))
    model = get_peft_model(QWEN.model(), config("experts"), "whole")
    with pytest.raises(SurgicalError, match="whole"):
        model.add_adapter("rows", config("experts[3]"))
    both = get_peft_model(QWEN.model(), config("experts[3]", "experts"))  # one choice: the whole holds the expert
    assert not any("[" in name for name in trainable(both))


def test_packed_experts_are_refused() -> None:
    model = QWEN.model()
    experts: Any = model.get_submodule(EXPERTS)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(SurgicalError, match="down_proj"):
        get_peft_model(model, config())


def test_a_replica_is_refused() -> None:
    model = get_peft_model(QWEN.model(), config())
    experts = model.get_base_model().get_submodule(EXPERTS)
    replica = experts._replicate_for_data_parallel()  # type: ignore[operator]
    with pytest.raises(SurgicalError, match="DataParallel"):
        replica(torch.zeros(2, 16), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))


def test_rows_that_something_else_has_replaced_are_refused() -> None:
    model = get_peft_model(QWEN.model(), config())
    experts: Any = model.get_base_model().get_submodule(EXPERTS)
    rows = experts.surgical_._modules["standing"]._parameters
    rows["down_proj[3]"] = nn.Parameter(rows["down_proj[3]"].detach().clone())  # as FSDP2 does
    with pytest.raises(SurgicalError, match="FSDP"):
        model(**QWEN.batch())


def test_names_of_rows() -> None:
    tensors = {"up": torch.arange(8.0).reshape(4, 2)}
    assert split_row("a.up[3]") == ("a.up", 3) and split_row("a.up") is None
    assert with_rows(tensors, ["up[1]", "up[9]", "down[0]"]).keys() == {"up", "up[1]"}
    assert torch.equal(pick(tensors, "up[1]"), tensors["up"][1])
