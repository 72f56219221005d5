from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli import main as cli
from surgical_peft.cli.options import print_json
from tests.support.cli import run

ROOT = Path(__file__).parents[2]
VIT = ROOT / "recipes" / "fashion_mnist" / "vit"


def test_blocks_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "blocks", str(VIT)) == 0
    table = capsys.readouterr().out
    assert "embeddings" in table and "vit.layers.5" in table and "205,962" in table
    assert run(monkeypatch, "blocks", str(VIT), "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["parameters"] for row in rows) == 205_962
    assert "embeddings" in table and "vit.layers.5" in table and "205,962" in table and "attention, mlp" in table


def test_score_and_its_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = str(ROOT / "recipes" / "noise.yaml")
    assert run(monkeypatch, "score", recipe, "--json", "--plot", str(tmp_path / "scores.png")) == 0
    assert set(json.loads(capsys.readouterr().out)["values"]) >= {"embeddings", "0", "head"}
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_score_by_another_criterion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "auto.yaml")
    assert run(monkeypatch, "score", recipe, "--json", "--criterion", "weight_snr") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["criterion"] == "weight_snr" and set(scores["unscored"]) == {"embeddings", "final_norm", "head"}


def loud(weights: Any, grads: Any) -> float:
    print("a library's log")
    return 1.0


def test_json_is_alone_on_the_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed writes its log there, as soon as Trainer imports it."""
    recipe = str(ROOT / "recipes" / "auto.yaml")
    assert run(monkeypatch, "score", recipe, "--json", "--criterion", f"{__name__}:loud") == 0
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)["values"].values()) == {1.0} and "a library's log" in printed.err
    assert run(monkeypatch, "blocks", str(VIT)) == 0 and "embeddings" in capsys.readouterr().out


def test_train_prints_json_alone(tmp_path: Path) -> None:
    """In a process of its own: Trainer prints its logs to the same stream."""
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"model: {VIT}\ndata: {VIT.parent / 'target-1'}\nblocks: [0]\nmax_steps: 2\nlogging_steps: 1\nuse_cpu: true\n"
    )
    recipe.write_text(text + f"logging_strategy: steps\noutput_dir: {tmp_path / 'run'}\n")
    command = [sys.executable, "-m", "surgical_peft", "train", str(recipe), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["blocks"] == ["0"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_export_to_every_format_and_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = AutoModelForImageClassification.from_pretrained(VIT)
    model = get_peft_model(base, SurgicalConfig(blocks=[0]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    source = str(tmp_path / "adapter")
    said = {"peft": ":", "merged": ":", "delta": "times smaller", "lora --rank 2": "vit.layers.0", "patch": "layer.0"}
    for format, text in said.items():
        out = str(tmp_path / format.split()[0])
        assert run(monkeypatch, "export", source, out, "--format", *format.split()) == 0
        assert text in " ".join(capsys.readouterr().out.split())
    served = shutil.copytree(VIT, tmp_path / "served")
    for folder in ("patch", "undo"):
        assert run(monkeypatch, "patch", str(tmp_path / "patch" / folder), str(served), "--json") == 0
        assert json.loads(capsys.readouterr().out)["files"] == ["model.safetensors"]
    assert (served / "model.safetensors").read_bytes() == (VIT / "model.safetensors").read_bytes()
    arguments = ["--format", "adapter", "--base", str(VIT), "--json"]
    assert run(monkeypatch, "export", str(tmp_path / "delta"), str(tmp_path / "back"), *arguments) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "adapter"
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "back"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{tmp}/none", "{tmp}/run"], "no adapter's folder"),
        (["patch", "{tmp}/none", "{tmp}"], "no patch"),
        (["export", "{tmp}", "{tmp}/run", "--format", "lroa"], "did you mean 'lora'"),
        (["export", "{tmp}", "{tmp}/run", "--format", "lora", "--rank", "0"], "at least 1"),
        (["blocks", "no-such/model"], "the model 'no-such/model' cannot be loaded"),
        (["score", "no.yaml"], "there is no recipe 'no.yaml'"),
        (["score", "{tmp}/block.yaml", "--plot", "scores"], "must end in .png, .pdf or .svg"),
        (["score", "{tmp}/block.yaml", "--criterion", "prob"], "did you mean 'probe'"),
        (["train", "{tmp}/typo.yaml"], "did you mean 'learning_rate'"),
        (["train", "{tmp}/block.yaml"], "block 14 does not exist"),
        (["score", "{tmp}/brackets.yaml"], "'[bold]' is none of the criteria"),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "typo.yaml").write_text("model: m\ndata: d\nlerning_rate: 1\n")
    shipped = f"model: {VIT}\ndata: {VIT.parent / 'target-0'}\noutput_dir: {tmp_path / 'run'}\n"
    (tmp_path / "block.yaml").write_text(shipped + "blocks: [14]\n")
    (tmp_path / "brackets.yaml").write_text(shipped + "blocks: auto\ncriterion: '[bold]'\n")
    assert run(monkeypatch, *(each.format(tmp=tmp_path) for each in arguments)) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err and captured.out == ""
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SurgicalError, match=r"no\.yaml"):  # that nothing catches, so that Python shows it
        run(monkeypatch, "score", "no.yaml", "--debug")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert len(names) >= 8
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in names:
        assert name in text
        assert f"surgical-peft {name}" in page, name
        assert name in (cli.__doc__ or ""), name


@pytest.mark.parametrize(("command", "kept"), [("train", "step 7"), ("compare", "Finished"), ("advise", "Nothing")])
def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, kept: str
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(*(["Kept: step 7."] if command == "train" else []))

    monkeypatch.setattr("surgical_peft.experiments.recipe.load_recipe", pressed)
    assert run(monkeypatch, command, "recipe.yaml") == 130
    printed = capsys.readouterr()
    assert kept in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_an_interrupt_that_python_ignores_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a finalizer; the command went on, with a traceback."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Finalized:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def load(*_: Any, **__: Any) -> None:
        Finalized()
        for _ in range(1000):
            time.sleep(0.01)
        raise SurgicalError("nobody has interrupted it")

    monkeypatch.setattr("surgical_peft.experiments.recipe.load_recipe", load)
    try:
        assert run(monkeypatch, "compare", "recipe.yaml") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_version_and_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert "surgical-peft" in capsys.readouterr().out
    assert run(monkeypatch, "recipe", "--keys") == 0
    shown = capsys.readouterr().out
    assert "drop_empty" in shown and "label_map" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_json_is_printed_also_outside_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """It was an IndexError in a command of one's own."""
    print_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "per_device_train_batch_size"),
        (MemoryError(), "per_device_train_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "per_device_train_batch_size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "dataloader_num_workers: 0"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "disk"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_lacks_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception, remedy: str
) -> None:
    """It was a traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr("surgical_peft.experiments.recipe.load_recipe", fail)
    assert run(monkeypatch, "train", "recipe.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and remedy in line


@pytest.mark.parametrize(
    "fault", [RuntimeError("of ours"), KeyError("Caught KeyError in DataLoader worker process 0.")], ids=str
)
def test_another_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr("surgical_peft.experiments.recipe.load_recipe", fail)
    with pytest.raises(type(fault)):
        run(monkeypatch, "train", "recipe.yaml")
