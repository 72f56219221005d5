"""The safetensors files of a checkpoint: which weight stands in which file, and where in it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..errors import SurgicalError
from ..typed_json import read_json


def file_of(name: str | Path, file: str) -> Path | None:
    """The path of a `file` of a folder or Hub repository; None if it has none, or it is not at hand."""
    quiet = (f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors"))
    path = cached_file(str(name), file, **dict.fromkeys(quiet, False))
    return None if path is None else Path(path)


def weights_of(name: str | Path) -> dict[str, Path]:
    """The file of each weight of a checkpoint, by the name that the weight has there.

    Args:
        name: a folder or a Hub id; of one file or of several with an index.

    Raises:
        SurgicalError: it has no safetensors, lacks some of them, or they are corrupt.

    Example:
        >>> weights_of("recipes/fashion_mnist/vit")["classifier.weight"]
        PosixPath('recipes/fashion_mnist/vit/model.safetensors')
    """
    if single := file_of(name, SAFE_WEIGHTS_NAME):
        paths = [single]
    elif index := file_of(name, SAFE_WEIGHTS_INDEX_NAME):
        parts = read_json(index, "copy or save the checkpoint again").get("weight_map")
        if not isinstance(parts, dict) or not all(part == Path(str(part)).name for part in parts.values()):
            raise SurgicalError(f"{str(index)!r} names no files of its folder: copy or save the checkpoint again.")
        files = {part: file_of(name, part) for part in sorted(set(parts.values()))}
        if missing := [part for part, path in files.items() if path is None]:
            raise SurgicalError(f"{str(name)!r} lacks {missing[0]}, which {index.name} names: copy it again.")
        paths = [path for path in files.values() if path]
    else:
        raise SurgicalError(
            f"{str(name)!r} is no checkpoint of safetensors: it has neither {SAFE_WEIGHTS_NAME} nor "
            f"{SAFE_WEIGHTS_INDEX_NAME}. Load the model, call model.save_pretrained(folder), and give the folder."
        )
    return {key: path for path in paths for key in spans_of(path)}


def spans_of(path: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor begin and end in a safetensors file.

    Raises:
        SurgicalError: it is corrupt.
    """
    try:
        with safe_open(path, "pt"):  # checks the header, and that the data are as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise SurgicalError(f"{str(path)!r} is corrupt or incomplete ({error}): copy or save it again.") from error
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items()
    }
