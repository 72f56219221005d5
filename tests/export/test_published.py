"""What is published works elsewhere: adapter and merged folders with their processor, label names and card."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import metadata_load
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForSequenceClassification, AutoProcessor, BertForSequenceClassification, pipeline

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.training.train import train
from surgical_peft.export.card_text import HERE
from surgical_peft.export.export import export
from tests.support.toy_tasks import TOY_TASKS
from tests.support.toys import TOYS

NAMES = ["cat", "dog", "owl", "pig"]
IMAGE = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
INPUTS: dict[str, Any] = {"image_classification": IMAGE, "text_classification": "free money at noon"}


def renamed(recipe: Recipe) -> Recipe:
    """The recipe for data with four named classes, which its model does not have."""
    for file in Path(recipe.data).glob("*.parquet"):
        rows = Dataset.from_parquet(str(file))
        names = [NAMES[number % len(NAMES)] for number in range(len(rows))]
        rows.remove_columns("label").add_column("label", names).to_parquet(str(file))
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    return replace(recipe, new_head=True, blocks=["head"], training=training)


@pytest.fixture(scope="module", params=INPUTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recipe, Path]:
    """The folder of a training with a new head; only the head is tuned."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = renamed(TOY_TASKS[request.param](folder))
    train(recipe, folder / "run")
    export(folder / "run" / "adapter", folder / "merged", "merged")
    export(folder / "run" / "adapter", folder / "peft", "peft")
    return request.param, recipe, folder


def code_of(card: Path, base: str, here: str) -> list[str]:
    text = card.read_text(encoding="utf-8").replace("folder of the base model", base).replace(HERE, here)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_code_of_the_card_runs(run: tuple[str, Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It warned of another base and predicted LABEL_0."""
    task, recipe, folder = run
    adapter = folder / "run" / "adapter"
    monkeypatch.chdir(adapter)
    reader: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*fingerprint")
        for part in code_of(adapter / "README.md", recipe.model, "."):
            exec(part, reader)
    assert list(reader["model"].config.id2label.values()) == NAMES
    assert reader["base_model"].config.label2id == {name: label for label, name in enumerate(NAMES)}
    top = reader["predict"](INPUTS[task])[0]
    assert top["label"] in NAMES
    alone = pipeline(task.replace("_", "-"), model=str(folder / "merged"))(INPUTS[task])[0]  # type: ignore[call-overload]
    assert alone["label"] == top["label"] and alone["score"] == pytest.approx(top["score"], abs=1e-5)


@pytest.mark.parametrize(("out", "library"), [("run/adapter", "peft"), ("peft", "peft"), ("merged", "transformers")])
def test_a_folder_has_what_serves_it(out: str, library: str, run: tuple[str, Recipe, Path]) -> None:
    task, recipe, folder = run
    kind = type(AutoProcessor.from_pretrained(recipe.model))
    assert type(AutoProcessor.from_pretrained(folder / out)) is kind
    data = metadata_load(folder / out / "README.md")
    assert data["library_name"] == library and data["pipeline_tag"] == task.replace("_", "-")
    assert data["model-index"]


def test_the_card_of_an_export_runs_without_us(run: tuple[str, Recipe, Path]) -> None:
    _, recipe, folder = run
    for out in ("peft", "merged"):
        reader: dict[str, Any] = {}
        parts = code_of(folder / out / "README.md", recipe.model, str(folder / out))
        exec(parts[0], reader)
        assert len(parts) == 1 and "surgical_peft" not in parts[0]
        assert list((reader.get("model") or reader["predict"].model).config.id2label.values()) == NAMES


def test_an_adapter_that_does_not_note_its_head_is_merged_all_the_same(
    run: tuple[str, Recipe, Path], tmp_path: Path
) -> None:
    """As of versions before, whose export said "'classifier.bias' is float32[4] ... float32[2]"."""
    _, _, folder = run
    shutil.copytree(folder / "run" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_config": None}))
    export(tmp_path / "adapter", tmp_path / "merged", "merged")
    weights = [(at / "merged" / "model.safetensors").read_bytes() for at in (folder, tmp_path)]
    assert weights[0] == weights[1]
    export(folder / "run" / "adapter", tmp_path / "delta", "delta")
    export(tmp_path / "delta", tmp_path / "back", "adapter")
    assert type(AutoProcessor.from_pretrained(tmp_path / "back")) is type(
        AutoProcessor.from_pretrained(folder / "peft")
    )


def test_a_head_that_transformers_made_comes_back_with_its_names(tmp_path: Path) -> None:
    """An encoder and a new head, wrapped by hand: the card's lines had no num_labels, or lost the names."""
    TOYS["bert"].model().bert.save_pretrained(tmp_path / "encoder")  # type: ignore[union-attr,operator]
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path / "encoder", id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    tuned = get_peft_model(model, SurgicalConfig(blocks=["head"]))
    tuned.config.problem_type = "multi_label_classification"  # as the first loss sets it
    tuned.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "num_labels=4" in text and metadata_load(tmp_path / "adapter" / "README.md")["pipeline_tag"]
    base = BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=4)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert list(again.config.id2label.values()) == NAMES
    assert again.config.problem_type == "multi_label_classification"
    with pytest.raises(SurgicalError, match="num_labels=4"):
        PeftModel.from_pretrained(load(tmp_path / "encoder", num_labels=2), tmp_path / "adapter")


def test_names_that_the_checkpoint_lacks_come_along(tmp_path: Path) -> None:
    """Of a trained head that only numbers its labels, where the data or the user name them."""
    recipe = TOY_TASKS["text_classification"](tmp_path)
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    train(replace(recipe, blocks=[-1], training=training), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["head_config"] == {"id2label": {"0": "ham", "1": "spam"}}
    base = AutoModelForSequenceClassification.from_pretrained(recipe.model)
    assert base.config.id2label[0] == "LABEL_0"
    assert PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").config.id2label == {0: "ham", 1: "spam"}
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Labels of the model: ham, spam" in text and "num_labels" not in text


def test_the_problem_that_the_checkpoint_does_not_name_comes_along(tmp_path: Path) -> None:
    """It says what the outputs of a head mean that the base has already."""
    TOYS["bert"].model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path / "base")
    model.config.problem_type = "multi_label_classification"
    get_peft_model(model, SurgicalConfig(blocks=[0])).save_pretrained(tmp_path / "adapter")
    base = load(tmp_path / "base")
    assert base.config.problem_type is None
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert again.config.problem_type == "multi_label_classification"
    with again.disable_adapter():
        assert again.config.problem_type is None


def test_more_than_ten_labels_keep_their_order(tmp_path: Path) -> None:
    """The file sorts its keys as text: 0, 1, 10, 11, 2."""
    names = {label: f"kind {label}" for label in range(12)}
    TOYS["bert"].model().bert.save_pretrained(tmp_path / "encoder")  # type: ignore[union-attr,operator]
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path / "encoder", id2label=names, label2id={name: label for label, name in names.items()})
    get_peft_model(model, SurgicalConfig(blocks=["head"])).save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "encoder", num_labels=12), tmp_path / "adapter")
    assert list(again.config.id2label.items()) == list(names.items())
    assert "10: 'kind 10', 11:" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_active_adapter_names_the_labels(tmp_path: Path) -> None:
    toy = TOYS["bert"]
    for letters in ("abc", "xyz"):
        model: Any = toy.model()
        model.config.id2label = dict(enumerate(letters))
        config = SurgicalConfig(blocks=[0], modules_to_save=["classifier"])
        get_peft_model(model, config).save_pretrained(tmp_path / letters)
    model = PeftModel.from_pretrained(toy.model(), tmp_path / "abc", adapter_name="abc")
    model.load_adapter(tmp_path / "xyz", adapter_name="xyz")
    assert model.config.id2label[0] == "a"
    model.set_adapter("xyz")
    assert model.config.id2label[0] == "x" and model.config.label2id["z"] == 2
    model.save_pretrained(tmp_path / "both")  # each with names of its own, whichever is active
    for letters in ("abc", "xyz"):
        saved = json.loads((tmp_path / "both" / letters / "adapter_config.json").read_text())
        assert list(saved["head_config"]["id2label"].values()) == list(letters)


def test_an_adapter_that_is_active_again_has_its_names_again(tmp_path: Path) -> None:
    """Also one that was made here, whose names were the model's before any adapter was loaded."""
    toy = TOYS["bert"]
    for letters in ("xyz", "abc"):
        model: Any = toy.model()
        model.config.id2label = dict(enumerate(letters))
        model = get_peft_model(model, SurgicalConfig(blocks=[0], modules_to_save=["classifier"]))
        model.save_pretrained(tmp_path / letters)
    model.load_adapter(tmp_path / "xyz", adapter_name="xyz")
    for name, letters in (("xyz", "xyz"), ("default", "abc"), ("xyz", "xyz")):
        model.set_adapter(name)
        assert list(model.config.id2label.values()) == list(letters)
        assert list(model.config.label2id) == list(letters)


def shown(model: Any) -> str:
    return "".join(model.config.id2label.values())


@pytest.fixture
def two_named(tmp_path: Path) -> Any:
    """A model whose labels are called "mno", with a loaded adapter of its own names and one without."""
    model: Any = TOYS["bert"].model()
    model.config.id2label = dict(enumerate("abc"))
    config = SurgicalConfig(blocks=[0], modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained(tmp_path / "named")
    get_peft_model(TOYS["bert"].model(), SurgicalConfig(blocks=[0])).save_pretrained(tmp_path / "unnamed")
    base: Any = TOYS["bert"].model()
    base.config.id2label = dict(enumerate("mno"))
    model = PeftModel.from_pretrained(base, tmp_path / "named", adapter_name="named")
    model.load_adapter(tmp_path / "unnamed", adapter_name="unnamed")
    return model


def test_an_adapter_without_names_has_those_of_the_base(two_named: Any) -> None:
    assert shown(two_named) == "abc"
    two_named.set_adapter("unnamed")
    assert shown(two_named) == "mno"
    two_named.delete_adapter("unnamed")
    assert shown(two_named) == "abc"


@pytest.mark.parametrize("switched", [None, "unnamed"])
def test_the_base_has_its_names_while_adapters_are_disabled(two_named: Any, switched: str | None) -> None:
    two_named.config.id2label = dict(enumerate("uvw"))  # by the user, for the active adapter
    with two_named.disable_adapter():
        assert shown(two_named) == "mno"
        if switched:
            two_named.set_adapter(switched)
            assert shown(two_named) == "mno"
    assert shown(two_named) == ("mno" if switched else "uvw")
    two_named.set_adapter("named")
    assert shown(two_named) == "uvw"


def test_an_unwrapped_model_has_the_names_of_what_is_left_in_it(two_named: Any) -> None:
    assert shown(copy.deepcopy(two_named).unload()) == "mno"
    assert shown(copy.deepcopy(two_named).merge_and_unload()) == "abc"
    assert shown(copy.deepcopy(two_named).merge_and_unload(adapter_names=["unnamed"])) == "mno"
    renamed = copy.deepcopy(two_named)
    renamed.config.id2label = dict(enumerate("uvw"))  # by the user
    assert shown(copy.deepcopy(renamed).merge_and_unload(adapter_names=["named"])) == "uvw"
    with renamed.disable_adapter():
        merged = copy.deepcopy(renamed).merge_and_unload()
    assert shown(merged) == "uvw"
    two_named.delete_adapter("unnamed")
    two_named.delete_adapter("named")
    assert shown(two_named) == "mno"


def test_an_adapter_keeps_its_names_when_it_is_saved_while_it_is_disabled(two_named: Any, tmp_path: Path) -> None:
    with two_named.disable_adapter():
        two_named.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "named" / "adapter_config.json").read_text())
    assert list(saved["head_config"]["id2label"].values()) == list("abc")


@pytest.mark.parametrize("names", [{"x": "y"}, {"0": 1}, {"1": "y"}, ["y"]])
def test_names_that_are_none_of_a_head_are_refused(names: Any) -> None:
    with pytest.raises(SurgicalError, match="head_config"):
        SurgicalConfig(blocks=[0], head_config={"num_labels": 1, "id2label": names})


@pytest.mark.parametrize(
    "head", [{}, {"num_labels": "2"}, {"num_labels": 10**9}, {"num_labels": 2, "problem_type": 1}]
)
def test_what_is_no_head_is_refused(head: dict[str, Any]) -> None:
    with pytest.raises(SurgicalError, match="head_config"):
        SurgicalConfig(blocks=[0], head_config=head)


def test_an_export_follows_no_link_out_of_the_adapter_and_says_not_where_it_was(
    run: tuple[str, Recipe, Path], tmp_path: Path
) -> None:
    _, recipe, folder = run
    hidden = tmp_path / "Secret-Client" / "adapter"
    shutil.copytree(folder / "run" / "adapter", hidden)
    (tmp_path / "secret.png").write_text("secret")
    (hidden / "scores.png").symlink_to(tmp_path / "secret.png")
    (hidden / "README.md").unlink()
    (hidden / "README.md").symlink_to(tmp_path / "secret.png")
    for out in ("merged", "adapter", "peft"):
        export(hidden, tmp_path / out, out, base_model=recipe.model)
        assert not (tmp_path / out / "scores.png").exists()
        texts = [path.read_text() for path in (tmp_path / out).iterdir() if path.suffix in (".json", ".md")]
        assert not any("secret" in text for text in texts) and not any("Secret-Client" in text for text in texts)
