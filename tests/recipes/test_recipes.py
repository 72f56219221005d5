"""Every recipe that ships runs two steps by the command it is made for, and its header says what to expect."""

from __future__ import annotations

import ast
import functools
import gc
import itertools
import json
import re
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from surgical_peft.experiments.compare.comparison import Comparison
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.recipe.yaml_file import StrictLoader
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.tasks.tiny_data import TEXT_CONFIG, save_tokenizer
from surgical_peft.experiments.training.source_data import SHIFTS
from tests.support.cli import run

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT / "recipes").as_posix() for path in PATHS]
MADE_BY = {
    "mail/source.yaml": "make mail",
    "real/vit_s14_source.yaml": "make real-sources",
}  # what runs a recipe that nobody runs by itself
NOT_MEASURED = [
    "real/cifar10_c_online.yaml",
    "hub/bert_base_conll2003.yaml",
    "hub/distilbert_rotten_tomatoes.yaml",
    "hub/distilbert_squad.yaml",
    "hub/smollm2_smoltalk.yaml",
    "hub/t5_small_dialogsum.yaml",
    "hub/tinyllama_dialogsum.yaml",
    "hub/vit_base_beans.yaml",
    "real/smollm2_gsm8k.yaml",
    "real/vit_s14_source.yaml",
]
ROWS = {"train": 48, "validation": 12, "test": 12}
WORDS = ("free", "money", "win", "now", "meeting", "at", "noon", "minutes", "attached", "unsubscribe")


@functools.cache
def keys_of(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / "recipes" / name).read_text(encoding="utf-8"), Loader=StrictLoader)


def command_of(name: str) -> str:
    """The command that a recipe is made for."""
    keys = keys_of(name)
    return "compare" if "methods" in keys else "search" if "procedure" in keys else "train"


COMPARISONS = [name for name in NAMES if command_of(name) == "compare"]


def header_of(name: str) -> str:
    """The comment that a recipe begins with, as one line."""
    lines = (ROOT / "recipes" / name).read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def is_tiny(name: str) -> bool:
    """Whether its model and data lie on the Hub, so that its tiny mode is run."""
    return name.startswith("hub/")


def write_images(folder: Path) -> None:
    """The first images of a shipped data set."""
    shipped = ROOT / "recipes" / "fashion_mnist" / folder.name
    for split, count in ROWS.items():
        load_dataset(str(shipped), split=split).select(range(count)).to_parquet(folder / f"{split}.parquet")


def write_photos(folder: Path) -> None:
    """Color images of ten classes, as `recipes/real/make_cifar10.py` writes them."""
    features = Features({"image": Image(), "label": ClassLabel(names=list("abcdefghij"))})
    rng = np.random.default_rng(0)
    for split, count in ROWS.items():
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        data = Dataset.from_dict({"image": list(images), "label": [at % 10 for at in range(count)]}, features=features)
        data.to_parquet(folder / f"{split}.parquet")


def write_resnet(folder: Path) -> None:
    """A smaller ResNet of the form of the one that `recipes/real/make_resnet26.py` trains."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate("abcdefghij")),
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_vit(folder: Path) -> None:
    """A smaller encoder of the kind of the ViT-S/14 that `make real-data` fetches."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=16
    )
    Dinov2Model(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


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
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        **sizes, num_hidden_layers=6, vocab_size=16, max_position_embeddings=64, id2label={0: "ham", 1: "spam"}
    )
    model = BertForSequenceClassification(config)
    vocabulary = {word: at for at, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    for name, each in (("encoder", model.bert), ("minilm-spam", model)):
        each.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
            folder / name
        )


def write_problems(folder: Path) -> None:
    """A Llama whose head is its embeddings, like SmolLM2, and what `make real-data` writes for it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **TEXT_CONFIG, tie_word_embeddings=True))
    model.save_pretrained(folder / "smollm2")
    save_tokenizer(model.config, folder / "smollm2")
    rows = [{"prompt": f"Question: {WORDS[at % 9]}?\nAnswer:", "completion": f" it is {at}"} for at in range(12)]
    for name, split, every in (
        *(("gsm8k", split, rows) for split in ROWS),
        ("prose", "test", [{"text": " ".join(WORDS)}] * 3),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, every)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that recipes name, with fewer data; those that are fetched have stand-ins."""
    gc.freeze()  # Trainer looks through all that was imported for garbage, after each of the many short trainings
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
    write_resnet(root / "recipes" / "real" / "resnet26")
    for name in ("cifar10/0", "cifar10-c/frost-0"):
        write_photos(root / "data" / "real" / name)
    write_photos(root / "data" / "real" / "cifar10" / "source")
    write_vit(root / "data" / "real" / "vit-s14")
    write_problems(root / "data" / "real")
    return root


@pytest.fixture(scope="module")
def shown_classes() -> dict[str, list[str]]:
    """The classes of the test images of each shipped data set."""
    found = {}
    for folder in sorted((ROOT / "recipes" / "fashion_mnist").glob("target-*")):
        data = load_dataset(str(folder), split="test")
        found[folder.name] = [data.features["label"].int2str(label) for label in data["label"]]
    return found


def share_of(name: str) -> list[Any]:
    """The methods that a comparison has to run: all would take long, so those of one task share them out."""
    if keys_of(name).get("task") == "causal_lm":  # the only one; most methods run in others or in the contract
        return keys_of(name)["methods"][1:2] + keys_of(name)["methods"][3::9]
    alike = [each for each in COMPARISONS if keys_of(each).get("task") == keys_of(name).get("task")]
    every: list[Any] = []
    for each in alike:
        every += [method for method in keys_of(each)["methods"] if method not in ("full", *every)]
    taken: list[Any] = ["full"]
    for number, method in enumerate(every):
        having = [each for each in alike if method in keys_of(each)["methods"]]
        taken += [method] if having[number % len(having)] == name else []
    return taken


def shortened(name: str) -> dict[str, Any]:
    """The same recipe with two steps, the first only of its seeds, rates and draws, and its share of methods."""
    keys = keys_of(name)
    first: dict[str, Any] = {key: keys[key][:1] for key in ("rates", "seeds", "draws", "test_data") if key in keys}
    first |= {"methods": share_of(name)} if "methods" in keys else {}
    if keys.get("procedure") == "greedy_forward":
        first |= {"folds": 2, "procedure_options": {**keys["procedure_options"], "num_blocks": 1}}
    first |= {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}
    first |= {"max_new_tokens": 12, "test_metrics": {"exact_number": 2}} if "max_new_tokens" in keys else {}
    if "epochs" in keys.get("policy_options", {}):  # of a first stage: an epoch of one step lets the second begin
        own = {**keys["policy_options"], "epochs": 1}
        first |= {"policy_options": own, "per_device_train_batch_size": sum(ROWS.values())}
    return {key: value for key, value in {**keys, **first}.items() if key not in ("sources", "rate_seeds")}


def check_training(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["rates"]["steps"] == 2 and report["after"].keys() == {"validation", "test"}
    assert 0 < report["tuned_parameters"] <= report["all_parameters"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "adapter" / "README.md").exists()


def test_all_are_found() -> None:
    kinds = Counter("tiny" if is_tiny(name) else command_of(name) for name in NAMES)
    assert kinds == {"train": 14, "search": 4, "compare": 12, "tiny": 7}


@pytest.mark.parametrize("name", [name for name in NAMES if not is_tiny(name)])
def test_two_steps(name: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, command = shortened(name), command_of(name)
    # What a step costs is measured in test_compare.py; here it would be most of the time.
    free = {"ms": 1.0, "peak_bytes": 0.0}
    monkeypatch.setattr(
        "surgical_peft.experiments.compare.jobs.step_costs", lambda trainings, steps: dict.fromkeys(trainings, free)
    )
    recipe = tree / "recipes" / name
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    assert run(monkeypatch, command, str(recipe), "--output", str(tmp_path)) == 0
    if command == "train":
        check_training(tmp_path)
    elif command == "search":
        trials = json.loads((tmp_path / "search" / "search.json").read_text())["trials"]
        assert len(trials) > 5 and all(0 <= trial["metric"] <= 1 for trial in trials)
    else:
        report = json.loads((tmp_path / "comparison" / "report.json").read_text())
        assert len(report["methods"]) == len(keys["methods"])
        assert all(len(row["test"]) == 1 and row["forgotten"] is not None for row in report["methods"])


@pytest.mark.parametrize("name", [name for name in NAMES if is_tiny(name)])
def test_two_steps_of_its_tiny_mode(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(ROOT / "recipes" / name)
    assert run(monkeypatch, command_of(name), recipe, "--tiny", "--output", str(tmp_path)) == 0
    check_training(tmp_path / "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_it_and_what_to_expect(name: str) -> None:
    load_recipe(ROOT / "recipes" / name)
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    for folder in re.findall(r"fashion_mnist/[\w-]+", text):
        assert (ROOT / "recipes" / folder).exists(), folder
    header = header_of(name)
    assert MADE_BY.get(name, f"surgical-peft {command_of(name)} recipes/{name}") in header
    assert is_tiny(name) == ("--tiny" in header)
    expected = header.partition("Expected")[2]
    assert bool(re.search(r"not (yet )?measured", expected)) == (name in NOT_MEASURED), expected
    assert re.search(r"\d", expected) or name in NOT_MEASURED


def test_what_is_expected_is_what_three_draws_gave() -> None:
    """The figures of the headers are those of `python benchmarks/recipes.py`, the first draw's those of the cards."""
    rows = json.loads((ROOT / "benchmarks" / "recipes.json").read_text(encoding="utf-8"))
    recipes = [row for row in rows if "," not in row["recipe"]]
    trained = [Path(name).stem for name in NAMES if command_of(name) == "train" and "/" not in name]
    assert [row["recipe"] for row in recipes] == trained
    for row in rows:
        name, _, other = row["recipe"].partition(", ")
        header = header_of(f"{name}.yaml")
        mean, before = (100 * statistics.fmean(row[key]) for key in ("after", "before"))
        told = f"{mean:.1f} ± {100 * statistics.stdev(row['after']):.1f}"
        assert told in header if other else f"{told} % over three draws, from {before:.1f} before" in header
        if not other:
            card = json.loads((ROOT / "model_cards" / name / "report.json").read_text(encoding="utf-8"))
            assert header.rstrip(".").endswith(f"gives {100 * row['after'][0]:.1f}")
            assert card["after"]["test"] == pytest.approx(row["after"][0], abs=2e-3)  # on another machine, perhaps


def commands_of(path: Path) -> list[str]:
    """The lines of a recipe's header that are set off: what to copy into a shell."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse("\n".join(lines))) or ""
        return [line.strip() for line in text.splitlines() if line.startswith("    ")]
    header = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return [line.lstrip("# ") for line in header if line.startswith("#   ")]


def test_the_commands_of_headers_can_be_copied() -> None:
    """`--tiny    (no network: ...)` was a syntax error for bash."""
    commands = {
        path.name: commands_of(path)
        for path in [*PATHS, *(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "real").glob("*.py")]
    }
    assert all(commands[Path(name).name] for name in NAMES if name not in MADE_BY)
    assert commands["trl_sft.py"] and commands["chat_sft.py"] and commands["dpo.py"]
    text = "\n".join(command for every in commands.values() for command in every)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr


def test_every_comparison_measures_all_images(shown_classes: dict[str, list[str]]) -> None:
    for name in (each for each in COMPARISONS if "/" not in each):
        comparison = Comparison(load_recipe(ROOT / "recipes" / name))
        assert len(comparison.methods) == (10 if "headline" in name else 32)
        assert len(comparison.seeds) == len(comparison.recipe.draws or [])
        unshifted = comparison.source_recipe(0)
        assert any(getattr(unshifted, key) != getattr(comparison.recipe, key) for key in ("data", *SHIFTS))
        if comparison.recipe.task == "image_classification":
            names = [Path(each).name for each in comparison.recipe.test_data or []]
            shown = comparison.recipe.label_map if "subclass" in name else None
            tested = [label for each in names for label in shown_classes[each] if shown is None or label in shown]
            assert len(tested) == (4000 if "subclass" in name else 10_000)


def test_counts_of_two_stages_are_those_of_its_images() -> None:
    recipe = load_recipe(ROOT / "recipes" / "imbalance_two_stages.yaml")
    train = load_task(recipe, ("train",)).splits["train"]
    counts = Counter(int(train[place]["labels"]) for place in range(len(train)))
    assert recipe.policy_options["counts"] == [counts[label] for label in range(10)]


def test_every_training_has_its_card() -> None:
    """`make cards` makes them; `experiments/training/test_card.py` compares each with its report and its recipe."""
    trained = [Path(name).stem for name in NAMES if command_of(name) == "train" and "/" not in name]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^CARDS := (.*)$", makefile, re.MULTILINE) == [" ".join(trained)]
    assert sorted(path.parent.name for path in (ROOT / "model_cards").glob("*/README.md")) == trained
