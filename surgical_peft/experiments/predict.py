"""What a tuned model says of new images or texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Image
from peft import PeftModel
from peft.utils.constants import CONFIG_NAME
from PIL import Image as PILImage
from rich.console import Console
from torch import nn
from transformers import CONFIG_NAME as MODEL_CONFIG
from transformers import pipeline

from ..errors import SurgicalError
from ..export.adapter_card import pipeline_of
from ..export.processor import processor_of
from ..scoring.progress import Stages
from ..tuner.loading.saved_adapter import load_base, read_adapter
from ..typed_json import read_json
from .tasks.image_classification import MODES, convert
from .tasks.splits import FILE_FORMATS
from .training.report import REPORT

_FILES = (".txt", *FILE_FORMATS)
NEW_TOKENS = 64  # that are written at most


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input.

    Attributes:
        input: as it was given.
        labels: names of labels and their scores, highest first: probabilities, or of a regression the values. Empty
            where the model writes or marks text.
        text: what it has written, or None.
        words: what it has marked, each with its label and score; words of one kind in a row are one, and its label
            has no `B-` or `I-`.
    """

    input: str
    labels: dict[str, float]
    text: str | None = None
    words: Sequence[dict[str, Any]] = ()


def predict(
    folder: str | Path, inputs: Sequence[str], base_model: str | None = None, console: Console | None = None
) -> list[Prediction]:
    """Predict images or texts with a tuned model.

    Args:
        folder: what `surgical-peft train` wrote, or an adapter's folder.
        inputs: paths of images; texts, or paths of text files, of which each line is one. A language model with a chat
            template is asked them as by a user, any other continues them; it writes 64 tokens at most.
        base_model: folder or Hub id; default is what the adapter names.
        console: where to show progress, as for `train`.

    Raises:
        SurgicalError: no adapter, no base model or tokenizer for it, an input that cannot be read, or a model that
            does something else.

    Example:
        >>> predict("runs/reviews", ["never again"])[0].labels
        {'bad': 0.93, 'good': 0.07}
    """
    run = Path(folder)
    is_run = (run / "adapter" / CONFIG_NAME).is_file()
    if not is_run and not (run / CONFIG_NAME).is_file() and (run / MODEL_CONFIG).is_file():
        raise SurgicalError(
            f"{str(folder)!r} is a whole model and no adapter: ask it by "
            f"transformers, pipeline(task, model={str(folder)!r})."
        )
    adapter = read_adapter(run / "adapter" if is_run else run)
    base = load_base(adapter.config, adapter.tensors, base_model)
    name = base_model or adapter.config.base_model_name_or_path
    processor = processor_of(adapter.folder, name)
    if processor is None:
        raise SurgicalError(
            f"neither {str(adapter.folder)!r} nor {name!r} has a tokenizer or image processor: save it beside the "
            "adapter, tokenizer.save_pretrained(folder)."
        )
    task = _task_of(adapter.folder) or pipeline_of(base.model)
    model = PeftModel.from_pretrained(base.model, str(adapter.folder)).get_base_model().eval()
    read = _READERS.get(str(task)) or (_write if getattr(model.config, "is_encoder_decoder", False) else None)
    if read is None:
        raise SurgicalError(f"{type(model).__name__} does {task}; predict knows: {', '.join(_READERS)}, and seq2seq.")
    texts = inputs if task == _IMAGES else [line for given in inputs for line in _lines(given)]
    predictions = []
    with torch.inference_mode(), Stages(console) as stages:
        stages.begin("predict", len(texts))
        for given in texts:
            predictions.append(read(model, processor, given))
            stages.advance()
    return predictions


def _task_of(adapter: Path) -> str | None:
    """The Hub's name for the task of a training; None if its report is not there."""
    report = adapter.parent / REPORT
    return read_json(report, "train again").get("pipeline") if report.is_file() else None


def _lines(given: str) -> list[str]:
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):  # longer than a file's name can be, or with a zero byte
        is_file = False
    if not is_file:
        if not given.strip():
            raise SurgicalError(f"{given!r} is no text: give some words, or a text file.")
        if Path(given).suffix.lower() in _FILES and not any(char.isspace() for char in given):
            raise SurgicalError(f"there is no file {given!r}: give the path of one, or a text of several words.")
        return [given]
    if Path(given).suffix.lower() in FILE_FORMATS:
        raise SurgicalError(f"{given!r} is a table: give its texts in a text file, one in each line, or as arguments.")
    try:
        return [line for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SurgicalError(f"{given!r} cannot be read as text ({error}): give one in UTF-8.") from error


def _image(model: Any, processor: Any, given: str) -> Prediction:
    mode = MODES.get(getattr(model.config, "num_channels", 3), "RGB")
    try:
        if not Path(given).is_file():  # a named pipe would be waited for
            raise OSError("there is no such file")
        # as in training, where `datasets` turns a photograph as its camera says
        image = convert(Image().decode_example({"path": given, "bytes": None}), mode)
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise SurgicalError(f"{given!r} cannot be read as an image ({error}): give the path of one.") from error
    return _label(model, processor(image, return_tensors="pt"), given)


def _text(model: Any, processor: Any, given: str) -> Prediction:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(processor.model_max_length, positions or 10**9)
    limits = {"truncation": longest < 10**9, "max_length": longest if longest < 10**9 else None}
    return _label(model, processor(given, return_tensors="pt", return_token_type_ids=False, **limits), given)


def _label(model: Any, features: Any, given: str) -> Prediction:
    logits = model(**features.to(model.device)).logits[0].float()
    if model.config.problem_type == "multi_label_classification":
        logits = logits.sigmoid()
    elif len(logits) > 1 and model.config.problem_type != "regression":
        logits = logits.softmax(-1)
    names = model.config.id2label
    order = sorted(range(len(logits)), key=lambda label: -float(logits[label]))
    return Prediction(given, {names[label]: float(logits[label]) for label in order})


def _mark(model: Any, processor: Any, given: str) -> Prediction:
    # by the first token of a word, as in training: nothing was learned of what the others say
    mark = pipeline("token-classification", model=model, tokenizer=processor, aggregation_strategy="first")
    parts = mark(given)
    words = [{"word": part["word"], "label": part["entity_group"], "score": float(part["score"])} for part in parts]
    return Prediction(given, {}, words=words)


def _write(model: Any, processor: Any, given: str) -> Prediction:
    text = given
    if processor.chat_template:
        question = [{"role": "user", "content": given}]
        text = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    special = not processor.chat_template  # which has them itself
    tokens = processor(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special)
    tokens = tokens.to(model.device)
    written = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    if not model.config.is_encoder_decoder:
        written = written[tokens["input_ids"].shape[1] :]
    return Prediction(given, {}, text=processor.decode(written, skip_special_tokens=True))


_IMAGES = "image-classification"
_READERS: dict[str, Callable[[nn.Module, Any, str], Prediction]] = {
    _IMAGES: _image,
    "text-classification": _text,
    "token-classification": _mark,
    "text-generation": _write,
}
