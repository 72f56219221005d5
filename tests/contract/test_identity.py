"""A wrapped model is the same Python objects as before, runs the same code, and so does an unwrapped one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from surgical_peft import SurgicalConfig
from tests.support.families import FAMILIES
from tests.support.plain import PLAIN
from tests.support.toys import Toy
from tests.support.wrapping import logits, nudge, same

EVERY = FAMILIES | PLAIN


@pytest.fixture(params=list(EVERY))
def anyone(request: pytest.FixtureRequest) -> Toy:
    return EVERY[request.param]


def wrapped(family: Toy, base: nn.Module, **kwargs: Any) -> PeftModel:
    return get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last], **kwargs))


def objects(model: nn.Module) -> dict[str, Any]:
    """Every module, parameter and buffer by its name, as often as it stands there."""
    found: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for path, module in list(found.items()):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found[f"{path}.{name}" if path else name] = tensor
    return found


@pytest.mark.parametrize(
    ("name", "keep_base"),
    [(name, "device") for name in EVERY]
    + [(name, kept) for kept in ("cpu", "none") for name in ("t5", "resnet", "lone")],
)
def test_wrapping_replaces_nothing(name: str, keep_base: str) -> None:
    anyone = EVERY[name]
    base = anyone.model()
    before, expected = objects(base), logits(base, anyone.batch())
    model = wrapped(anyone, base, keep_base=keep_base)
    now = objects(model.get_base_model())
    assert all(now[name] is each for name, each in before.items())
    assert all(".surgical_" in f".{name}" for name in now.keys() - before.keys())
    found = logits(model, anyone.batch())
    # whose kernels add up in another order, depending on what requires a gradient or where it lies
    assert torch.equal(found, expected) or (anyone.name in ("mamba", "lstm", "levit") and same(found, expected))
    names = {f"base_model.model.{name}" for name, _ in base.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}


def test_unloading_gives_the_very_objects_back(anyone: Toy) -> None:
    base = anyone.model()
    for number, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before, flags = objects(base), [parameter.requires_grad for parameter in base.parameters()]
    values = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = nudge(wrapped(anyone, base))
    model.add_adapter("second", SurgicalConfig(blocks=[anyone.last]))
    model.set_adapter("second")
    nudge(model, seed=1)
    again = model.unload()
    assert again is base and objects(again).keys() == before.keys()
    assert not hasattr(base, "peft_config")
    assert all(objects(again)[name] is each for name, each in before.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in again.state_dict().items())
    assert [parameter.requires_grad for parameter in again.parameters()] == flags


def test_merging_leaves_the_very_objects_with_the_tuned_values(anyone: Toy) -> None:
    base = anyone.model()
    before = objects(base)
    model = nudge(wrapped(anyone, base))
    model.add_adapter("second", SurgicalConfig(blocks=[anyone.first, anyone.last]))
    model.set_adapter("second")
    expected = logits(nudge(model, seed=1), anyone.batch())
    merged = model.merge_and_unload()
    assert objects(merged).keys() == before.keys()
    assert all(objects(merged)[name] is each for name, each in before.items())
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in anyone.model().parameters()]
    assert same(logits(merged, anyone.batch()), expected)


def test_every_hook_from_before_is_called(anyone: Toy) -> None:
    base = anyone.model()
    seen: set[str] = set()
    handles = []
    for name, module in base.named_modules():
        handles.append(module.register_forward_hook(lambda *_, name=name: seen.add(name)))
    for name, parameter in [each for each in base.named_parameters() if each[1].requires_grad]:
        handles.append(parameter.register_hook(lambda grad, name=name: seen.add(f"grad of {name}")))

    def called(model: nn.Module) -> set[str]:
        seen.clear()
        model.train()  # in eval mode LeViT keeps a graph
        model(**anyone.batch()).loss.backward()
        return set(seen)

    expected = called(base)
    model = wrapped(anyone, base)
    trained = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    expected -= {each for each in expected if each.startswith("grad of ") and each[8:] not in trained}
    assert called(model) == expected and any(each.startswith("grad of ") for each in expected)
    model.add_adapter("second", SurgicalConfig(blocks=[anyone.first, anyone.last]))
    model.set_adapter("second")
    assert called(model) == expected
    for handle in handles:
        handle.remove()
    assert called(model) == set()


def test_what_is_made_of_weights_is_made_again(anyone: Toy) -> None:
    """LeViT keeps its attention biases in eval mode."""
    base = anyone.model()
    expected = logits(base, anyone.batch())
    model = nudge(wrapped(anyone, base))
    tuned = logits(model, anyone.batch())
    assert not same(tuned, expected)
    for _ in range(2):
        with model.disable_adapter():
            assert same(logits(model, anyone.batch()), expected)
        assert same(logits(model, anyone.batch()), tuned)
    assert same(logits(model.unload(), anyone.batch()), expected)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_modules_are_saved_and_loaded(name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    family = PLAIN[name]
    model = nudge(wrapped(family, family.model()))
    model.add_adapter("second", SurgicalConfig(blocks=[family.first]))
    model.set_adapter("second")
    second = logits(nudge(model, seed=1), family.batch())
    model.set_adapter("default")
    first = logits(model, family.batch())
    model.save_pretrained(tmp_path)
    for folder, expected in ((tmp_path, first), (tmp_path / "second", second)):
        loaded = PeftModel.from_pretrained(family.model(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same(logits(loaded, family.batch()), expected)
    other = wrapped(family, family.model())
    other.add_adapter("second", SurgicalConfig(blocks=[family.first]))
    other.load_state_dict(model.state_dict())
    assert same(logits(other, family.batch()), first)
    other.set_adapter("second")
    assert same(logits(other, family.batch()), second)


def step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


TRAINED = ["vit", "bert", "llama", "llama_tied", "t5", "qwen3_moe", "mamba", "resnet", "lstm", "sequential", "listing"]


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_are_those_of_the_bare_model(name: str) -> None:
    """To the bit: the same code on the same objects, once frozen by hand and once by us."""
    family = EVERY[name]
    chosen = {n for n, p in wrapped(family, family.model()).named_parameters() if p.requires_grad}
    losses, results = [], []
    for by_hand in (True, False):
        base = family.model()
        model: nn.Module = base if by_hand else wrapped(family, base, frozen_eval=False)
        if by_hand:
            for n, parameter in base.named_parameters():
                parameter.requires_grad_(f"base_model.model.{n}" in chosen)
        torch.manual_seed(0)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([step(model, family.batch(seed), optimizer) for seed in range(20)])
        results.append({n: t.detach() for n, t in base.state_dict().items() if "surgical_" not in n})
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
