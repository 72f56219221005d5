"""The model card: of a training from its report, and of any adapter wherever PEFT writes a README.md."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli.main import main
from surgical_peft.criteria.criterion import GIVEN_UP, GUESSED
from surgical_peft.experiments import tasks
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training import card
from surgical_peft.experiments.training.card import write_card
from surgical_peft.experiments.training.provenance import identity
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.experiments.training.train import train
from surgical_peft.export import adapter_card
from surgical_peft.export.adapter_card import keep_cards, origin
from surgical_peft.export.card_text import BEGIN, END, HERE, AdapterInfo, describe
from surgical_peft.scoring.block_scores import MARKS
from tests.support.families import FAMILIES
from tests.support.toy_tasks import TOY_TASKS
from tests.support.toys import Toy

RECIPES = Path(__file__).parents[3] / "recipes"


def short_recipe() -> Recipe:
    recipe = load_recipe(RECIPES / "auto.yaml")
    return replace(recipe, num_blocks=1, num_batches=2, training={**recipe.training, "max_steps": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training by the recipe that chooses its blocks itself."""
    folder = tmp_path_factory.mktemp("runs") / "auto"
    recipe = short_recipe()

    def small(recipe: Recipe) -> Any:
        task = load_task(recipe)
        return replace(task, splits={name: [each[i] for i in range(100)] for name, each in task.splits.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgical_peft.experiments.training.train.load_task", small)
        train(recipe, folder)
    return folder


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def make_card(report: dict[str, Any]) -> ModelCard:
    return card.make_card(TrainingReport.from_json(report))


def on_the_hub(report: dict[str, Any]) -> dict[str, Any]:
    """The same report, had model and data come from the Hub."""
    report = copy.deepcopy(report)
    report["recipe"] |= {"model": "google/vit", "data": "someone/clothes"}
    report["base_model"] |= {"on_hub": True, "commit": "a" * 40}
    report["dataset"] |= {"on_hub": True, "commit": "b" * 40, "fingerprint": None}
    return report


def test_the_card_says_what_the_report_says(run: Path, report: dict[str, Any]) -> None:
    text = (run / "adapter" / "README.md").read_text()
    for split in ("validation", "test"):
        assert f"| {split} | 100 | {report['before'][split]:.4f} | {report['after'][split]:.4f} |" in text
    share = report["tuned_parameters"] / 205_962
    assert f"{report['tuned_parameters']:,} of 205,962 parameters, {share:.1%}" in text
    for block, score in report["selection"]["scores"].items():
        mark = MARKS.get(report["selection"].get("basis", {}).get(block, ""), "")
        assert f"| `{block}` | {score:.4g}{mark} |" in text
    for each in (
        f"Tuned in full: the block `{report['blocks'][0]}`**",
        "![The scores by which the blocks were chosen](scores.png)",
        f"fingerprint of the weights that were tuned: `{report['base_model']['fingerprint']}`",
        f"digest of its files: `{report['dataset']['fingerprint']}`. Examples: 100 train, 100 validation, 100 test.",
        "`label_map: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]`",
        "Labels of the model: T-shirt/top, Trouser,",
        "| learning rate | 0.01 |",
        "| policy | none",
        "with seed 0",
        *(f"- {'PEFT' if name == 'peft' else name} {number}\n" for name, number in report["versions"].items()),
        report["date"],
        "import surgical_peft  # registers",
        "--format peft",
    ):
        assert each in text, each
    assert (run / "adapter" / "scores.png").read_bytes() == (run / "scores.png").read_bytes()
    assert str(RECIPES.parent) not in text  # nobody has to know where it was trained
    assert "None" not in text and "{{" not in text and "\n\n\n" not in text


def test_the_recipe_in_the_card_is_the_recipe(report: dict[str, Any], tmp_path: Path) -> None:
    shown = re.search(r"```yaml\n(.*?)```", str(make_card(report)), re.DOTALL)
    assert shown is not None
    (tmp_path / "again.yaml").write_text(shown.group(1).replace("fashion_mnist", str(RECIPES / "fashion_mnist")))
    assert load_recipe(tmp_path / "again.yaml") == short_recipe()


def test_metadata_reads_back(run: Path, report: dict[str, Any]) -> None:
    data = metadata_load(run / "adapter" / "README.md")
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "image-classification"
    assert data["metrics"] == ["accuracy"] and "surgical-fine-tuning" in data["tags"]
    assert "base_model" not in data and "datasets" not in data  # they are folders, which the Hub would refuse
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "auto"
    assert {each.dataset_split: each.metric_value for each in results} == report["after"]
    assert {(each.task_type, each.metric_type) for each in results} == {("image-classification", "accuracy")}


def test_what_is_from_the_hub_is_linked(report: dict[str, Any]) -> None:
    card = make_card(on_the_hub(report))
    assert card.data.base_model == "google/vit" and card.data.datasets == ["someone/clothes"]
    assert card.data.eval_results[0].dataset_revision == "b" * 40
    text = str(card)
    assert f"[google/vit](https://huggingface.co/google/vit), commit `{'a' * 40}`" in text
    assert f'ViTForImageClassification.from_pretrained("google/vit", revision="{"a" * 40}")' in text
    assert f"(https://huggingface.co/datasets/someone/clothes), commit `{'b' * 40}`" in text


def test_a_policy_is_shown_with_its_options(report: dict[str, Any]) -> None:
    said = {"policy": "auto_rgn", "policy_options": {"every": "epoch", "num_batches": 5}}
    report["rates"] |= said
    report["recipe"] |= said
    assert "| policy | `auto_rgn(every='epoch', num_batches=5)` |" in str(make_card(report))


@pytest.mark.parametrize("task", tasks.__all__)
def test_every_task_gets_a_card(task: str, tmp_path: Path) -> None:
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    blocks = ["decoder.1"] if task == "seq2seq" else [-1]
    recipe = replace(TOY_TASKS[task](tmp_path / "made"), blocks=blocks, training=training)
    report = train(recipe, tmp_path / "run")
    made = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    results = {each.dataset_split: (each.metric_type, each.metric_value) for each in made.data.eval_results}
    assert results == {split: (report.metric, value) for split, value in report.after.items()}
    assert ("Labels of the model" in made.text) == ("classification" in task)
    assert f"import {report.base_model.class_}\n" in made.text
    assert str(tmp_path) not in made.text.partition("```yaml")[0]


COMMITTED = sorted((RECIPES.parent / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_card_is_that_of_its_report(path: Path) -> None:
    report = json.loads((path.parent / "report.json").read_text())
    assert TrainingReport.from_json(report).to_json() == report
    assert path.read_text() == f"{make_card(report)}\n"
    assert report["recipe"] == load_recipe(RECIPES / f"{path.parent.name}.yaml").keys()
    assert (path.parent / "scores.png").exists() == bool(report["plot"])


def leaves(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values in nested dictionaries."""
    if not isinstance(part, dict):
        yield path, part
        return
    for key, value in part.items():
        yield from leaves(value, (*path, key))


def holder(report: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        report = report[key]
    return report


def test_no_number_is_guessed(report: dict[str, Any]) -> None:
    """Each number of a report in turn missing, null, infinite and text: an error that names it."""
    numbers = [path for path, value in leaves(report) if isinstance(value, int | float) and path[0] != "recipe"]
    numbers = [path for path in numbers if path[-1] not in ("on_hub", "in_pipeline")]
    assert len(numbers) == 30, numbers
    for path in numbers:
        name = re.escape(".".join(path))
        for wrong in (None, float("nan"), float("inf"), "0.9", True):
            broken = copy.deepcopy(report)
            holder(broken, path)[path[-1]] = wrong
            with pytest.raises(SurgicalError, match=name):
                make_card(broken)
        broken = copy.deepcopy(report)
        del holder(broken, path)[path[-1]]
        with pytest.raises(SurgicalError, match=name):
            make_card(broken)


def test_scores_stand_in_the_order_of_the_model_with_their_marks(report: dict[str, Any]) -> None:
    """An adapter's config has them by name, and so 10 before 2."""
    scores = {"embeddings": 0.1, **{str(layer): layer / 10 for layer in range(12)}, "head": 0.5}
    loss = {"11": 1.0, "9": 0.9, "10": 0.8}  # as they joined would be 11, 10, 9
    selection = {**report["selection"], "scores": scores, "joint_loss": loss, "basis": {"3": GUESSED, "10": GIVEN_UP}}
    read = json.loads(json.dumps(selection, sort_keys=True))
    text = describe([AdapterInfo(["11"], None, ["layer.11"], None, None, read, None, "base", None, False, None)])
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(scores)
    assert dict(rows)["3"] == "0.3?" and dict(rows)["10"] == "1~" and dict(rows)["4"] == "0.4"
    assert "guessed" in text and "given up" in text
    assert text.index("`11` 1") < text.index("`10` 0.8") < text.index("`9` 0.9")


def test_nothing_else_is_guessed(report: dict[str, Any]) -> None:
    """Any other key of the report that the card reads, missing: an error that names it, not an empty place."""
    for key in report.keys() - {"adapter", "pipeline", "in_pipeline"}:
        broken = {name: value for name, value in report.items() if name != key}
        with pytest.raises(SurgicalError, match=f"has no {key}"):
            make_card(broken)
    parts = {
        "base_model": {},
        "rates": {"policy_options"},
        "dataset": {"commit", "summary"},
        "versions": {},
        "selection": {"basis", "cost"},
    }
    for part, keys in parts.items():
        for key in report[part].keys() - keys:  # for a policy, for data of the Hub, and for a budget
            broken = {**report, part: {name: value for name, value in report[part].items() if name != key}}
            with pytest.raises(SurgicalError, match=rf"has no {part}\.{key}"):
                make_card(broken)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("selection", None),
        ("selection.scores", {}),
        ("scored", None),
        ("scored", ["0", "none"]),
        ("plot", None),
        ("blocks", float("nan")),
        ("blocks", [float("nan")]),
        ("dataset.shift", float("nan")),
        ("dataset.shift", {}),
        ("dataset.shift", {"label_map": [1, 0]}),
        ("dataset.labels", 3),
        ("dataset.examples", []),
        ("rates.policy", "auto_rgn"),
        ("versions", {}),
        ("base_model.fingerprint", 3),
        ("base_model.new_labels", "three"),
        ("modules_to_save", "classifier"),
    ],
)
def test_what_is_of_a_wrong_kind_is_named(report: dict[str, Any], path: str, wrong: Any) -> None:
    """It was a card without that, or a traceback."""
    *_, key = keys = tuple(path.split("."))
    holder(report, keys)[key] = wrong
    with pytest.raises(SurgicalError, match="selection.scores.none" if wrong == ["0", "none"] else path):
        make_card(report)


@pytest.mark.parametrize("options", [[1], None, {"every": "step"}])
def test_the_policy_is_that_of_the_recipe(report: dict[str, Any], options: Any) -> None:
    report["recipe"] |= {"policy": "auto_rgn", "policy_options": {"every": "epoch"}}
    with pytest.raises(SurgicalError, match=r"rates\.policy is None.*'auto_rgn'"):
        make_card(report)
    report["rates"] |= {"policy": "auto_rgn", "policy_options": options}
    with pytest.raises(SurgicalError, match=r"rates\.policy_options is"):
        make_card(report)
    report["recipe"]["policy_options"] = options
    if not isinstance(options, dict):
        with pytest.raises(SurgicalError, match=r"rates\.policy_options.*keys"):
            make_card(report)


def test_the_numbers_of_a_shift_are_there(report: dict[str, Any]) -> None:
    report["recipe"] |= {"corruption": "gaussian_noise"}
    shift = report["dataset"]["shift"]
    for key, value in (("corruption", "gaussian_noise"), ("severity", 5), ("shift_seed", 0)):
        with pytest.raises(SurgicalError, match=rf"dataset\.shift\.{key}"):
            make_card(report)
        shift[key] = value
    assert "`severity: 5`" in str(make_card(report))


def test_the_losses_that_told_the_number_of_blocks_are_there() -> None:
    report = json.loads((RECIPES.parent / "model_cards" / "auto" / "report.json").read_text())
    for block in report["selection"]["joint_loss"]:
        broken = copy.deepcopy(report)
        del broken["selection"]["joint_loss"][block]
        with pytest.raises(SurgicalError, match=rf"selection\.joint_loss\.{block}"):
            make_card(broken)


def test_a_card_is_written_whole_or_not_at_all(run: Path, report: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "adapter" / "scores.png").unlink()
    before = (folder / "adapter" / "README.md").read_bytes()
    report["after"]["test"] = None
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(SurgicalError, match=r"after\.test is None"):
        write_card(folder)
    assert (folder / "adapter" / "README.md").read_bytes() == before
    assert not (folder / "adapter" / "scores.png").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "has no adapter"),
        (lambda run: (run / "report.json").unlink(), "has no report.json"),
        (lambda run: (run / "report.json").write_text("{"), "JSON"),
        (lambda run: (run / "scores.png").unlink(), "has no scores.png"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(SurgicalError, match=message):
        write_card(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../scores.png", "adapter/x.png", "README.md", ".x.png", "a b.png", "x.png\n", "x.png)"]
)
def test_a_plot_is_a_picture_in_the_folder_of_the_run(report: dict[str, Any], name: str) -> None:
    """It was a path: absolute, it was written to; through a link, what that led to was copied into what is pushed."""
    with pytest.raises(SurgicalError, match="plot"):
        make_card({**report, "plot": name})


def test_a_card_does_not_follow_links(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    plot = tmp_path / "run" / "scores.png"
    plot.unlink()
    plot.symlink_to(tmp_path / "secret")
    with pytest.raises(SurgicalError, match=r"scores\.png"):
        write_card(tmp_path / "run")
    plot.unlink()
    shutil.copyfile(run / "scores.png", plot)
    copied = tmp_path / "run" / "adapter" / "scores.png"
    copied.unlink()
    copied.symlink_to(tmp_path / "secret")
    card = tmp_path / "run" / "adapter" / "README.md"
    card.unlink()
    card.symlink_to(tmp_path / "secret")
    write_card(tmp_path / "run")
    assert (tmp_path / "secret").read_text() == "secret" and not copied.is_symlink() and not card.is_symlink()
    shutil.move(tmp_path / "run" / "adapter", tmp_path / "elsewhere")
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgicalError, match="link"):
        write_card(tmp_path / "run")


def test_a_card_is_as_private_as_before(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    files = [
        tmp_path / "run" / "scores.png",
        *(tmp_path / "run" / "adapter" / name for name in ("README.md", "scores.png")),
    ]
    for file in files:
        file.chmod(0o600)
    write_card(tmp_path / "run")
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 3
    files[2].unlink()
    write_card(tmp_path / "run")
    assert files[2].stat().st_mode & 0o777 == 0o600


def test_a_card_says_no_absolute_path(report: dict[str, Any]) -> None:
    hidden = "/home/someone/Secret-Client"
    report["recipe"] |= {"model": f"{hidden}/vit", "data": f"{hidden}/photos", "output_dir": f"{hidden}/runs"}
    report["recipe"] |= {
        "metric": f"{hidden}/mine:first",
        "source_data": {"data": f"{hidden}/old"},
        "hub_token": "hf_x",
    }
    report["dataset"]["summary"] = [f"read from {hidden}/photos"]
    report["metric"] = f"{hidden}/mine:first"
    text = str(make_card(report))
    assert "Secret" not in text and "hf_x" not in text
    assert "`vit`" in text and "read from photos" in text and "| mine:first |" in text


def test_the_command_writes_it_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "README.md"
    before = path.read_text()
    path.unlink()
    monkeypatch.setattr("sys.argv", ["surgical-peft", "card", str(tmp_path / "run"), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out) == {"card": str(path)}
    assert path.read_text() == before


def test_saving_again_keeps_the_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    before = ModelCard.load(card)
    model = PeftModel.from_pretrained(
        load_task(load_recipe(RECIPES / "auto.yaml"), ("train",)).load_model(), tmp_path / "adapter"
    )
    model.save_pretrained(tmp_path / "adapter")
    after = ModelCard.load(card)
    assert after.text.partition(END)[2].strip() == before.text.partition(END)[2].strip()  # results, data, rates
    assert after.text.count(BEGIN) == 1 and "How the blocks were chosen" in after.text
    assert after.data.eval_results == before.data.eval_results
    assert set(before.data.tags) <= set(after.data.tags)
    assert "base_model" not in after.data.to_dict()


def test_identity_of_data_that_is_nowhere() -> None:
    with pytest.raises(SurgicalError, match="'none'"):
        identity("none")


def test_identity_of_data_is_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.csv").write_text("text,label\n")
    one, same = identity(str(tmp_path / "a")), identity(str(tmp_path / "b"))
    assert one == same and one["fingerprint"].startswith("sha256:") and not one["on_hub"]
    (tmp_path / "b" / "sub" / "x.csv").write_text("text,label,\n")
    assert identity(str(tmp_path / "b")) != one
    assert identity(str(tmp_path / "a" / "sub" / "x.csv"))["fingerprint"] != one["fingerprint"]


def test_keys_of_a_recipe_made_in_python() -> None:
    recipe = Recipe(model="m", data="d", blocks=[0], training={"seed": 1})
    assert recipe.keys() == {"model": "m", "data": "d", "blocks": [0], "seed": 1}


# Of an adapter that was trained in Python.


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_without_a_training_is_no_form_to_fill_in(vit: Toy, tmp_path: Path) -> None:
    get_peft_model(vit.model(), SurgicalConfig(blocks=[0, -1])).save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert "Tuned in full: the blocks `0`, `11`** (modules `vit.layers.0`, `vit.layers.11`)" in text
    assert "needed" not in text.lower() and "from transformers import ViTForImageClassification" in text
    assert metadata_load(tmp_path / "README.md")["tags"] == ["surgical-fine-tuning", "transformers"]
    assert "base_model" not in metadata_load(tmp_path / "README.md")


def test_the_card_follows_what_is_tuned_and_leaves_the_rest(vit: Toy, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nIt knows **cats**.\n")
    for blocks in ([0], [0], [3, 4]):
        get_peft_model(vit.model(), SurgicalConfig(blocks=blocks)).save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert text.count(BEGIN) == text.count(END) == 1
    assert "the blocks `3`, `4`**" in text and "the block `0`" not in text
    assert "# My model\n\nIt knows **cats**.\n" in text
    assert text.index(HERE) < text.index("# My model")  # what loading needs comes first
    data = metadata_load(card)
    assert data["license"] == "mit" and set(data["tags"]) == {"mine", "surgical-fine-tuning", "transformers"}


def test_a_base_model_that_was_named_by_hand_stays(vit: Toy, tmp_path: Path) -> None:
    model = vit.model()
    model.name_or_path = model.config._name_or_path = "/a/copy/of/it"
    card = tmp_path / "README.md"
    for said in ("google/vit", "/a/copy/of/it"):  # the second is what PEFT writes without us
        card.write_text(f"---\nbase_model: {said}\ntags:\n- base_model:adapter:{said}\n---\n\n# My model\n")
        get_peft_model(copy.deepcopy(model), SurgicalConfig(blocks=[0])).save_pretrained(tmp_path)
        data = metadata_load(card)
        assert data.get("base_model") == (said if said == "google/vit" else None)
        assert data["tags"] == ["surgical-fine-tuning", "transformers"]
    assert "Base model: `it`, which is not from the Hub" in card.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": [0], "target_modules": ["attention"]}, "the block `0`, there `attention`**"),
        ({"target_modules": {"0": "all", "2": ["mlp"]}}, "there in `0`: `all`; in `2`: `mlp`**"),
        ({"target_modules": ["layers.0.mlp"]}, "Tuned in full: the modules `vit.layers.0.mlp`**"),
        ({"blocks": [0], "modules_to_save": ["classifier"]}, "new and trained as well: `classifier`"),
        (
            {"blocks": [0], "selection": {"procedure": "sweep()", "metric": 0.5, "odd": [1]}},
            "procedure `sweep()`, metric",
        ),
        ({"blocks": [0], "selection": {"scores": {"0": 1.0}, "criterion": "rgn"}}, "| `0` | 1 |"),
    ],
)
def test_every_kind_of_choice_is_said(vit: Toy, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    get_peft_model(vit.model(), SurgicalConfig(**options)).save_pretrained(tmp_path)
    assert said in text_of(tmp_path)


class Renamed(ViTForImageClassification):
    """A classifier whose name does not say so."""


def test_a_new_head_is_known_by_what_it_is(vit: Toy, tmp_path: Path) -> None:
    model = vit.model()
    model.__class__ = Renamed
    get_peft_model(model, SurgicalConfig(blocks=[0], modules_to_save=["classifier"])).save_pretrained(tmp_path)
    assert "num_labels=3" in text_of(tmp_path)
    get_peft_model(vit.model(), SurgicalConfig(blocks=[0], modules_to_save=["layernorm"])).save_pretrained(tmp_path)
    assert "num_labels" not in text_of(tmp_path)


def test_a_new_head_is_made_before_loading(vit: Toy, tmp_path: Path) -> None:
    get_peft_model(vit.model(), SurgicalConfig(blocks=[0], modules_to_save=["classifier"])).save_pretrained(tmp_path)
    assert '("folder of the base model", num_labels=3, ignore_mismatched_sizes=True)' in text_of(tmp_path)


def test_many_modules_are_not_all_listed(vit: Toy, tmp_path: Path) -> None:
    config = SurgicalConfig(target_modules=["layernorm_before", "layernorm_after", "layernorm"])
    get_peft_model(vit.model(), config).save_pretrained(tmp_path)
    assert " and 5 more" in text_of(tmp_path)  # of 2 in each of 12 layers, and the last


def test_lora_beside_is_said_and_not_loaded_as_plain_weights(vit: Toy, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(vit.model(), SurgicalConfig(blocks=[0], lora=lora)).save_pretrained(tmp_path)
    assert "in the rest is LoRA" in text_of(tmp_path) and "load_state_dict" not in text_of(tmp_path)


def test_several_adapters_are_told_apart(vit: Toy, tmp_path: Path) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0]), adapter_name="first")
    model.add_adapter("second", SurgicalConfig(blocks=[5]))
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert "Adapter `first`: **Tuned in full: the block `0`" in text
    assert "Adapter `second`: **Tuned in full: the block `5`" in text
    assert f'"{HERE}", subfolder="first")' in text and '"first/adapter_model.safetensors"' in text


@pytest.mark.parametrize("saved", [["classifier"], None])
def test_the_code_of_a_card_runs_from_top_to_bottom(
    saved: list[str] | None, vit: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would. The second part failed after the first, in which PEFT had wrapped `base_model` in place."""
    vit.model().save_pretrained(tmp_path / "folder of the base model")
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0], modules_to_save=saved))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"```python\n(.*?)```", text_of(tmp_path), re.DOTALL)
    assert len(parts) == 2
    reader: dict[str, Any] = {}
    logits = []
    for part, name in zip(parts, ("model", "base_model"), strict=True):
        exec(part.replace(HERE, "."), reader)
        logits.append(reader[name].eval()(**vit.batch()).logits)
    expected = model.eval()(**vit.batch()).logits
    assert torch.equal(logits[0], expected) and torch.equal(logits[1], expected)


def test_the_card_of_trainer_is_true(vit: Toy, tmp_path: Path) -> None:
    """What `push_to_hub` does before it uploads: Trainer's card over ours, then PEFT's additions."""
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0]))
    examples = [{name: tensor[i] for name, tensor in vit.batch().items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=examples)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = text_of(tmp_path)
    assert text.count(BEGIN) == 1 and "the block `0`**" in text
    assert "learning_rate: 5e-05" in text and "from scratch" not in text


def test_cards_of_other_methods_are_as_without_us(vit: Toy, tmp_path: Path) -> None:
    model = get_peft_model(vit.model(), LoraConfig(target_modules=["q_proj"]))
    model.create_or_update_model_card(str(tmp_path / "ours"))
    PeftModel.create_or_update_model_card._surgical_original(model, str(tmp_path / "theirs"))
    assert text_of(tmp_path / "ours") == text_of(tmp_path / "theirs") and BEGIN not in text_of(tmp_path / "ours")


def test_hooks_are_hung_once() -> None:
    theirs = PeftModel.create_or_update_model_card._surgical_original
    keep_cards()
    importlib.reload(adapter_card).keep_cards()
    assert PeftModel.create_or_update_model_card._surgical_original is theirs
    assert not hasattr(theirs, "_surgical_original")


def test_where_a_model_is_from(tmp_path: Path) -> None:
    assert origin(str(tmp_path)) == (False, None)
    assert origin("") == (False, None)
    assert origin("/a/folder/that/is/gone") == (False, None)
    assert origin("no-such-user/no-such-model") == (True, None)  # not in the cache


def test_an_adapter_of_a_tied_weight_says_so_and_how_it_is_exported(tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES["llama_tied"].model(), SurgicalConfig(blocks=["embeddings"]))
    model.save_pretrained(tmp_path / "tied")
    text = (tmp_path / "tied" / "README.md").read_text()
    assert "`model.embed_tokens.weight`, `lm_head.weight`" in text
    assert "--format merged" in text and "--format peft" not in text
    get_peft_model(FAMILIES["llama"].model(), SurgicalConfig(blocks=["embeddings"])).save_pretrained(tmp_path / "not")
    assert "--format peft" in (tmp_path / "not" / "README.md").read_text()
