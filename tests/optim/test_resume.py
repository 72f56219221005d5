"""A run killed after a checkpoint and resumed in another process ends bit-equal to one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgical_peft import policies

REPOSITORY = Path(__file__).parents[2]
STEPS, CHECKPOINT, KILLED = 30, 15, 18
# Policy, steps an epoch, noise. 10 steps an epoch put the checkpoint in the middle of one; 15 at its end, where the
# next probe is due. Noise: the collator draws random numbers. Within an epoch Trainer itself does not resume those
# exactly.
RGN = "auto_rgn(every='{}', granularity='{}', num_batches=2)"
VARIANTS = {name: (f"{name}()", 10, False) for name in policies.__all__}  # and where that is not enough:
VARIANTS |= {
    "step-block": (RGN.format("step", "block"), 10, False),
    "step-tensor": (RGN.format("step", "tensor"), 10, False),
    "epoch-block": (RGN.format("epoch", "block"), 10, False),
    "epoch-block-noise-at-the-end": (RGN.format("epoch", "block"), 15, True),
    "every-4-steps": ("auto_rgn(every=4, num_batches=1)", 10, False),
    "static": ("static({0: 0.5})", 10, False),
    "discriminative": ("discriminative(1.1)", 10, False),
    "auto_snr": ("auto_snr(0.2, num_batches=2, state_policy='reset')", 10, False),
    "bvg_ls-masked": ("bvg_ls(momentum='masked')", 10, False),
    "grass": ("grass(num_blocks=1, every=4, refresh=3, num_batches=2)", 10, False),
    "lisa": ("lisa(num_blocks=1, every=4)", 10, False),
    "misa": ("misa(share=0.1, every=4)", 10, False),
    "badam": ("badam(every=4)", 10, False),
    "badam-offload": ("badam(every=2, state_policy='offload')", 10, False),
    "lp_ft": ("lp_ft(epochs=1)", 10, False),
    "lp_ft-at-the-end": ("lp_ft(epochs=1)", 15, False),
    "two_stage": ("two_stage(counts=[3, 2, 1], epochs=2)", 10, False),
    "stages": ("stages([{'blocks': [0], 'steps': 14}, {'blocks': [5, 9], 'steps': 4}, {}])", 10, False),
    "progressive_freezing": ("progressive_freezing(interval=4)", 10, False),
    "sample_by_score": ("sample_by_score(num_blocks=1, every=2)", 10, False),
}
COARSE = "-bfloat16"  # the same on the same model in bfloat16, which is tuned through float32 masters
VARIANTS |= {name + COARSE: VARIANTS[name] for name in (*policies.__all__, "bvg_ls-masked", "badam-offload")}
DRAWN = "step-block"
KILLS = (DRAWN, "epoch-block", "lisa", "badam-offload" + COARSE)  # the others take the checkpoint of the straight run
CONSTANT = ("static", "layer_decay", "discriminative")

# Imports and what is made once by a first model, then a process of its own for every variant.
SCRIPT = f"""
import gc, json, os, shutil, sys
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

from surgical_peft import SurgicalCallback, SurgicalConfig, policies, surgical_optimizer
from surgical_peft.precision.master_weights import KEY
from surgical_peft.optim.history import History
from tests.support.toys import TOYS

torch.set_num_threads(1)
draw = History.plot


class Record(TrainerCallback):
    def __init__(self, path):
        self.path = path

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        factors = optimizer.optimizer.block_rates.used
        with self.path.open("a") as file:
            file.write(json.dumps([state.global_step, factors]) + "\\n")


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {KILLED}:
            os.kill(os.getpid(), 9)


def noisy(features):
    batch = default_data_collator(features)
    batch["pixel_values"] += 0.1 * torch.randn_like(batch["pixel_values"])
    return batch


def train(how, folder, policy, steps_an_epoch, noise):
    History.plot = draw if folder.name == "{DRAWN}" else lambda *_: None  # a picture takes as long as 15 steps
    set_seed(0 if how != "resumed" else 99)  # a resumed run has its random state from the checkpoint
    toy = TOYS["vit"]
    dtype = torch.bfloat16 if folder.name.endswith("{COARSE}") else torch.float32
    model = get_peft_model(toy.model().to(dtype), SurgicalConfig(blocks=[0, 5, 9, "head"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    batch = toy.batch(size=4 * steps_an_epoch)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    data = [{{key: value[i] for key, value in batch.items()}} for i in range(4 * steps_an_epoch)]
    args = TrainingArguments(
        output_dir=folder / ("straight" if how == "straight" else "broken"), report_to="none", use_cpu=True,
        disable_tqdm=True, max_steps={STEPS}, save_strategy="steps", save_steps={CHECKPOINT}, logging_strategy="no",
        per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, warmup_steps=4, seed=7,
    )
    policy = eval(policy, vars(policies))
    callbacks = [SurgicalCallback(), Record(folder / f"{{how}}.jsonl")] + ([Kill()] if how == "killed" else [])
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks,
                      data_collator=noisy if noise else default_data_collator,
                      optimizer_cls_and_kwargs=surgical_optimizer(args, policy))
    resume = str(folder / "broken" / "checkpoint-{CHECKPOINT}") if how == "resumed" else None
    trainer.train(resume_from_checkpoint=resume)
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    state = trainer.optimizer.state
    torch.save([state[w].get(KEY, torch.zeros(())) for w in weights], folder / f"{{how}}-masters.pt")


root, hows, variants = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
# A first model is looked at with the help of what takes longer to import and to compile than a training.
extract_model_from_parallel(get_peft_model(TOYS["vit"].model(), SurgicalConfig(blocks=[0]))).save_pretrained(root)
gc.freeze()  # Trainer collects garbage around every training: half a second over all that was imported
for how in hows:
    children = {{}}
    for name, variant in variants.items():
        (root / name).mkdir(exist_ok=True)
        if how == "killed" and name not in {KILLS}:
            shutil.copytree(root / name / "straight", root / name / "broken")
            shutil.rmtree(root / name / "broken" / "checkpoint-{STEPS}")
            shutil.copy(root / name / "straight.jsonl", root / name / "killed.jsonl")
            continue
        if (child := os.fork()) == 0:
            train(how, root / name, *variant)
            os._exit(0)
        children[name] = child
    for name, child in children.items():
        _, status = os.waitpid(child, 0)
        with (root / "ends.jsonl").open("a") as file:  # not to the stream that all children print to
            file.write(json.dumps([name, how, os.waitstatus_to_exitcode(status)]) + "\\n")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant run straight, killed after its checkpoint, and resumed by a second script."""
    root = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    codes = {"straight": 0, "killed": -9, "resumed": 0}
    for hows in (["straight", "killed"], ["resumed"]):
        command = [sys.executable, "-c", SCRIPT, str(root), ",".join(hows), json.dumps(VARIANTS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        ends = [json.loads(line) for line in (root / "ends.jsonl").read_text().splitlines()]
        (root / "ends.jsonl").unlink()
        ran = [(how, name) for how in hows for name in VARIANTS if how != "killed" or name in KILLS]
        assert ends == [[name, how, codes[how]] for how, name in ran], done.stderr[-3000:]
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_bitwise_as_the_uninterrupted_one(variant: str, runs: Path) -> None:
    folder = runs / variant
    straight, resumed = (
        load_file(folder / how / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for how in ("straight", "broken")
    )
    assert len(straight) == 3 * 16 + 2
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    one, other = (torch.load(folder / f"{how}-masters.pt") for how in ("straight", "resumed"))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert all(master.dtype == torch.float32 for master in one)
    if variant.endswith(COARSE):
        assert any(master.dim() and not torch.equal(master, master.bfloat16().float()) for master in one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_factors_are_those_of_the_uninterrupted_run(variant: str, runs: Path) -> None:
    straight, killed, resumed = (
        dict(json.loads(line) for line in (runs / variant / f"{how}.jsonl").read_text().splitlines())
        for how in ("straight", "killed", "resumed")
    )
    assert list(straight) == list(range(1, STEPS + 1))
    assert list(killed) == list(range(1, (KILLED if variant in KILLS else STEPS) + 1))
    assert list(resumed) == list(range(CHECKPOINT + 1, STEPS + 1))
    assert {**killed, **resumed} == straight
    changed = [step for step in range(1, STEPS) if straight[step] != straight[step + 1]]
    assert bool(changed) == (variant.removesuffix(COARSE) not in CONSTANT)
    if variant.startswith(("step", "epoch")):
        period = 1 if variant.startswith("step") else VARIANTS[variant][1]
        assert changed == list(range(period, STEPS, period))


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_history_is_that_of_the_uninterrupted_run(variant: str, runs: Path) -> None:
    straight, resumed = (runs / variant / how / "surgical_history.jsonl" for how in ("straight", "broken"))
    assert straight.read_text() == resumed.read_text()
    steps = [json.loads(line)["step"] for line in straight.read_text().splitlines()]
    assert steps[0] == 1
    assert (len(steps) > 1) == (variant.removesuffix(COARSE) not in CONSTANT)
    picture = runs / variant / "broken" / "surgical_history.png"
    assert picture.stat().st_size > 10_000 if variant == DRAWN else not picture.exists()
