"""Trainer on two blocks of the toy Llama at rates that differ by block: under DeepSpeed's ZeRO, or in one process."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from surgical_peft import SurgicalCallback, SurgicalConfig, policies, surgical_optimizer
from tests.support.launched import BLOCKS, EXAMPLES
from tests.support.processes import in_two_processes
from tests.support.toys import TOYS


def train(base: Path, folder: Path, stage: int | None = None, keep_base: str = "device") -> Trainer:
    """Three steps from the model in `base`, whose weights ZeRO 3 deals out as they are read; saves to `folder`."""
    torch.set_num_threads(1)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    batch_sizes = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")
    deepspeed: dict[str, Any] = {**batch_sizes, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=EXAMPLES // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=3,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        deepspeed=None if stage is None else deepspeed,
    )
    batch = TOYS["llama"].batch(size=3 * EXAMPLES)
    data = [{key: value[i] for key, value in batch.items()} for i in range(3 * EXAMPLES)]
    config = SurgicalConfig(blocks=BLOCKS, keep_base=keep_base)
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), config),
        args=args,
        train_dataset=data,  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=surgical_optimizer(args, policies.layer_decay(0.5)),  # type: ignore[arg-type]
        callbacks=[SurgicalCallback()],
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Of one batch, in eval mode."""
    model.eval()  # DeepSpeed's returns nothing
    return model(**TOYS["llama"].batch()).loss.item()


def tell(base: Path, folder: Path, stage: int, keep_base: str) -> None:
    """Trains in one of two processes; the first writes what it found to `folder/found.json`."""
    done = train(base, folder, stage, keep_base)
    found = {"stage": done.model_wrapped.zero_optimization_stage(), "processes": done.args.world_size}
    found["tuned"] = loss(done.model_wrapped)
    if keep_base != "none":
        with done.model.disable_adapter():
            found["base"] = loss(done.model_wrapped)
    if done.args.process_index == 0:
        (folder / "found.json").write_text(json.dumps(found))
    done.accelerator.end_training()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  (once, not in each process)

    for number, kept in json.loads(sys.argv[2]):
        in_two_processes(partial(tell, Path(sys.argv[1]) / "base", Path(sys.argv[1]) / str(number), number, kept))
