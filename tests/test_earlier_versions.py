"""What earlier versions saved still loads, resumes and counts as done.

`earlier/two`, `cls` and `parts` are adapters of the time when a copy of each module was wrapped (commit 37b8b3a); the
checkpoints, the search and the comparison are of the time before the package had rooms (commit 0f9f41b).
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from surgical_peft import (
    BlockMap,
    Selection,
    SurgicalCallback,
    SurgicalConfig,
    policies,
    procedures,
    run_search,
    surgical_optimizer,
)
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.jobs import JobRunner
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.policies.policy import Policy
from tests.support.toys import TOYS

EARLIER = Path(__file__).parent / "earlier"
ADAPTERS = {"two": "llama", "cls": "bert", "parts": "bert"}  # LoRA beside blocks; a new head; biases only


def natively(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(folder)  # type: ignore[operator]
    return base


DOORS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "peft": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "transformers": natively,
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("door", DOORS)
def test_they_load_and_are_saved_again_as_they_were(name: str, door: str, tmp_path: Path) -> None:
    toy = TOYS[ADAPTERS[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = DOORS[door](toy.model(), EARLIER / name).eval()
    assert all(type(config) is SurgicalConfig for config in model.peft_config.values())
    expected = load_file(EARLIER / "logits.safetensors")[name]
    with torch.no_grad():
        torch.testing.assert_close(model(**toy.batch()).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    before, after = (load_file(each / "adapter_model.safetensors") for each in (EARLIER / name, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_second_one_loads_beside_it() -> None:
    model = PeftModel.from_pretrained(TOYS["llama"].model(), EARLIER / "two")
    model.load_adapter(EARLIER / "two" / "second", "second")
    model.set_adapter("second")
    saved = load_file(EARLIER / "two" / "second" / "adapter_model.safetensors")
    assert saved and all(torch.equal(model.get_parameter(key), tensor) for key, tensor in saved.items())


TRAININGS: dict[str, tuple[Policy, torch.dtype]] = {
    "lisa": (policies.lisa(num_blocks=1, every=3), torch.bfloat16),
    "auto_rgn_paper": (policies.auto_rgn_paper(), torch.float32),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    policy, dtype = TRAININGS[name]
    shutil.copytree(EARLIER / "trainings" / name, tmp_path, dirs_exist_ok=True)
    set_seed(1)
    toy = TOYS["llama"]
    model = get_peft_model(toy.model().to(dtype), SurgicalConfig(blocks=[0, -1]))
    batch = toy.batch(size=16)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        seed=7,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[{key: value[at] for key, value in batch.items()} for at in range(16)],
        callbacks=[SurgicalCallback()],
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=surgical_optimizer(args, policy),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    model.save_pretrained(tmp_path / "again")
    ended, again = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("end", "again"))
    assert ended.keys() == again.keys()
    for key, tensor in ended.items():
        torch.testing.assert_close(again[key], tensor, msg=key)
    history = (EARLIER / "trainings" / name / "surgical_history.jsonl").read_text()
    assert (tmp_path / "surgical_history.jsonl").read_text() == history


def test_a_search_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """It had done 4 trials and was killed in the fifth."""
    shutil.copy(EARLIER / "study.db", tmp_path)
    blocks = BlockMap.find(TOYS["llama"].model())
    asked: list[tuple[str, ...]] = []

    def objective(selection: Selection) -> float:
        asked.append(selection.blocks)
        return -len(selection.blocks) + 0.1 * sum(map(len, selection.blocks))

    def run(storage: str | None) -> str:
        asked.clear()
        result = run_search(procedures.greedy_forward(num_blocks=2), objective, blocks=blocks, storage=storage)
        return json.dumps([result.best.blocks, [[trial.blocks, trial.metric] for trial in result.trials]])

    resumed = run(f"sqlite:///{tmp_path / 'study.db'}")
    left = list(asked)
    assert run(None) == resumed
    assert left == asked[4:]


def test_a_comparison_has_nothing_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EARLIER / "compared", tmp_path, dirs_exist_ok=True)
    runs = {path.name: path.read_bytes() for path in (tmp_path / "run" / "runs").iterdir()}
    monkeypatch.setattr(JobRunner, "do", lambda self, job: pytest.fail(f"{job} is done again"))
    monkeypatch.chdir(tmp_path)
    report = compare(load_recipe(tmp_path / "recipe.yaml"), console=Console(file=io.StringIO()))
    assert len(report.methods) == 6
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "runs").iterdir()} == runs
