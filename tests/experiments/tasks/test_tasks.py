from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import AutoImageProcessor

from surgical_peft import SurgicalError
from surgical_peft.cli.architectures import model_of_config
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.shifts import gaussian_noise
from surgical_peft.experiments.tasks import Task, load_task
from surgical_peft.experiments.tasks.image_classification import convert
from surgical_peft.experiments.tasks.splits import DataSource
from surgical_peft.experiments.tasks.task import load_or_raise
from tests.support.toy_tasks import TOY_TASKS

SHIPPED = Path(__file__).parents[3] / "recipes" / "fashion_mnist"
RECIPE = Recipe(model=str(SHIPPED / "vit"), data=str(SHIPPED / "target-0"), blocks=[0])


def image_of(split: str, place: int) -> np.ndarray:
    return np.asarray(load_dataset(RECIPE.data)[split][place]["image"])


def processed(pixels: np.ndarray) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(RECIPE.model, backend="pil")
    return processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]


def test_examples_are_what_the_model_takes() -> None:
    task = load_task(RECIPE)
    example = task.splits["train"][0]
    assert example["pixel_values"].shape == (1, 28, 28)
    assert task.load_model()(example["pixel_values"][None]).logits.shape == (1, 10)


def test_the_source_model_knows_the_clean_images() -> None:
    task = load_task(RECIPE)
    examples = [task.splits["test"][index] for index in range(200)]
    with torch.inference_mode():
        logits = task.load_model()(torch.stack([each["pixel_values"] for each in examples])).logits
    assert (logits.argmax(-1) == torch.stack([each["labels"] for each in examples])).float().mean() > 0.82


def test_noise_depends_on_place_split_and_seed_alone() -> None:
    noisy = replace(RECIPE, corruption="gaussian_noise")
    first, second = load_task(noisy).splits, load_task(noisy).splits
    assert torch.equal(first["train"][3]["pixel_values"], second["train"][3]["pixel_values"])
    clean = load_task(RECIPE).splits
    pixels = gaussian_noise(image_of("train", 3), 5, np.random.default_rng((zlib.crc32(b"train"), 3)))
    assert torch.equal(first["train"][3]["pixel_values"], processed(pixels))
    other = load_task(replace(noisy, shift_seed=1), ("train",)).splits
    assert not torch.equal(first["train"][3]["pixel_values"], other["train"][3]["pixel_values"])
    noise = [(first[split][3]["pixel_values"] - clean[split][3]["pixel_values"]) for split in ("train", "test")]
    assert noise[0].std() > 0.3 and not torch.equal(*noise)


def test_labels_are_mapped() -> None:
    flipped = load_task(replace(RECIPE, label_map=list(range(9, -1, -1)))).splits["validation"]
    plain = load_task(RECIPE).splits["validation"]
    assert all(flipped[i]["labels"] == 9 - plain[i]["labels"] for i in range(20))


def test_the_three_draws_share_no_image() -> None:
    """Target draws must be disjoint from each other, split by split: 12,000 different images."""
    seen = set()
    for draw in range(3):
        data = load_dataset(str(SHIPPED / f"target-{draw}"))
        for split in data.values():
            seen |= {np.asarray(image).tobytes() for image in split["image"]}
    assert len(seen) == 12_000


def test_classes_can_be_left_out() -> None:
    """New subclasses of old superclasses; noise stays with the place in the whole split."""
    classes = load_dataset(RECIPE.data)["test"].features["label"].names
    by_name = {classes[3]: 2, classes[4]: 0, classes[6]: 0, classes[9]: 1}
    recipe = replace(RECIPE, model=str(SHIPPED / "vit-superclass"), corruption="gaussian_noise")
    named, listed = (
        load_task(replace(recipe, label_map=each), ("validation",)).splits["validation"]
        for each in (by_name, [None, None, None, 2, 0, None, 0, None, None, 1])
    )
    labels = load_dataset(RECIPE.data)["validation"]["label"]
    places = [place for place, label in enumerate(labels) if label in (3, 4, 6, 9)]
    assert len(named) == len(listed) == len(places)
    for index in (0, 1, 30):
        place = places[index]
        expected = {3: 2, 4: 0, 6: 0, 9: 1}[labels[place]]
        assert named[index]["labels"] == listed[index]["labels"] == expected
        pixels = gaussian_noise(
            image_of("validation", place), 5, np.random.default_rng((zlib.crc32(b"validation"), place))
        )
        assert torch.equal(named[index]["pixel_values"], processed(pixels))


def test_imbalance_is_for_training_alone() -> None:
    splits = load_task(replace(RECIPE, imbalance={3: 0.1, "Coat": 0.5})).splits
    whole = load_task(RECIPE).splits
    counts, before = (
        {split: np.bincount([int(each) for each in splits.labels]) for split, splits in every.items()}  # type: ignore[attr-defined]
        for every in (splits, whole)
    )
    expected = before["train"].copy()
    expected[3], expected[4] = round(0.1 * expected[3]), round(0.5 * expected[4])
    assert counts["train"].tolist() == expected.tolist()
    assert counts["test"].tolist() == before["test"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "image_clasification"}, "'image_classification'"),
        ({"model": "no-such/model"}, "'no-such/model'"),
        ({"data": "no-such/data"}, "'no-such/data'"),
        ({"label_map": [1, 0]}, "it needs 10 entries"),
        ({"label_map": [10] * 10}, "labels.*vit.*0 to 9"),
        ({"label_map": {"Dres": 0}}, "'Dress'"),
        ({"label_map": {"Dress": 0, "Coat": 0}}, "train.*label 0"),
        ({"label_map": [None] * 10}, "no row.*train"),
        ({"imbalance": {"Coat": 0}}, "Coat: 0 "),
        ({"imbalance": {"Goat": 0.5}}, "'Coat'"),
        ({"corruption": "rain"}, "'rain'"),
        ({"corruption": "gaussian_noise", "severity": 9}, "severity=9"),
        ({"character_noise": 10.0}, "character_noise=10.0.*image_classification.*corruption"),
        ({"shift_seed": -1}, "shift_seed=-1 "),
        ({"max_length": 10}, "max_length=10.*image_classification"),
        ({"metric": "acuracy"}, "'accuracy'"),
        ({"metric": "span_f1"}, "metric 'span_f1'.*accuracy, macro_f1"),
        ({"columns": {"images": "image"}}, "image_classification.*'images'.*'image'"),
        ({"columns": {"image": "img"}}, "no column 'img' for the image: .*image \\(Image\\), label \\(ClassLabel"),
        (
            {"columns": {"label": "image"}},
            "'image'.*label.*image_classification.*Image",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(RECIPE, **change))


def test_data_of_save_to_disk_are_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(SurgicalError, match=r"save_to_disk.*to_parquet"):
        load_task(replace(RECIPE, data=str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "lab\n', "JSON parse error: .* row 1$"),
        ("train.csv", "text,label\na,0\nb,1,2,3\n", ".* Expected 2 fields in line 3, saw 4$"),
        (
            "train-1.csv",
            "text,label,more\na,0,1\n",
            "Schema at index 1 was different: .*label: int64 more: int64",
        ),
        ("train.parquet", "text", "Parquet file size is 4 bytes"),
    ],
)
def test_data_that_cannot_be_read_say_why(tmp_path: Path, name: str, text: str, reason: str) -> None:
    """They said `cannot be loaded: the folder An error occurred while generating the dataset`."""
    if name == "train-1.csv":
        (tmp_path / "train-0.csv").write_text("text,label\na,0\n")
    (tmp_path / name).write_text(text)
    said = rf"^the split train of the data set '{tmp_path}' cannot be loaded: {reason}"
    with pytest.raises(SurgicalError, match=said if name != "train.parquet" else reason):
        DataSource.find(str(tmp_path)).open("train")


def double(recipe: Recipe, splits: tuple[str, ...]) -> Task:
    """A task of one's own: the first example of each split, twice."""
    task = load_task(replace(recipe, task="image_classification"), splits)
    return replace(task, splits={split: [each[0], each[0]] for split, each in task.splits.items()})


def test_a_task_of_ones_own() -> None:
    task = load_task(replace(RECIPE, task=f"{double.__module__}:double"), ("test",))
    assert {split: len(each) for split, each in task.splits.items()} == {"test": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("columns: text", "columns is 'text'.*keys"),
        ("character_noise: much", "character_noise is 'much'.*number"),
        ("casing: yes", "casing is True.*number"),
        ("imbalance: [0.1]", "imbalance.*keys"),
        ("shift_seed: 0.5", "shift_seed is 0.5.*whole"),
        ("new_head: 2", "new_head is 2.*true"),
    ],
)
def test_keys_of_a_wrong_type(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: m\ndata: d\n{line}\n")
    with pytest.raises(SurgicalError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_measuring_leaves_the_mode_as_it_was() -> None:
    task = load_task(RECIPE, ("test",))
    model = task.load_model().train()
    examples = [task.splits["test"][i] for i in range(30)]
    value = task.measure(model, examples)
    assert model.training
    logits = model.eval()(torch.stack([each["pixel_values"] for each in examples])).logits
    assert value == (logits.argmax(-1) == torch.stack([each["labels"] for each in examples])).sum().item() / 30
    task.measure(model, examples)
    assert not model.training


def test_only_the_asked_for_splits_are_opened(tmp_path: Path) -> None:
    for split, data in load_dataset(RECIPE.data).items():
        data.select(range(8)).to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "test.parquet").write_bytes(b"not to be read")
    recipe = replace(RECIPE, data=str(tmp_path))
    assert list(load_task(recipe, ("train", "validation")).splits) == ["train", "validation"]
    with pytest.raises(SurgicalError, match="cannot be loaded"):
        load_task(recipe)


@pytest.fixture(scope="module")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return replace(TOY_TASKS["image_classification"](tmp_path_factory.mktemp("images")), corruption=None)


def save_images(folder: Path, image: Image.Image, suffix: str, classes: tuple[str, ...] = ("a", "b")) -> Path:
    for split in ("train", "validation"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            image.save(folder / split / name / f"0{suffix}")
    return folder


RAMP = np.linspace(0, 255, 144).reshape(12, 12).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(RAMP), ".png"),
        (Image.fromarray(np.dstack([COLOUR, RAMP])), ".png"),
        (Image.fromarray(np.dstack([RAMP, RAMP])), ".png"),
        (Image.fromarray(COLOUR).quantize(16), ".png"),
        (Image.fromarray(COLOUR).convert("CMYK"), ".jpg"),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), ".png"),
        (Image.fromarray(RAMP).convert("1"), ".png"),
        (Image.fromarray(COLOUR).resize((40, 9)), ".png"),
    ],
    ids=["gray", "RGBA", "LA", "palette", "CMYK", "16 bit", "1 bit", "another size"],
)
def test_images_of_any_mode_and_size(tmp_path: Path, toy_images: Recipe, image: Image.Image, suffix: str) -> None:
    """A folder of image files, which `datasets` reads as `imagefolder`; the model takes colors and 8 x 8 pixels."""
    recipe = replace(toy_images, data=str(save_images(tmp_path, image, suffix)), corruption="gaussian_noise")
    task = load_task(recipe, ("train", "validation"))
    assert [int(task.splits["train"][index]["labels"]) for index in range(2)] == [0, 1]
    pixels = task.splits["train"][0]["pixel_values"]
    assert pixels.shape == (3, 8, 8) and pixels.std() > 0.1
    assert 0 <= task.measure(task.load_model(), task.splits["validation"]) <= 1


def test_modes_are_converted_and_not_cut_off() -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for image in (deep, deep.convert("I"), Image.fromarray(RAMP)):
        assert np.array_equal(np.asarray(convert(image, "L")), RAMP)
        assert np.array_equal(np.asarray(convert(image, "RGB")), np.dstack([RAMP] * 3))
    see_through = np.dstack([COLOUR, np.zeros_like(RAMP)])
    assert (np.asarray(convert(Image.fromarray(see_through), "RGB")) == 255).all()  # nothing to be seen
    solid = np.dstack([COLOUR, np.full_like(RAMP, 255)])
    assert np.array_equal(np.asarray(convert(Image.fromarray(solid), "RGB")), COLOUR)
    with pytest.raises(SurgicalError, match="floating point pixels"):
        convert(Image.fromarray(RAMP.astype(np.float32)), "RGB")


def test_images_that_stay_of_another_size(tmp_path: Path, toy_images: Recipe) -> None:
    model = tmp_path / "model"
    source = AutoImageProcessor.from_pretrained(toy_images.model, backend="pil", do_resize=False)
    load_task(toy_images, ("train",)).load_model().save_pretrained(model)
    source.save_pretrained(model)
    data = save_images(tmp_path / "data", Image.fromarray(COLOUR), ".png")
    recipe = replace(toy_images, model=str(model), data=str(data))
    with pytest.raises(SurgicalError, match=r"3 x 12 x 12.*do_resize"):
        load_task(recipe, ("train",))
    Image.fromarray(COLOUR[:8, :8]).save(data / "train" / "a" / "0.png")
    images = load_task(recipe, ("train",)).splits["train"]
    assert images[0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(SurgicalError, match=r"train.*row 1 \(.*b/0\.png\).*12 x 12"):
        images[1]


def broken_chunk(whole: bytes) -> bytes:
    """A PNG whose last pixels are in what cannot be a chunk: Pillow has a SyntaxError for it."""
    before, _, after = whole.rpartition(b"IDAT")
    return before + b"\0\0\0\0" + after


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda whole: whole[:-40], "[Tt]runcated"),
        (lambda whole: b"no image", "cannot identify image file"),
        (broken_chunk, "broken PNG file"),
    ],
    ids=["cut off", "not an image", "broken chunk"],
)
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, toy_images: Recipe, broken: Any, reason: str) -> None:
    """`error: Truncated File Read` was all that was said, of a data set with thousands of images."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)  # two IDAT
    data = save_images(tmp_path, Image.fromarray(noise), ".png")
    file = data / "train" / "b" / "0.png"
    file.write_bytes(broken(file.read_bytes()))
    recipe = replace(toy_images, data=str(data))
    with pytest.raises(
        SurgicalError, match=rf"^{data}, split train: .*row 1 of 2: train/b/0\.png \(.*{reason}"
    ) as stop:
        load_task(recipe, ("train",))
    assert " at 0x" not in str(stop.value)
    save_images(tmp_path / "more", Image.fromarray(noise), ".png")
    for name in "ab":  # what is left has both classes
        (tmp_path / "more" / "train" / name / "0.png").rename(data / "train" / name / "1.png")
    task = load_task(replace(recipe, drop_empty=True), ("train", "validation"))
    assert len(task.splits["train"]) == 3
    assert any("drop_empty" in line and "row 2 of 4" in line for line in task.summary)


def test_an_image_without_a_file_that_cannot_be_converted_is_named(tmp_path: Path, toy_images: Recipe) -> None:
    data = load_dataset(toy_images.data)["train"].to_list()
    content = io.BytesIO()
    Image.fromarray(RAMP.astype(np.float32)).save(content, "tiff")
    data[2]["image"] = {"bytes": content.getvalue(), "path": None}
    features = load_dataset(toy_images.data)["train"].features
    Dataset.from_list(data, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SurgicalError, match=f"^{tmp_path}.*train.*row 2.*floating point"):
        load_task(replace(toy_images, data=str(tmp_path)), ("train",))


def test_classes_of_image_folders_are_those_of_training(tmp_path: Path, toy_images: Recipe) -> None:
    data = save_images(tmp_path, Image.fromarray(COLOUR), ".png", ("b", "c"))
    (data / "validation" / "b" / "0.png").unlink()
    recipe = replace(toy_images, data=str(data))
    validation = load_task(recipe, ("validation",)).splits["validation"]
    assert [int(validation[0]["labels"])] == [1]  # c, by the classes of training
    (data / "validation" / "d").mkdir()
    Image.fromarray(COLOUR).save(data / "validation" / "d" / "0.png")
    with pytest.raises(SurgicalError, match=r"validation: 1 row.*'d'.*b, c"):
        load_task(recipe, ("train", "validation"))


def test_more_classes_than_labels_need_a_new_head(tmp_path: Path, toy_images: Recipe) -> None:
    data = str(save_images(tmp_path, Image.fromarray(COLOUR), ".png", ("k", "l", "m", "n", "o")))
    with pytest.raises(SurgicalError, match=r"5 classes.*0 to 2.*new_head: true"):
        load_task(replace(toy_images, data=data), ("train",))
    model = load_task(replace(toy_images, data=data, new_head=True), ("train",)).load_model()
    assert model.config.id2label == dict(enumerate("klmno"))


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_a_new_head_is_new_by_the_seed_and_the_rest_is_the_source(
    tmp_path: Path, toy_images: Recipe, classes: tuple[str, ...]
) -> None:
    """Also where the old head has as many labels."""
    data = str(save_images(tmp_path, Image.fromarray(COLOUR), ".png", classes))
    source = load_task(toy_images, ("train",)).load_model().state_dict()
    recipe = replace(toy_images, data=data, new_head=True, training={"seed": 1})
    torch.manual_seed(7)
    drawn = torch.random.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        model = load_task(replace(recipe, training={"seed": seed}), ("train",)).load_model()
        assert not model.training
        weights = model.state_dict()
        heads.append(weights.pop("classifier.weight"))
        weights.pop("classifier.bias")
        assert all(value.equal(source[name]) for name, value in weights.items())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape[0] == len(classes)
    assert heads[0].shape != source["classifier.weight"].shape or not heads[0].equal(source["classifier.weight"])
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_new_head_is_not_the_one_that_the_source_model_began_with(toy_images: Recipe) -> None:
    """Both were drawn from the plain seed: a source model pre-trained from seed 0 got its own first head back."""
    plain = load_task(toy_images, ("train",)).load_model()
    torch.manual_seed(0)
    source = type(plain)(plain.config)
    task = load_task(replace(toy_images, new_head=True, training={"seed": 0}), ("train",))
    assert (
        torch.nn.functional.cosine_similarity(
            task.load_model().classifier.weight.flatten(), source.classifier.weight.flatten(), dim=0
        ).abs()
        < 0.5
    )


def test_rows_without_image_or_label(tmp_path: Path, toy_images: Recipe) -> None:
    data = load_dataset(toy_images.data)["train"].to_list()
    for change, message in (
        ({"label": None}, "train.*label has 1 empty cell, row 2"),
        ({"label": -1}, r"label has 1 cell without a label \(-1\), row 2"),
        ({"image": None}, "image has 1 empty cell, row 2"),
    ):
        rows = [{**row, **(change if place == 2 else {})} for place, row in enumerate(data)]
        features = load_dataset(toy_images.data)["train"].features
        folder = tmp_path / str(change)
        Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
        with pytest.raises(SurgicalError, match=message):
            load_task(replace(toy_images, data=str(folder)), ("train",))


def test_a_models_blocks_need_its_config_only() -> None:
    model = model_of_config(RECIPE.model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == 205_962


def test_a_model_of_the_hub_that_cannot_be_read_is_not_called_missing() -> None:
    def fail(_: str) -> None:
        raise ValueError("rope_scaling must be a dictionary")

    with pytest.raises(SurgicalError, match="rope_scaling") as raised:
        load_or_raise(fail, "someone/model", "model")
    assert "Hub" not in str(raised.value)
