"""Under DDP, where shuffling deals every epoch's examples out anew, processes use what another one has kept."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.processes import in_a_fresh_process

SCRIPT = """
import json, os, sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

from surgical_peft import SurgicalConfig, cache_prefix, get_surgical_model
from tests.support.processes import in_two_processes
from tests.support.toys import TOYS

torch.set_num_threads(1)
folder, toy = Path(sys.argv[1]), TOYS["vit"]


def train(name):
    set_seed(0)
    batch = toy.batch(size=12)
    rows = [{key: value[at] for key, value in batch.items()} for at in range(12)]
    model = get_surgical_model(toy.model(), SurgicalConfig(blocks=[toy.last]))
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=4, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    cached = name == "cached"
    with cache_prefix(model, trainer.get_train_dataloader()) if cached else nullcontext() as cache:
        trainer.train()
        if cached:
            (folder / f"{args.process_index}.json").write_text(json.dumps([cache.hits, cache.misses, cache.reason]))
    if args.process_index == 0:
        torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, folder / f"{name}.pt")


for name in ("whole", "cached"):
    in_two_processes(partial(train, name))
print(json.dumps([json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]))
"""


def test_the_shards_of_two_processes_learn_the_same_and_share_what_is_kept(tmp_path: Path) -> None:
    counts = in_a_fresh_process(SCRIPT, tmp_path)
    for hits, misses, reason in counts:  # three batches in each of four epochs; what was kept last may be seen late
        assert hits + misses == 12 and 3 <= misses <= 5 and reason is None
    whole, cached = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "cached"))
    assert whole.keys() == cached.keys() and whole
    for name, weight in whole.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-4, atol=1e-6)
