"""The part of a card that says what an adapter tunes, on which base model, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..rendering import markdown_block, markdown_code, markdown_row, markdown_text
from ..scoring.block_scores import LEGEND, MARKS

TAG = "surgical-fine-tuning"
HERE = "this folder or repository"  # in the place of a repository's name, until it is known
BEGIN, END = "<!-- surgical_peft: written anew with each save -->", "<!-- surgical_peft: end -->"


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
        head: what the config says of its head, as `SurgicalConfig.head_config`; None if it is the base's.
        pipeline: the Hub's name for what the model does, if it is known.
        in_pipeline: whether `pipeline` takes the model, and the tokenizer or image processor beside the card.
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
    head: dict[str, Any] | None = None
    pipeline: str | None = None
    in_pipeline: bool = False
    subfolder: str | None = None
    tied: Sequence[Sequence[str]] = ()

    @property
    def has_single_experts(self) -> bool:
        """True if the file may hold rows of stacked weights."""
        choices = self.target_modules.values() if isinstance(self.target_modules, dict) else [self.target_modules]
        return any("experts[" in str(choice) for choice in choices)


def describe(tuned: Sequence[AdapterInfo]) -> str:
    """The part of a card that says what each adapter tunes, on which base model, and how to load it."""
    loading = [_with_us(tuned[0])]
    if not any(info.lora for info in tuned):
        loading.append(_without_us(tuned[0]))
    return _part(tuned, "Loading on another base warns.", loading)


def describe_export(info: AdapterInfo, format: str) -> str:
    """The same part for what an adapter was exported to: `peft` or `merged`."""
    if format == "merged":
        if is_pipeline(info.pipeline) and info.in_pipeline:
            lines = ["from transformers import pipeline", "", f'predict = pipeline("{info.pipeline}", model="{HERE}")']
        else:
            lines = [*_import_base(info), "", f'model = {info.base_class}.from_pretrained("{HERE}")']
        return _part([info], "", ["The whole model, the adapter merged into it:", _code(lines)])
    lines = ["from peft import PeftModel", *_import_base(info), "", *_load_base(info)]
    lines += [*_names_of_labels(info), _load_adapter(info)]
    return _part([info], "", [_code(lines)])


def hub_link(name: str, kind: str = "") -> str:
    """A link to a model on the Hub, with `kind="datasets/"` to a data set; the name alone if none can have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return markdown_code(name)
    return f"[{name}](https://huggingface.co/{kind}{name})"


def is_pipeline(task: str | None) -> bool:
    """True if transformers has a pipeline of that name."""
    from transformers.pipelines import SUPPORTED_TASKS  # slow to import

    return task in SUPPORTED_TASKS


def reader_of(task: str | None) -> str:
    """The argument of `pipeline` for what reads its inputs."""
    return "image_processor" if "image" in (task or "") else "tokenizer"


def _part(tuned: Sequence[AdapterInfo], warning: str, loading: Sequence[str]) -> str:
    parts = [BEGIN]
    for info in tuned:
        text = _tuned_parts(info)
        parts.append(text if info.subfolder is None else f"Adapter {markdown_code(info.subfolder)}: {text}")
        parts += filter(None, [_choice(info)])
    base = " ".join(filter(None, [_base(tuned[0]), warning]))
    return "\n\n".join([*parts, base, "## How to load", *loading, END])


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
    facts = (f"{markdown_text(name)} {markdown_code(value)}" for name, value in plain.items())
    text = f"How the blocks were chosen: {', '.join(facts)}."
    scores = _numbers(record.get("scores"))
    if loss := _numbers(record.get("joint_loss")):
        order = sorted(loss, key=lambda name: -scores.get(name, 0.0))  # as they joined: JSON has them by name
        left = ", with ".join(f"{markdown_code(name)} {loss[name]:.3g}" for name in order)
        text += f" How many: by the loss on held-out batches after short joint trainings: {left}."
    if {"steps", "budget"} <= (cost := _numbers(record.get("cost"))).keys():
        text += f" That cost {cost['steps']:.3g} training steps, of at most {cost['budget']:.3g}."
    if not scores:
        return text
    given = record.get("basis")
    marks = {name: MARKS.get(str(basis), "") for name, basis in (given.items() if isinstance(given, dict) else ())}
    rows = [
        markdown_row([markdown_code(name), f"{scores[name]:.4g}{marks.get(name, '')}"])
        for name in (sorted(scores, key=_natural) if list(scores) == sorted(scores) else scores)
    ]
    legend = [f"{mark} {LEGEND[basis]}" for basis, mark in MARKS.items() if mark in marks.values()]
    notes = ["", " ".join(legend)] if legend else []
    return "\n".join([text, "", "| block | score |", "| --- | ---: |", *rows, *notes])


def _natural(name: str) -> list[tuple[int, int, str]]:
    """For sorting by number, and as a model computes: what stands before and after the layers by its name."""
    places = {"embeddings": -1, "final_norm": 1, "head": 2}
    parts = re.split(r"[./]", name)
    return [(places.get(part, 0), int(part) if part.isdecimal() else -1, part) for part in parts]


def _numbers(record: Any) -> dict[str, float]:
    """The numbers in a record, of which nobody knows who wrote it."""
    values = record.items() if isinstance(record, dict) else ()
    return {name: value for name, value in values if isinstance(value, int | float)}


def _base(tuned: AdapterInfo) -> str:
    if tuned.on_hub:
        name = hub_link(tuned.base or "")
        name += f", commit {markdown_code(tuned.commit)}" if tuned.commit else ""
    else:
        name = f"{markdown_code(tuned.base)}, which is not from the Hub" if tuned.base else "without a name"
    mark = (
        f"; fingerprint of the weights that were tuned: {markdown_code(tuned.fingerprint)}"
        if tuned.fingerprint
        else ""
    )
    return f"Base model: {name}{mark}."


def _with_us(tuned: AdapterInfo) -> str:
    lines = [
        "import surgical_peft  # registers the method; without it PEFT stops with KeyError: 'SURGICAL'",
        "from peft import PeftModel",
        *_import_base(tuned),
        "",
        *_load_base(tuned),
        _load_adapter(tuned),
    ]
    text = "**`pip install surgical-peft`, and `import surgical_peft` before loading:**\n\n" + _code(lines)
    if tuned.in_pipeline and is_pipeline(tuned.pipeline):
        reader = reader_of(tuned.pipeline)
        text += f"\n\nIn a pipeline; the {reader.replace('_', ' ')} lies beside the adapter:\n\n" + _code(
            [
                "from transformers import pipeline",
                "",
                f'predict = pipeline("{tuned.pipeline}", model=model.get_base_model(), {reader}="{HERE}")',
            ]
        )
    return text


def _load_adapter(tuned: AdapterInfo) -> str:
    folder = f", subfolder={_quoted(tuned.subfolder)}" if tuned.subfolder else ""
    return f'model = PeftModel.from_pretrained(base_model, "{HERE}"{folder})'


_COPY = ["assert not base_model.load_state_dict(tensors, strict=False).unexpected_keys"]
_COPY_ROWS = [
    "state = base_model.state_dict()",
    "for name, tensor in tensors.items():",
    '    weight, _, expert = name.partition("[")  # a row of a weight in which experts are stacked',
    "    (state[weight][int(expert[:-1])] if expert else state[weight]).copy_(tensor)",
]


def _without_us(tuned: AdapterInfo) -> str:
    path = f"{tuned.subfolder or '.'}/adapter_model.safetensors".removeprefix("./")
    lines = [
        "from safetensors.torch import load_file",
        *_import_base(tuned),
        "",
        *(_load_base(tuned) or ["# base_model: one that PEFT has not wrapped, as it does above"]),
        *_names_of_labels(tuned),
        f"tensors = load_file({_quoted(path)})  # from {HERE}",
        'tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}',
        *(_COPY_ROWS if tuned.has_single_experts else _COPY),
    ]
    what = "a weight that stands in several modules" if tuned.tied else "single experts"
    alone = (
        "`surgical-peft export ADAPTER OUT --format merged` makes a whole model of it, for transformers alone; stock "
        f"PEFT cannot hold {what}."
        if tuned.tied or tuned.has_single_experts
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
    arguments = [_quoted(name), *([f"revision={_quoted(tuned.commit)}"] if tuned.commit else [])]
    if labels := (tuned.head or {}).get("num_labels"):
        arguments += [f"num_labels={labels}", "ignore_mismatched_sizes=True"]
    return [f"base_model = {tuned.base_class}.from_pretrained({', '.join(arguments)})"]


def _names_of_labels(tuned: AdapterInfo) -> list[str]:
    """Lines that name the labels, which the adapter does by itself where it is loaded as one."""
    names = (tuned.head or {}).get("id2label")
    if not names or tuned.base_class is None:
        return []
    ordered = sorted((int(label), name) for label, name in names.items())
    return [
        f"base_model.config.id2label = {{{', '.join(f'{label}: {name!r}' for label, name in ordered)}}}",
        "base_model.config.label2id = {name: label for label, name in base_model.config.id2label.items()}",
    ]


def _quoted(text: Any) -> str:
    """Text as Python has it, whatever is in it."""
    return f'"{text}"' if re.fullmatch(r"[\w ./-]*", str(text)) else repr(str(text))


def _code(lines: Sequence[str]) -> str:
    return markdown_block("\n".join(lines), "python")


def _listed(names: Any) -> str:
    if isinstance(names, dict):
        return "; ".join(f"in {markdown_code(block)}: {_listed(parts)}" for block, parts in names.items())
    return ", ".join(map(markdown_code, [names] if isinstance(names, str) else names))
