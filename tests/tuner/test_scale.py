"""What is done grows with the number of modules or adapters, not with its square; in threads and forks, too."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig, create_surgical_optimizer, policies
from surgical_peft.tuner.target_modules import modules_to_tune


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)


def deep(count: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(count))
    model.head = nn.Linear(2, 2)
    return model


def nested(count: int) -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(count):
        model = nn.Sequential(model, nn.Linear(2, 2))
    return nn.ModuleDict({"nested": model, "layers": nn.ModuleList(Layer() for _ in range(count))})


def calls(action: Callable[[], Any]) -> int:
    """The number of Python functions called, and of steps of generators."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def steps(count: int, folder: Path) -> dict[str, int]:
    model, config = deep(count), SurgicalConfig(blocks=["::2", "head"])
    found = {"find": calls(lambda: BlockMap.find(model)), "find in lists": calls(lambda: BlockMap.find(nested(count)))}
    found["wrap"] = calls(lambda: get_peft_model(model, config))
    blocks = list(range(count))
    each = SurgicalConfig(blocks=blocks, target_modules={str(block): ["first"] for block in blocks})
    found["choice for each block"] = calls(lambda: modules_to_tune(deep(count), each))
    without = SurgicalConfig(target_modules=["first"], exclude_modules=[f"layers.{block}.second" for block in blocks])
    found["many exclusions"] = calls(lambda: modules_to_tune(deep(count), without))
    wrapped = get_peft_model(deep(count), config)
    found["save"] = calls(lambda: wrapped.save_pretrained(folder))
    found["load"] = calls(lambda: PeftModel.from_pretrained(deep(count), folder))
    return found


def test_twice_the_modules_take_twice_the_steps(tmp_path: Path) -> None:
    """A chain of 400 lists took four minutes, and 3,000 modules 19 seconds to wrap."""
    few, many = steps(60, tmp_path / "few"), steps(120, tmp_path / "many")
    ratios = {action: many[action] / few[action] for action in few}
    assert all(ratio < 2.5 for action, ratio in ratios.items() if action != "find in lists"), ratios
    assert ratios["find in lists"] < 5, ratios  # a list may be the list of layers of each that it lies in


def live() -> int:
    gc.collect()
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


def test_adapters_that_are_deleted_leave_nothing(tmp_path: Path) -> None:
    """And the sixteenth is not added in sixteen times the steps of the first."""
    model = get_peft_model(deep(8), SurgicalConfig(blocks=[0]), adapter_name="kept")

    def cycle(number: int) -> None:
        model.add_adapter("other", SurgicalConfig(blocks=[number % 8]))
        model.set_adapter("other")
        model.delete_adapter("other")

    for number in range(3):
        cycle(number)
    before, first = live(), calls(lambda: cycle(0))
    for number in range(6):
        cycle(number)
    assert live() == before and calls(lambda: cycle(0)) < 1.01 * first
    steps_of = [calls(lambda n=n: model.add_adapter(f"adapter-{n}", SurgicalConfig(blocks=[1]))) for n in range(16)]
    assert steps_of[-1] < 3 * steps_of[0], steps_of


def trained(bases: tuple[nn.Module, nn.Module], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that an adapter of one base saves after a few steps; it is loaded into the other."""
    base, fresh = bases
    model = get_peft_model(base, SurgicalConfig(blocks=[0, -1]))
    policy = policies.lisa(num_blocks=1, every=2)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=0.1, policy=policy)
    for _ in range(6):
        sum((weight**2).sum() for weight in model.parameters() if weight.requires_grad).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(fresh, folder))
    saved = load_file(folder / "adapter_model.safetensors")
    assert same(loaded, saved)
    return saved


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_models_in_two_threads_are_those_of_one(tmp_path: Path) -> None:
    alone = {count: trained((deep(count), deep(count)), tmp_path / str(count)) for count in (4, 6)}
    counts = (4, 6) * 4
    bases = [(deep(count), deep(count)) for count in counts]  # here, since all threads share one generator
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(trained, bases, [tmp_path / f"thread-{number}" for number in range(len(bases))]))
    assert all(same(found, alone[count]) for found, count in zip(both, counts, strict=True))


def test_a_forked_process_trains_as_its_parent(tmp_path: Path) -> None:
    here = trained((deep(4), deep(4)), tmp_path / "here")
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = 0 if same(trained((deep(4), deep(4)), tmp_path / "child"), here) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
