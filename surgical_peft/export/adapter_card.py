"""The README.md beside an adapter: what is tuned and how to load it, kept true wherever PEFT writes that file.

PEFT writes it in `save_pretrained`, `Trainer.push_to_hub` writes its own over it and lets PEFT add to that, and
`model.push_to_hub` puts a form to be filled in, or the one from the Hub, in its place. `keep_cards` adds to all three.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..atomic_files import lies_in, write_text
from ..tuner.config import SurgicalPeftType
from ..tuner.loading.head_config import head_config_of
from ..tuner.loading.saved_adapter import SavedAdapter
from ..tuner.tensors.tuned_tensors import TensorMap
from .card_text import BEGIN, END, HERE, TAG, AdapterInfo, describe, describe_export
from .private import configs_without_bases

# What Trainer says of a model that was loaded from a folder, which is not so.
_FROM_SCRATCH = ("This model was trained from scratch on", "This model was fine-tuned, as said above, on")

# What PEFT and transformers add to the form that huggingface_hub ships.
_GENERATED = re.compile(r"- PEFT |### Framework versions$|This is the model card of a 🤗 transformers model that")


def keep_cards() -> None:
    """From now on, the cards that are written for adapters of ours hold that part; a second call changes nothing."""
    _wrap("create_or_update_model_card", _create_or_update)
    _wrap("_upload_modified_files", _upload)


def _wrap(name: str, ours: Any) -> None:
    current = getattr(PeftModel, name)
    theirs = getattr(current, "_surgical_original", current)

    @functools.wraps(theirs)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return ours(functools.partial(theirs, self), self, *args, **kwargs)

    method._surgical_original = theirs  # type: ignore[attr-defined]
    setattr(PeftModel, name, method)


def _create_or_update(theirs: Any, model: PeftModel, output_dir: str) -> None:
    path = Path(output_dir) / "README.md"
    before = ModelCard.load(path).data if path.exists() else ModelCardData()
    theirs(output_dir)  # which puts other tags and another base model in the place of those that are there
    if tuned := _tuned(model):
        _complete(path, before, tuned)


def _upload(theirs: Any, model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    if not _tuned(model):
        return theirs(working_dir, repo_id, *args, **kwargs)
    model.create_or_update_model_card(working_dir)
    path = Path(working_dir) / "README.md"
    write_text(path, path.read_text(encoding="utf-8").replace(f'"{HERE}"', f'"{repo_id}"'))
    with configs_without_bases(working_dir):
        return theirs(working_dir, repo_id, *args, **kwargs)


def _complete(path: Path, before: ModelCardData, tuned: Sequence[AdapterInfo]) -> None:
    """Put our part into a card: in the place of an earlier one, or of a form that nobody has filled in, or first."""
    card = ModelCard.load(path)
    tags = {TAG, *(before.tags or []), *(card.data.tags or [])}
    if not tuned[0].on_hub:  # the Hub refuses a base model that it does not have, such as a folder
        folder = card.data.get("base_model")
        card.data.base_model = None if before.get("base_model") == folder else before.get("base_model")
        tags = {tag for tag in tags if not tag.startswith("base_model:")}
    card.data.tags = sorted(tags)
    card.data["pipeline_tag"] = card.data.get("pipeline_tag") or tuned[0].pipeline
    part, text = describe(tuned), card.text
    if _is_unfilled(text):
        versions = text[text.index("### Framework versions") :]
        card.text = f"\n# Surgical fine-tuning\n\n{part}\n\n{versions}\n"
    else:
        card.text = _with_part(text.replace(*_FROM_SCRATCH), part)
    write_text(path, str(card))


def _with_part(text: str, part: str) -> str:
    """Put our part into the text of a card: in the place of an earlier one, or first."""
    above, begin, ours = text.partition(BEGIN)
    _, end, below = ours.partition(END)
    return above + part + below if begin and end else f"\n{part}\n\n{text.lstrip(chr(10))}"


def _is_unfilled(text: str) -> bool:
    """True if a card says nothing but what the form of huggingface_hub does."""
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in form or _GENERATED.match(line) for line in text.splitlines() if line.strip())


def _tuned(model: PeftModel) -> list[AdapterInfo]:
    base = model.get_base_model()
    return [
        adapter_info(config, base, None if name == "default" else name)
        for name, config in model.peft_config.items()
        if config.peft_type == SurgicalPeftType.SURGICAL
    ]


def adapter_info(config: Any, base: nn.Module, subfolder: str | None = None) -> AdapterInfo:
    """The facts about an adapter of the model `base` that its card says."""
    of_transformers = isinstance(base, PreTrainedModel)
    tensors = TensorMap.find(base)
    path = config.base_model_name_or_path or ""
    on_hub, commit = origin(path, config.revision)
    return AdapterInfo(
        blocks=config.blocks,
        target_modules=config.target_modules,
        modules=list(config.tuned_modules or {}),
        modules_to_save=config.modules_to_save,
        lora=config.lora,
        selection=config.selection,
        fingerprint=config.fingerprint,
        base=path if on_hub else Path(path).name or None,  # where a folder lies is nobody's business
        base_class=type(base).__name__ if of_transformers else None,
        on_hub=on_hub,
        commit=commit,
        head=head_config_of(base, config) or config.head_config,
        pipeline=pipeline_of(base),
        subfolder=subfolder,
        tied=tensors.tied(tensors.chosen(config.tuned_modules or {})),
    )


def pipeline_of(base: nn.Module) -> str | None:
    """The Hub's name for what models of that class do, as transformers' own cards say it."""
    from transformers.modelcard import TASK_MAPPING  # slow to import

    tasks: dict[str, Any] = TASK_MAPPING
    return next((task for task, classes in tasks.items() if type(base).__name__ in classes.values()), None)


def write_exported_card(adapter: SavedAdapter, base: nn.Module, format: str, folder: Path, in_pipeline: bool) -> None:
    """Write the card of an exported adapter: the adapter's own, if it has one, but for how to load it.

    Args:
        base: the base model.
        format: `peft` or `merged`.
        folder: where the export goes.
        in_pipeline: as in `AdapterInfo`.
    """
    own = adapter.folder / "README.md"
    card = (
        ModelCard.load(own)
        if lies_in(own, adapter.folder)
        else ModelCard("---\ntags: []\n---\n\n# Surgical fine-tuning\n")
    )
    info, data = replace(adapter_info(adapter.config, base), in_pipeline=in_pipeline), card.data
    head, task = adapter.config.head_config or info.head, data.get("pipeline_tag") or info.pipeline
    info = replace(info, head=head, pipeline=task)
    tags = {TAG, *(data.get("tags") or [])}
    data["tags"] = sorted(tag for tag in tags if format == "peft" or not tag.startswith("base_model:"))
    data["library_name"] = "peft" if format == "peft" else "transformers"
    data["pipeline_tag"] = info.pipeline
    data["base_model"] = data.get("base_model") or (info.base if info.on_hub else None)
    card.text = _with_part(card.text, describe_export(info, format))
    write_text(folder / "README.md", str(card))


def origin(name: str, revision: str | None = None) -> tuple[bool, str | None]:
    """If a model that was loaded by `name` is from the Hub, and its commit, as far as the cache knows."""
    if not name or Path(name).exists():
        return False, None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that is not there any more
        return False, None
    return True, Path(cached).parent.name if isinstance(cached, str) else None
