"""Exports of a tuned model: for PEFT alone, for transformers alone, as a delta, as a patch, as a LoRA."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from ..atomic_files import check_replaceable, lies_in, whole_folder
from ..errors import SurgicalError, first_of
from ..tuner.loading.saved_adapter import (
    Base,
    LoadedBase,
    SavedAdapter,
    check_fits,
    load_base,
    read_adapter,
    skeleton_of_base,
)
from ..validation import check_choice
from .adapter_card import write_exported_card
from .delta import DELTA_CONFIG, read_delta, write_delta, write_restored
from .low_rank import write_lora
from .patch import write_patch
from .private import without_paths
from .processor import fits_pipeline, processor_of
from .stock_peft import stock_config, whole_modules

FORMATS = ("peft", "merged", "delta", "patch", "lora", "adapter")
_REPORT = "export.json"  # by which the folder of an earlier export is known


def export_to_peft(adapter_dir: str | Path, out_dir: str | Path, *, base_model: Base = None) -> None:
    """Write the adapter so that PEFT loads it without this package: the same weights, a stock config.

    Args:
        adapter_dir: folder that `save_pretrained` of a tuned model wrote.
        out_dir: new or empty folder, or one of an earlier export.
        base_model: folder, Hub id, or the model itself; default is what the adapter names. Only its module names are
            read, to make sure that stock PEFT will find the right ones; where it is not at hand, that is not checked.

    Raises:
        SurgicalError: no such adapter, or stock PEFT cannot hold what it tunes. Nothing is written.

    Example:
        >>> export_to_peft("runs/label_map/adapter", "for_peft")
        >>> PeftModel.from_pretrained(base_model, "for_peft")  # with peft alone
    """
    export(adapter_dir, out_dir, "peft", base_model=base_model)


def export(
    source: str | Path,
    out_dir: str | Path,
    format: str = "peft",
    *,
    base_model: Base = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Write an adapter, or the delta of one, in another format.

    Args:
        source: an adapter's folder, or that of a delta.
        out_dir: new or empty folder, or one of an earlier export.
        format: `peft` as `export_to_peft`; `merged`, the whole model for transformers alone; `delta`, what
            differs from the base model, to the bit; `patch`, the tuned layers as they stand in the base model's
            checkpoint and their undo, see `apply_patch`; `lora`, a truncated SVD of the change for stock PEFT;
            `adapter`, the adapter itself, which undoes a delta.
        base_model: folder, Hub id, or the model itself; default is what the adapter names.
        rank: for `lora`.

    Returns:
        The report, also in `export.json`: `format`, `source` (of an absolute path the last part),
        `bytes` of weights, and what the format has to say (`ratio` of a delta, `error` of a LoRA).

    Raises:
        SurgicalError: what cannot be read, does not fit together, or cannot be held. Nothing is written.
    """
    source, out = Path(source), Path(out_dir)
    check_choice("the export", "format", format, FORMATS)
    if (rank is None) == (format == "lora") or (rank is not None and rank < 1):
        raise SurgicalError(f"rank {rank} with format {format!r}: format 'lora' needs a rank, at least 1, no other.")
    _check_apart(out, [source, base_model])
    with ExitStack() as stack:
        base: LoadedBase | None = None
        if (source / DELTA_CONFIG).is_file():
            restored, base = read_delta(source, base_model)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_restored(restored, folder)
            adapter = read_adapter(folder)
        else:
            adapter = read_adapter(source)
        if format in ("merged", "patch", "lora"):  # the others hold what is there, to the bit
            _check_finite(adapter)
        _check_apart(out, [adapter.config.base_model_name_or_path])
        if base is None and format in _WITH_BASE:
            base = load_base(adapter.config, adapter.tensors, base_model)
        temporary = stack.enter_context(whole_folder(out, _REPORT))
        model = base.model if base else None
        if base is not None and format in _WITH_BASE:
            report = _WITH_BASE[format](adapter, base, rank, temporary)
        else:
            shutil.copyfile(adapter.folder / SAFETENSORS_WEIGHTS_NAME, temporary / SAFETENSORS_WEIGHTS_NAME)
            if format == "peft":
                model = model or skeleton_of_base(adapter.config, base_model)
                modules = whole_modules(adapter, model)
                if model is not None:
                    check_fits(adapter, model.state_dict(), adapter.new_to(LoadedBase(model, frozenset())))
                stock_config(adapter.config, modules).save_pretrained(str(temporary))
            else:
                shutil.copyfile(adapter.folder / CONFIG_NAME, temporary / CONFIG_NAME)
            report = {}
        _add_what_goes_with_it(source, adapter, model, format, temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("*.safetensors"))
        report = {"format": format, "source": without_paths(str(source)), "bytes": size, **report}
        (temporary / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _add_what_goes_with_it(
    source: Path, adapter: SavedAdapter, model: nn.Module | None, format: str, folder: Path
) -> None:
    """Put the tokenizer or image processor, and the card with its picture, beside exported weights."""
    name = getattr(model, "name_or_path", None) or adapter.config.base_model_name_or_path
    processor = processor_of(source, name)
    if processor is not None:
        processor.save_pretrained(folder)
    for picture in adapter.folder.glob("*.png"):
        if lies_in(picture, adapter.folder):
            shutil.copyfile(picture, folder / picture.name)
    if format in ("peft", "merged") and model is not None:
        write_exported_card(adapter, model, format, folder, fits_pipeline(model, processor))
    elif format == "adapter" and lies_in(adapter.folder / "README.md", adapter.folder):
        shutil.copyfile(adapter.folder / "README.md", folder / "README.md")


def _merged(adapter: SavedAdapter, base: LoadedBase) -> PreTrainedModel:
    """The base model with the adapter's weights in their places, apart from the base model."""
    if not isinstance(base.model, PreTrainedModel):
        raise SurgicalError(
            f"a {type(base.model).__name__} is no transformers model and has no save_pretrained: merge it yourself, "
            "PeftModel.from_pretrained(model, adapter).merge_and_unload(), and save its state_dict()."
        )
    check_fits(adapter, base.model.state_dict())
    unknown = sorted(base.undetermined - adapter.tensors.keys())
    if unknown:
        raise SurgicalError(
            f"{unknown[0]} is neither in the base model's checkpoint nor in the adapter, so it would be random: give "
            "the base model with the weights that it had when it was tuned."
        )
    model = copy.deepcopy(base.model)  # it may be the user's own
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
    return merged


def _merge(adapter: SavedAdapter, base: LoadedBase, rank: int | None, folder: Path) -> dict[str, Any]:
    _merged(adapter, base).save_pretrained(folder)
    return {}


def _patch(adapter: SavedAdapter, base: LoadedBase, rank: int | None, folder: Path) -> dict[str, Any]:
    merged = _merged(adapter, base)
    assert isinstance(base.model, PreTrainedModel)  # checked there
    return write_patch(base.model, merged.state_dict(), folder)


def _delta(adapter: SavedAdapter, base: LoadedBase, rank: int | None, folder: Path) -> dict[str, Any]:
    return write_delta(adapter, base, folder)


def _lora(adapter: SavedAdapter, base: LoadedBase, rank: int | None, folder: Path) -> dict[str, Any]:
    assert rank is not None  # checked above
    return write_lora(adapter, base, rank, folder)


_WITH_BASE: dict[str, Callable[[SavedAdapter, LoadedBase, int | None, Path], dict[str, Any]]] = {
    "merged": _merge,
    "delta": _delta,
    "patch": _patch,
    "lora": _lora,
}


def _check_finite(adapter: SavedAdapter) -> None:
    wide = {key: value for key, value in adapter.tensors.items() if value.element_size() > 1}  # torch tests no float8
    if broken := [key for key, value in wide.items() if not torch.isfinite(value).all()]:
        raise SurgicalError(
            f"{str(adapter.folder)!r} holds NaN or infinity in {first_of(broken)}: train it again at a lower rate, or "
            "copy it again."
        )


def _check_apart(out: Path, read: Iterable[Base]) -> None:
    names = [name for name in read if isinstance(name, str | Path)]
    for name in (out, *names):
        if "\0" in str(name):
            raise SurgicalError(f"{str(name)!r} cannot be the name of a folder: it holds a zero byte.")
    for name in names:
        if out.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
            raise SurgicalError(f"{str(out)!r} is or holds what the export reads ({str(name)!r}): give a new folder.")
    check_replaceable(out, _REPORT)
