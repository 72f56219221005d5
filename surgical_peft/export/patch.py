"""A dense patch of a checkpoint and its undo: whole layers, as safetensors under the checkpoint's own names.

The form of vLLM's `CheckpointWeightPatch` without indices (https://github.com/vllm-project/vllm/pull/50723, in
vllm/model_executor/model_loader/checkpoint_weight_patch.py): the name in the checkpoint, the full shape, the dtype,
all values. The server's own loader splits and packs them. It may pack several weights of a layer into one (q, k and v;
gate and up; all experts), and its `reload_weights` makes a module anew of what it is given, without what is not: so
layers are in the patch whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_NAME

from ..atomic_files import is_plain_file, only_writer, whole_file
from ..errors import SurgicalError, first_of
from ..tuner.loading.fingerprint import fingerprint
from ..typed_json import parse_json
from .checkpoint import spans_of, weights_of

PATCH, UNDO = "patch", "undo"  # folders of an export
_FORMAT = "surgical_peft.patch.1"
_TO_NUMBER = re.compile(r"(.*?\.)?\d+\.")  # up to the first number: "model.layers.3.", of an expert too


@dataclass(frozen=True)
class PatchReport:
    """What `apply_patch` changed: how many weights, of which layers, in which files."""

    tensors: int
    layers: tuple[str, ...]
    files: tuple[str, ...]


def write_patch(base: PreTrainedModel, tuned: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write `patch/` and `undo/` to an existing `folder`; each replaces the other's weights.

    Args:
        base: the base model, as it is in its checkpoint.
        tuned: the state dict of the tuned model, merged.

    Returns:
        `tensors`, how many weights the patch holds; `layers`, of which; `rounded`, how many of them were tuned in a
        wider dtype than the checkpoint has, and lost digits.

    Raises:
        SurgicalError: the base has no checkpoint of safetensors, or cannot hold what was tuned.
    """
    if not base.name_or_path:
        raise SurgicalError(
            "a patch is of the files of a checkpoint, and the base model has none: save it and give its folder, as "
            "--base FOLDER on the command line or base_model=folder in Python."
        )
    files = weights_of(base.name_or_path)
    before = _as_in_checkpoint(base, base.state_dict(), files)
    after = _as_in_checkpoint(base, tuned, files)
    changed = {name for name, tensor in after.items() if not _same_bits(tensor, before[name])}
    if not changed:
        raise SurgicalError("the adapter has the base model's own weights: there is nothing to patch. Train it first.")
    _check_held(changed, after, files, base.name_or_path)
    layers = {_layer_of(name) for name in changed}
    names = [name for name in files if _layer_of(name) in layers]
    old = _read(files, names)
    new, rounded = dict(old), 0
    for name in names:
        if name in before and not _same_bits(old[name].to(before[name].dtype), before[name]):
            raise SurgicalError(
                f"{name} of the base model is not what {base.name_or_path!r} holds: a patch is of the checkpoint that "
                "is served. Give its folder, unquantized; with another head or vocabulary, the folder it was saved to."
            )
        if name in changed:
            new[name] = after[name].to(old[name].dtype, copy=True).contiguous()
            rounded += not _same_bits(new[name].to(after[name].dtype), after[name])
            if new[name].is_floating_point() and not bool(torch.isfinite(new[name].float()).all()):
                raise SurgicalError(f"{name} does not fit into {old[name].dtype}: use --format merged.")
    rest = {name: _fingerprint(files, name) for name in files.keys() - new.keys()}
    _write(new, old, rest, folder / PATCH)
    _write(old, new, rest, folder / UNDO)
    return {"tensors": len(names), "layers": sorted({_layer_of(name) for name in names}), "rounded": rounded}


def apply_patch(patch: str | Path, checkpoint: str | Path) -> PatchReport:
    """Put the weights of a patch, or of its undo, in their places in a checkpoint: all of them, or none.

    Each file is copied, changed and renamed; what stands beside the weights stays, to the byte. Where a patch was
    interrupted between two files, the same call, or that of the other one, goes on.

    Args:
        patch: the folder `patch/` or `undo/` of an export.
        checkpoint: a folder with the base model's safetensors, in one file or several.

    Raises:
        SurgicalError: no patch, no checkpoint, one of another model, or it holds these weights already.
        OSError: the folder cannot be written to.

    Example:
        >>> apply_patch("for_vllm/patch", "models/smollm2").files
        ('model.safetensors',)
        >>> apply_patch("for_vllm/undo", "models/smollm2")  # as it was, to the byte
    """
    base, new = _read_patch(Path(patch))
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise SurgicalError(f"{str(folder)!r} is no folder: give that of a checkpoint, of one of the Hub a copy.")
    files = weights_of(folder)
    _check_base(base, new, files, folder)
    parts = sorted({files[name] for name in new})
    if links := [path for path in parts if not is_plain_file(path)]:
        raise SurgicalError(f"{str(links[0])!r} is a link, as in the Hub's cache: patch a copy of your own.")
    with only_writer(folder), ExitStack() as stack:
        for path in parts:
            temporary = stack.enter_context(whole_file(path))
            shutil.copyfile(path, temporary)
            spans = spans_of(path)
            with temporary.open("r+b") as file:
                for name in new.keys() & spans.keys():
                    file.seek(spans[name][0])
                    file.write(_bytes_of(new[name]).numpy().data)
    return PatchReport(len(new), tuple(sorted({_layer_of(name) for name in new})), tuple(path.name for path in parts))


def _as_in_checkpoint(
    model: PreTrainedModel, state: Mapping[str, Tensor], files: Mapping[str, Path]
) -> dict[str, Tensor]:
    """The weights under the names, and in the pieces, of the checkpoint, which may be that of a model without head."""
    prefix = f"{model.base_model_prefix}."
    saved = revert_weight_conversion(model, dict(state))
    return {name if name in files else name.removeprefix(prefix): tensor for name, tensor in saved.items()}


def _write(
    tensors: Mapping[str, Tensor], replaced: Mapping[str, Tensor], rest: Mapping[str, str | None], folder: Path
) -> None:
    """Write the weights, and the fingerprints of the checkpoint into which they go: replaced and other ones."""
    folder.mkdir()
    prints = {**rest, **{name: fingerprint([tensor]) for name, tensor in replaced.items()}}
    metadata = {"format": "pt", "patch": _FORMAT, "base": json.dumps(prints)}
    save_file(dict(tensors), folder / SAFE_WEIGHTS_NAME, metadata=metadata)


def _read_patch(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fingerprints of the checkpoint into which a patch goes, and the patch's tensors, by their names."""
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        inside = [name for name in (PATCH, UNDO) if (folder / name / SAFE_WEIGHTS_NAME).is_file()]
        hint = f": give its folder {' or '.join(inside)}" if inside else f": it has no {SAFE_WEIGHTS_NAME}"
        raise SurgicalError(f"{str(folder)!r} is no patch{hint}.")
    spans_of(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("patch") != _FORMAT:
        raise SurgicalError(
            f"{str(path)!r} is no patch of this package (its format is {metadata.get('patch')!r}, not {_FORMAT!r}): "
            "give what `surgical-peft export --format patch` wrote."
        )
    prints = parse_json(metadata.get("base", ""), f"the record of the base model in {str(path)!r}", "export it again")
    tensors = load_file(path)
    if not tensors.keys() <= prints.keys():
        raise SurgicalError(f"{str(path)!r} is damaged: it does not say what it replaces. Export it again.")
    return prints, tensors


def _check_base(base: Mapping[str, Any], new: Mapping[str, Tensor], files: Mapping[str, Path], folder: Path) -> None:
    """Make sure that the checkpoint is the patch's own; some weights are in place where a patch was interrupted."""
    if strange := sorted(base.keys() ^ files.keys()):
        raise SurgicalError(
            f"{str(folder)!r} and the checkpoint that the patch was made of do not hold the same weights "
            f"({first_of(strange)}): the patch is of another model, or of a checkpoint with other names."
        )
    for name, tensor in new.items():
        place = _read(files, [name])[name]
        if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
            raise SurgicalError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} in the patch, and {place.dtype} of shape "
                f"{tuple(place.shape)} in {str(folder)!r}: export the patch again from this checkpoint."
            )
    here = {name: _fingerprint(files, name) for name in files}
    goal = {name: fingerprint([tensor]) for name, tensor in new.items()}
    if strange := [name for name in files if here[name] not in (base[name], goal.get(name, base[name]))]:
        name = strange[0]
        raise SurgicalError(
            f"{first_of(strange)} of {str(folder)!r} is not what it was where the patch was made ({here[name]}, not "
            f"{base[name]}): another revision, dtype or model, or another patch is in place. Undo that one, or export "
            "the patch again from this checkpoint."
        )
    if all(here[name] == goal[name] for name in goal):
        raise SurgicalError(f"{str(folder)!r} holds the weights of this patch already: nothing is to be done.")


def _check_held(changed: set[str], after: Mapping[str, Tensor], files: Mapping[str, Path], name: str) -> None:
    """Make sure that the checkpoint has all that was tuned; of tied weights, one."""
    held = {after[key].data_ptr() for key in changed if key in files}
    if absent := sorted(key for key in changed if key not in files and after[key].data_ptr() not in held):
        raise SurgicalError(
            f"the checkpoint {name!r} has no {first_of(absent)}: a patch replaces weights, a server takes no new ones "
            "(such as a new head). Use --format merged."
        )


def _read(files: Mapping[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted({files[name] for name in names}):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names if files[name] == path}
    return tensors


def _fingerprint(files: Mapping[str, Path], name: str) -> str | None:
    return fingerprint(_read(files, [name]).values())


def _layer_of(name: str) -> str:
    match = _TO_NUMBER.match(name)
    return match.group().removesuffix(".") if match else name.rpartition(".")[0]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bytes_of(one), _bytes_of(other))
