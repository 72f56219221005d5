"""A plain loop with accelerate on two blocks of the toy Llama: for `accelerate launch`, or called in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from surgical_peft import SurgicalConfig

from .toys import TOYS

BLOCKS = [0, -1]
EXAMPLES = 8  # a step, whatever the number of processes


def train(folder: Path) -> Accelerator:
    """Three steps; saves the adapter to `folder`, from the first process."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate knows FSDP on accelerators only, gloo does not
    accelerator = Accelerator()
    toy = TOYS["llama"]
    batch = toy.batch(size=3 * EXAMPLES)
    data = [{key: value[i] for key, value in batch.items()} for i in range(3 * EXAMPLES)]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=BLOCKS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(data, batch_size=EXAMPLES // accelerator.num_processes)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for rows in loader:
        accelerator.backward(model(**rows).loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.get_state_dict(model)  # every process takes part
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()
    return accelerator


def assert_same_adapter(folder: Path, other: Path, atol: float) -> None:
    """The weights saved in both are the same, and can be loaded."""
    one, two = (load_file(each / "adapter_model.safetensors") for each in (folder, other))
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
    PeftModel.from_pretrained(TOYS["llama"].model(), other)


if __name__ == "__main__":
    done = train(Path(sys.argv[1]))
    if done.is_main_process:
        print("fsdp2" if done.is_fsdp2 else "ddp", done.num_processes)
    done.end_training()
