"""The quickstart's trainings: what each row of its table is, and what its worker processes do.

Every function here that takes plain data runs in a process of its own, on one thread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, default_data_collator

from ... import policies
from ...errors import SurgicalError
from ...optim.optimizer import create_surgical_optimizer
from ...policies.policy import Policy
from ...scoring.block_scores import BlockScores
from ...tuner.config import SurgicalConfig
from ..recipe.recipe import Recipe
from ..tasks import load_task
from ..tasks.evaluation import classification
from ..training.train import fit
from ..training.train import score as score_recipe

BATCH_SIZE = 32
SHIFTS: dict[str, dict[str, Any]] = {
    "noise": {"corruption": "gaussian_noise", "severity": 5},
    "label map": {"label_map": list(range(9, -1, -1))},
}


@dataclass(frozen=True)
class Method:
    """A row of the table: the blocks it tunes (or `full`, `lora`, `nothing`), its policy, and the rates it tries."""

    blocks: Any
    policy: Policy | None = None
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # one grid for all

    @property
    def is_surgical(self) -> bool:
        """Whether the method is one of ours."""
        return self.blocks not in ("full", "lora", "nothing")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model ready to be trained."""
        if self.blocks == "lora":
            return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        if self.is_surgical:
            return get_peft_model(model, SurgicalConfig(blocks=self.blocks))
        return model.requires_grad_(self.blocks == "full")


METHODS = {
    "no adaptation": Method("nothing", rates=()),
    "full fine-tuning": Method("full"),
    "head": Method(["head"]),
    "first (embeddings, 0, 1)": Method(["embeddings", 0, 1]),
    "last (4, 5)": Method([4, 5]),
    "Auto-RGN, all blocks": Method("all", policy=policies.auto_rgn()),
    "LoRA r=8": Method("lora"),
}


@dataclass(frozen=True)
class Run:
    """One training: a method on one draw of one shift at one rate; its files lie under `work`."""

    shift: str
    seed: int
    method: str
    rate: float
    work: Path

    @property
    def folder(self) -> Path:
        """Where the trained weights lie."""
        return self.work / f"{self.shift}-{self.seed}-{list(METHODS).index(self.method)}-{self.rate:g}"

    @property
    def logits(self) -> Path:
        """Where the logits of the trained model lie, to compare a reloaded one with."""
        return self.folder.with_name(self.folder.name + ".logits")

    @property
    def data(self) -> Path:
        """Where the images of the draw lie."""
        return data_of(self.shift, self.seed, self.work)


def data_of(shift: str, seed: int, work: Path) -> Path:
    """Where the prepared images of one draw of one shift lie."""
    return work / f"{shift}-{seed}.images"


def shipped(name: str) -> Path:
    """A file or folder of `recipes/`: in the repository, or in the installed package.

    Raises:
        SurgicalError: it is in neither.
    """
    package = Path(__file__).parents[2]
    for folder in (package.parent / "recipes", package / "shipped"):
        if (folder / name).exists():
            return folder / name
    raise SurgicalError(f"recipes/{name} did not come with this installation: run from a clone of the repository.")


def prepare(shift: str, seed: int, work: Path) -> None:
    """Decode, corrupt and normalize the images once, for all runs on this draw."""
    splits = load_task(_recipe(shift, seed)).splits
    columns = {split: default_data_collator([each[i] for i in range(len(each))]) for split, each in splits.items()}
    torch.save(columns, data_of(shift, seed, work))


def score(shift: str, seed: int) -> BlockScores:
    """Scores of the source model's blocks on a draw."""
    return score_recipe(_recipe(shift, seed))


def train(run: Run, epochs: float) -> float:
    """Train and save; returns validation accuracy and leaves the model's logits on 64 images."""
    examples = _examples(run.data)
    method = METHODS[run.method]
    model = method.wrap(_source())
    args = _recipe(run.shift, run.seed).arguments(
        learning_rate=run.rate, num_train_epochs=epochs, output_dir=str(run.folder)
    )
    fit(model, args, examples["train"], method.policy)
    model.save_pretrained(run.folder)  # type: ignore[operator]
    with torch.inference_mode():
        images = default_data_collator(examples["validation"][:64])["pixel_values"]
        torch.save(model.eval()(pixel_values=images).logits, run.logits)
    return classification()(model, examples["validation"])


def test(run: Run) -> float:
    """Test accuracy of a saved run, or of the source model where there was nothing to train."""
    folder = run.folder if METHODS[run.method].rates else shipped("fashion_mnist/vit")
    return classification()(AutoModelForImageClassification.from_pretrained(folder), _examples(run.data)["test"])


def costs(data: Path) -> dict[str, dict[str, float]]:
    """Tuned parameters and milliseconds of a training step: the median of 24 steps, the methods taking turns."""
    batch = default_data_collator(_examples(data)["train"][:BATCH_SIZE])
    found: dict[str, dict[str, float]] = {}
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name, method in METHODS.items():
        model = method.wrap(_source()).train()
        found[name] = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        if method.rates:
            optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-4, policy=method.policy)
            trained[name] = model, optimizer
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    for _ in range(7):
        for name, (model, optimizer) in trained.items():
            for _ in range(4):
                began = time.perf_counter()
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        found[name]["ms"] = 1000 * statistics.median(each[4:])  # without the first round
    return found


_RELOAD = """
import sys, torch, surgical_peft
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
adapter, data, logits = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(adapter).eval()
with torch.inference_mode():
    again = model(pixel_values=torch.load(data)["validation"]["pixel_values"][:64]).logits
sys.exit(0 if torch.equal(again, torch.load(logits)) else 3)
"""


def check_reload(adapter: Path, run: Run) -> None:
    """Load `adapter` in a fresh Python process and compare logits with those of the trained model, bit for bit.

    Raises:
        SurgicalError: it does not load, or the logits differ.
    """
    command = [sys.executable, "-c", _RELOAD, str(adapter), str(run.data), str(run.logits)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = "other logits than when it was saved" if done.returncode == 3 else done.stderr[-2000:]
        raise SurgicalError(f"the adapter of {run.method} ({run.shift}), loaded in a new process, gives {reason}")


def _recipe(shift: str, seed: int) -> Recipe:
    return Recipe(
        model=str(shipped("fashion_mnist/vit")),
        data=str(shipped(f"fashion_mnist/target-{seed}")),
        training={"per_device_train_batch_size": BATCH_SIZE, "seed": seed, "disable_tqdm": True, "use_cpu": True},
        criterion="rgn",
        **SHIFTS[shift],
    )


@lru_cache(maxsize=1)
def _examples(data: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {
        split: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for split, columns in torch.load(data).items()
    }


def _source() -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(shipped("fashion_mnist/vit"))
