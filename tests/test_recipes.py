"""Every recipe that ships runs two steps by the command it is made for, and its header says what to expect."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from surgical_peft.cli import main
from surgical_peft.strict_yaml import StrictLoader

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT / "recipes").as_posix() for path in PATHS]
ROWS = {"train": 48, "validation": 24, "test": 24}
WORDS = ("free", "money", "win", "now", "meeting", "at", "noon", "minutes", "attached", "unsubscribe")


def keys_of(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / "recipes" / name).read_text(encoding="utf-8"), Loader=StrictLoader)


def command_of(name: str) -> str:
    """The command that a recipe is made for."""
    keys = keys_of(name)
    return "compare" if "methods" in keys else "search" if "procedure" in keys else "train"


def is_tiny(name: str) -> bool:
    """Whether its model and data lie on the Hub, so that its tiny mode is run."""
    return name.startswith("hub/")


def write_images(folder: Path) -> None:
    """The first images of a shipped data set."""
    shipped = ROOT / "recipes" / "fashion_mnist" / folder.name
    for split, count in ROWS.items():
        load_dataset(str(shipped), split=split).select(range(count)).to_parquet(folder / f"{split}.parquet")


def write_mails(folder: Path) -> None:
    """Mails of a few words, at the place and in the columns of those that `make mail` fetches."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    for split, count in ROWS.items():
        texts = [" ".join(WORDS[(at * 3 + word) % len(WORDS)] for word in range(2 + at % 7)) for at in range(count)]
        data = Dataset.from_dict({"text": texts, "label": [at % 2 for at in range(count)]}, features=features)
        data.to_parquet(folder / f"{split}.parquet")


def write_encoders(folder: Path) -> None:
    """A BERT of as many layers as the MiniLM that `make mail` fetches, without a head and with one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 6}
    config = BertConfig(**sizes, vocab_size=16, max_position_embeddings=64, id2label={0: "ham", 1: "spam"})
    model = BertForSequenceClassification(config)
    vocabulary = {word: at for at, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    for name, each in (("encoder", model.bert), ("minilm-spam", model)):
        each.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
            folder / name
        )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that recipes name, with fewer data; those that are fetched have stand-ins."""
    root = tmp_path_factory.mktemp("tree")
    images = root / "recipes" / "fashion_mnist"
    images.mkdir(parents=True)
    for shipped in sorted((ROOT / "recipes" / "fashion_mnist").iterdir()):
        if shipped.name.startswith("target-"):
            write_images(images / shipped.name)
        elif (shipped / "config.json").exists():
            (images / shipped.name).symlink_to(shipped)
    mails = root / "data" / "mail"
    write_encoders(mails)
    for name in ("source", *(f"{kind}-{draw}" for kind in ("easy", "hard") for draw in range(3))):
        write_mails(mails / name)
    return root


def shortened(keys: dict[str, Any]) -> dict[str, Any]:
    """The same recipe with two steps, one seed, one rate and one draw."""
    first = {key: keys[key][:1] for key in ("rates", "seeds", "draws", "test_data") if key in keys}
    return {**keys, **first, "max_steps": 2, "use_cpu": True}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["surgical-peft", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_all_are_found() -> None:
    counts = {command: sum(command_of(name) == command for name in NAMES) for command in ("train", "search", "compare")}
    assert counts == {"train": 10, "search": 4, "compare": 4}


@pytest.mark.parametrize("name", [name for name in NAMES if not is_tiny(name)])
def test_two_steps(name: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = shortened(keys_of(name))
    recipe = tree / "recipes" / name
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    assert run(monkeypatch, command_of(name), str(recipe), "--output", str(tmp_path)) == 0
    if command_of(name) == "compare":
        report = json.loads((tmp_path / "comparison" / "report.json").read_text())
        assert len(report["rows"]) == len(keys["methods"])
        assert all(len(row["test"]) == 1 for row in report["rows"])
    elif command_of(name) == "search":
        result = json.loads((tmp_path / "search" / "search.json").read_text())
        assert result["trials"]
    else:
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["rates"]["steps"] == 2 and set(report["after"]) == {"validation", "test"}
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 100
        assert (tmp_path / "adapter" / "README.md").exists()
