"""A plain loop with accelerate on two blocks of the toy Llama: for `accelerate launch`, or called in one process."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from surgical_peft import SurgicalConfig, create_surgical_optimizer, policies
from surgical_peft.criteria.criterion import whole
from surgical_peft.precision.master_weights import KEY
from tests.support.toys import TOYS

BLOCKS = [0, -1]
EXAMPLES = 8  # a step, whatever the number of processes


def train(folder: Path, dtype: torch.dtype = torch.float32) -> Accelerator:
    """Three steps; saves the adapter to `folder`, from the first process.

    In bfloat16 on masters, by our optimizer; its state is saved and loaded once, and the masters go into `folder` too.
    """
    torch.set_num_threads(1)
    accelerator = launched_accelerator()
    toy = TOYS["llama"]
    batch = toy.batch(size=3 * EXAMPLES)
    data = [{key: value[i] for key, value in batch.items()} for i in range(3 * EXAMPLES)]
    model = get_peft_model(toy.model().to(dtype), SurgicalConfig(blocks=BLOCKS))
    if dtype == torch.float32:
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    else:
        optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-2, policy=policies.layer_decay(0.9))
    loader = DataLoader(data, batch_size=EXAMPLES // accelerator.num_processes)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for rows in loader:
        accelerator.backward(model(**rows).loss)
        optimizer.step()
        optimizer.zero_grad()
    if dtype != torch.float32:
        masters = whole_masters(optimizer.optimizer)
        accelerator.save_state(str(folder / "state"))
        accelerator.wait_for_everyone()
        for state in optimizer.optimizer.state.values():
            state[KEY].fill_(7.0)
        accelerator.load_state(str(folder / "state"))
        again = whole_masters(optimizer.optimizer)
        assert all(torch.equal(one, other) for one, other in zip(masters, again, strict=True))
        if accelerator.is_main_process:
            torch.save(masters, folder / "masters.pt")
    weights = accelerator.get_state_dict(model)  # every process takes part
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return accelerator


@functools.cache
def launched_accelerator() -> Accelerator:
    """The one of this process, as it was launched."""
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate knows FSDP on accelerators only, gloo does not
    return Accelerator()


def whole_masters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The masters in the order of the groups, whole on each process."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [whole(optimizer.state[weight][KEY]).clone() for weight in weights]


def assert_same_adapter(folder: Path, other: Path, atol: float) -> None:
    """The weights saved in both are the same, and can be loaded."""
    one, two = (load_file(each / "adapter_model.safetensors") for each in (folder, other))
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    PeftModel.from_pretrained(TOYS["llama"].model(), other)


if __name__ == "__main__":
    train(Path(sys.argv[1]) / "bfloat16", torch.bfloat16)
    done = train(Path(sys.argv[1]) / "float32")
    if done.is_main_process:
        print("fsdp2" if done.is_fsdp2 else "ddp", done.num_processes)
    done.end_training()
