"""Policies under DDP: soft ones give on 2 processes what they give on 1, those that freeze are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgical_peft import policies

REPOSITORY = Path(__file__).parents[2]
FREEZES = [name for name in policies.__all__ if "hard" in getattr(getattr(policies, name), "__dataclass_fields__", ())]
SOFT = {
    name: f"{name}({'hard=False' * (name in FREEZES)})" for name in policies.__all__
}  # and where that is not enough:
SOFT |= {
    "static": "static({0: 0.5})",
    "layer_decay": "layer_decay(0.9)",
    "discriminative": "discriminative(1.1)",
    "auto_rgn-epoch": "auto_rgn(every='epoch', num_batches=3)",
    "auto_snr": "auto_snr(0.3, granularity='block', num_batches=4, hard=False)",
    "bvg_ls-masked": "bvg_ls(momentum='masked')",
    "grass": "grass(num_blocks=1, every=2, refresh=2, num_batches=2, hard=False)",
    "lisa": "lisa(num_blocks=1, every=2, hard=False)",
    "misa": "misa(share=0.1, every=2, hard=False)",
    "badam": "badam(every=2, hard=False)",
    "gradual_unfreezing": "gradual_unfreezing(hard=False)",
    "lp_ft": "lp_ft(epochs=1, hard=False)",
    "two_stage": "two_stage(counts=[3, 2, 1], epochs=1, hard=False)",
    "stages": "stages([{'blocks': [0], 'steps': 3}, {}], hard=False)",
    "progressive_freezing": "progressive_freezing(interval=2, hard=False)",
    "sample_by_score": "sample_by_score(num_blocks=1, every=2, hard=False)",
}
HARD = ["auto_snr", "lisa", "badam", "gradual_unfreezing", "lp_ft", "two_stage", "stages", "progressive_freezing"]
HARD += ["sample_by_score", "grass", "misa"]

# Imports once, then three processes. One accumulates two batches of 4, two take one each: the same examples at every
# step.
SCRIPT = """
import json, os, socket, sys, traceback
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from surgical_peft import SurgicalCallback, SurgicalConfig, SurgicalError, policies, surgical_optimizer
from surgical_peft.optim.history import History
from tests.support.toys import TOYS

torch.set_num_threads(1)
History.plot = lambda *_: None  # a picture takes longer than the training
root, soft, hard = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
toy = TOYS["vit"]
batch = toy.batch(size=32)
data = [{key: value[i] for key, value in batch.items()} for i in range(32)]


def trainer_for(text, folder, world):
    set_seed(0)
    args = TrainingArguments(
        output_dir=folder, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=6, save_strategy="no",
        per_device_train_batch_size=4, gradient_accumulation_steps=2 // world, learning_rate=1e-3, seed=3,
        logging_steps=1,
    )
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0, 5, 9, "head"]))
    policy = eval(text, vars(policies))
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[SurgicalCallback()],
                   optimizer_cls_and_kwargs=surgical_optimizer(args, policy))


def play(world, rank):
    for name, text in soft.items():
        trainer = trainer_for(text, root / name / str(world), world)
        trainer.train()
        if rank == 0:
            weights = {key: p.detach() for key, p in trainer.model.named_parameters() if p.requires_grad}
            torch.save(weights, root / name / f"{world}.pt")
    if world == 1:
        return
    refused = {}
    for name in hard:
        try:
            trainer_for(soft[name].replace("hard=False", "hard=True"), root / "hard", world).create_optimizer()
        except SurgicalError as error:
            refused[name] = str(error)
    if rank == 0:
        (root / "refused.json").write_text(json.dumps(refused))
    dist.barrier()
    dist.destroy_process_group()


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
children = []
for world, rank in ((1, 0), (2, 0), (2, 1)):
    if (child := os.fork()) == 0:
        code = 1
        try:
            if world > 1:
                os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            play(world, rank)
            code = 0
        except Exception:
            traceback.print_exc()
        os._exit(code)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every soft policy on 1 process and on 2 (gloo)."""
    root = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(root), json.dumps(SOFT), json.dumps(HARD)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", SOFT)
def test_two_processes_end_as_one(name: str, runs: Path) -> None:
    one, two = (torch.load(runs / name / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert len(one) == 3 * 16 + 2
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6
    histories = [(runs / name / world / "surgical_history.jsonl").read_text().splitlines() for world in ("1", "2")]
    assert [json.loads(line)["step"] for line in histories[0]] == [json.loads(line)["step"] for line in histories[1]]


@pytest.mark.parametrize("name", HARD)
def test_a_mask_that_changes_is_refused_with_its_remedy(name: str, runs: Path) -> None:
    message = json.loads((runs / "refused.json").read_text())[name]
    assert all(name in message for name in ("DistributedDataParallel", "hard=False", "SurgicalConfig(blocks=...)"))
