"""The README.md beside an adapter: what is tuned and how to load it, kept true wherever PEFT writes that file.

PEFT writes it in `save_pretrained`, `Trainer.push_to_hub` writes its own over it and lets PEFT add to that, and
`model.push_to_hub` puts a form to be filled in, or the one from the Hub, in its place. `keep_cards` adds to all three.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import PreTrainedModel

from ..atomic_files import write_text
from ..tuner.config import SurgicalPeftType
from ..tuner.tensors.tuned_tensors import TensorMap

TAG = "surgical-fine-tuning"
HERE = "this folder or repository"  # in the place of a repository's name, until it is known
BEGIN, END = "<!-- surgical_peft: written anew with each save -->", "<!-- surgical_peft: end -->"

# What Trainer says of a model that was loaded from a folder, which is not so.
_FROM_SCRATCH = ("This model was trained from scratch on", "This model was fine-tuned, as said above, on")

# What PEFT and transformers add to the form that huggingface_hub ships.
_GENERATED = re.compile(r"- PEFT |### Framework versions$|This is the model card of a 🤗 transformers model that")


@dataclass(frozen=True)
class AdapterInfo:
    """The facts about an adapter that its card says.

    Attributes:
        blocks, target_modules, modules_to_save, lora, selection, fingerprint: as in
            [`SurgicalConfig`][surgical_peft.SurgicalConfig].
        modules: paths of the tuned modules.
        base: name of the base model, if it has one.
        base_class: its class in transformers; None if it is not of transformers.
        on_hub: whether the base model is from the Hub.
        commit: which of its commits, if that is known.
        new_labels: how many labels it has, if its head is new.
        subfolder: where the adapter lies, if not beside the card.
        tied: for each tuned weight that stands in several modules, the names of all its places.
    """

    blocks: Sequence[str] | None
    target_modules: Any
    modules: Sequence[str]
    modules_to_save: Sequence[str] | None
    lora: Any
    selection: dict[str, Any] | None
    fingerprint: str | None
    base: str | None
    base_class: str | None
    on_hub: bool
    commit: str | None
    new_labels: int | None = None
    subfolder: str | None = None
    tied: Sequence[Sequence[str]] = ()


def describe(tuned: Sequence[AdapterInfo]) -> str:
    """The part of a card that says what each adapter tunes, on which base model, and how to load it."""
    parts = [BEGIN]
    for info in tuned:
        text = _tuned_parts(info)
        parts.append(text if info.subfolder is None else f"Adapter `{info.subfolder}`: {text}")
        parts += filter(None, [_choice(info)])
    parts += [_base(tuned[0]), "## How to load", _with_us(tuned[0])]
    if not any(info.lora for info in tuned):
        parts.append(_without_us(tuned[0]))
    return "\n\n".join([*parts, END])


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
    if _tuned(model):
        model.create_or_update_model_card(working_dir)
        path = Path(working_dir) / "README.md"
        write_text(path, path.read_text(encoding="utf-8").replace(f'"{HERE}"', f'"{repo_id}"'))
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
    part, text = describe(tuned), card.text
    above, begin, ours = text.partition(BEGIN)
    _, end, below = ours.partition(END)
    if begin and end:
        card.text = above + part + below
    elif _is_unfilled(text):
        versions = text[text.index("### Framework versions") :]
        card.text = f"\n# Surgical fine-tuning\n\n{part}\n\n{versions}\n"
    else:
        rest = text.lstrip("\n").replace(*_FROM_SCRATCH)
        card.text = f"\n{part}\n\n{rest}"
    write_text(path, str(card))


def _is_unfilled(text: str) -> bool:
    """True if a card says nothing but what the form of huggingface_hub does."""
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in form or _GENERATED.match(line) for line in text.splitlines() if line.strip())


def _tuned(model: PeftModel) -> list[AdapterInfo]:
    base = model.get_base_model()
    of_transformers = isinstance(base, PreTrainedModel)
    tensors = TensorMap.find(base)
    infos = []
    for name, config in model.peft_config.items():
        if config.peft_type != SurgicalPeftType.SURGICAL:
            continue
        path = config.base_model_name_or_path or ""
        on_hub, commit = origin(path, config.revision)
        infos.append(
            AdapterInfo(
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
                new_labels=_new_labels(base, config.modules_to_save or ()) if of_transformers else None,
                subfolder=None if name == "default" else name,
                tied=tensors.tied(tensors.chosen(config.tuned_modules or {})),
            )
        )
    return infos


def _new_labels(base: PreTrainedModel, modules: Sequence[str]) -> int | None:
    """The number of labels of a model whose saved `modules` hold a head for them."""
    labels = base.config.num_labels
    heads = [module for path, module in base.named_modules() if path.endswith(tuple(modules))] if modules else []
    return labels if any(weight.shape[:1] == (labels,) for head in heads for weight in head.parameters()) else None


def origin(name: str, revision: str | None = None) -> tuple[bool, str | None]:
    """If a model that was loaded by `name` is from the Hub, and its commit, as far as the cache knows."""
    if not name or Path(name).exists():
        return False, None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that is not there any more
        return False, None
    return True, Path(cached).parent.name if isinstance(cached, str) else None


def _tuned_parts(tuned: AdapterInfo) -> str:
    modules = _listed(tuned.modules[:20]) + (f" and {more} more" if (more := len(tuned.modules) - 20) > 0 else "")
    blocks = f"the block{'s' if len(tuned.blocks or ()) > 1 else ''} {_listed(tuned.blocks or ())}"
    where = blocks if tuned.blocks else f"the modules {modules}"
    parts = f", there {_listed(tuned.target_modules)}" if tuned.blocks and tuned.target_modules else ""
    paths = f" (modules {modules})" if tuned.blocks else ""
    also = f"; new and trained as well: {_listed(tuned.modules_to_save)}" if tuned.modules_to_save else ""
    rest = "in the rest is LoRA" if tuned.lora else "the rest is as in the base model"
    tied = "".join(f" {_listed(names)} are one weight, tuned at all places." for names in tuned.tied)
    return f"**Tuned in full: {where}{parts}**{paths}{also}; {rest}.{tied}"


def _choice(tuned: AdapterInfo) -> str:
    record = tuned.selection or {}
    plain = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    if not plain:
        return ""
    text = f"How the blocks were chosen: {', '.join(f'{name} `{value}`' for name, value in plain.items())}."
    if isinstance(loss := record.get("joint_loss"), dict) and loss:
        left = ", with ".join(f"`{name}` {value:.3g}" for name, value in loss.items())
        text += f" How many: by the loss on held-out batches after short joint trainings: {left}."
    if isinstance(cost := record.get("cost"), dict):
        text += f" That cost {cost['steps']:.3g} training steps, of at most {cost['budget']:.3g}."
    scores = record.get("scores")
    if not isinstance(scores, dict):
        return text
    rows = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in scores.items() if isinstance(value, int | float))
    return f"{text}\n\n| block | score |\n| --- | ---: |\n{rows}"


def _base(tuned: AdapterInfo) -> str:
    if tuned.on_hub:
        name = f"[{tuned.base}](https://huggingface.co/{tuned.base})"
        name += f", commit `{tuned.commit}`" if tuned.commit else ""
    else:
        name = f"`{tuned.base}`, which is not from the Hub" if tuned.base else "without a name"
    mark = f"; fingerprint of the weights that were tuned: `{tuned.fingerprint}`" if tuned.fingerprint else ""
    return f"Base model: {name}{mark}. Loading on another base warns."


def _with_us(tuned: AdapterInfo) -> str:
    folder = f', subfolder="{tuned.subfolder}"' if tuned.subfolder else ""
    lines = [
        "import surgical_peft  # registers the method; without it PEFT stops with KeyError: 'SURGICAL'",
        "from peft import PeftModel",
        *_import_base(tuned),
        "",
        *_load_base(tuned),
        f'model = PeftModel.from_pretrained(base_model, "{HERE}"{folder})',
    ]
    return "**`pip install surgical-peft`, and `import surgical_peft` before loading:**\n\n" + _code(lines)


def _without_us(tuned: AdapterInfo) -> str:
    path = f"{tuned.subfolder or '.'}/adapter_model.safetensors".removeprefix("./")
    lines = [
        "from safetensors.torch import load_file",
        *_import_base(tuned),
        "",
        *(_load_base(tuned) or ["# base_model: one that PEFT has not wrapped, as it does above"]),
        f'tensors = load_file("{path}")  # from {HERE}',
        'tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}',
        "assert not base_model.load_state_dict(tensors, strict=False).unexpected_keys",
    ]
    alone = (
        "`surgical-peft export ADAPTER OUT --format merged` makes a whole model of it, for transformers alone; stock "
        "PEFT cannot hold a weight that stands in several modules."
        if tuned.tied
        else "`surgical-peft export ADAPTER OUT --format peft` makes a copy that PEFT loads alone."
    )
    return (
        "Without the package, the file holds the tuned weights under their names in the base model:\n\n"
        f"{_code(lines)}\n\n{alone}"
    )


def _import_base(tuned: AdapterInfo) -> list[str]:
    return [f"from transformers import {tuned.base_class}"] if tuned.base_class else []


def _load_base(tuned: AdapterInfo) -> list[str]:
    if tuned.base_class is None:
        return []
    name = tuned.base if tuned.on_hub else "folder of the base model"
    commit = f', revision="{tuned.commit}"' if tuned.commit else ""
    head = f", num_labels={tuned.new_labels}, ignore_mismatched_sizes=True" if tuned.new_labels else ""
    return [f'base_model = {tuned.base_class}.from_pretrained("{name}"{commit}{head})']


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _listed(names: Any) -> str:
    if isinstance(names, dict):
        return "; ".join(f"in `{block}`: {_listed(parts)}" for block, parts in names.items())
    return ", ".join(f"`{name}`" for name in ([names] if isinstance(names, str) else names))
