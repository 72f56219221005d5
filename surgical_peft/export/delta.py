"""The delta format: what tuning changed, to the last bit, in fewer bytes where it compresses.

`delta.safetensors` holds one byte array a changed tensor. Floating-point W - W0 could not be undone exactly, so the
difference is that of the bit patterns, read as integers: small where the value moved little. Folded to non-negative
numbers and split into byte planes, its high planes are mostly zeros and compress. A tensor whose own planes are
smaller so is kept as it is, and a plane that does not compress is stored plainly.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SurgicalError
from ..tuner.config import SurgicalConfig
from ..tuner.loading.fingerprint import fingerprint
from ..tuner.loading.saved_adapter import PREFIX, Base, LoadedBase, SavedAdapter, check_fits, load_base, read_config
from ..tuner.tensors.row_names import with_rows

DELTA_CONFIG = "delta_config.json"  # the adapter's, under a name that makes it no adapter's folder
DELTA_WEIGHTS = "delta.safetensors"
_FORMAT = "surgical_peft.delta.1"
_MALFORMED = (ValueError, LookupError, TypeError)  # what reading other things than a delta raises
_MOST_DEFLATED = 1032  # bytes that one byte of zlib's stands for at most (https://zlib.net/zlib_tech.html)


def write_delta(adapter: SavedAdapter, base: LoadedBase, folder: Path) -> dict[str, Any]:
    """Write the delta of `adapter` to an existing `folder`.

    Returns:
        `adapter_bytes`, `delta_bytes` (of the weights, without file headers) and their `ratio`; `planes_ratio`, what
        byte planes alone give, without a base model.

    Raises:
        SurgicalError: the adapter was made from another model.
    """
    state = with_rows(base.model.state_dict(), adapter.tensors)
    new = adapter.new_to(base)
    check_fits(adapter, state, new)
    entries: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Tensor] = {}
    plain = 0
    for name, tuned in adapter.tensors.items():
        entry: dict[str, Any] = {"dtype": str(tuned.dtype).removeprefix("torch."), "shape": list(tuned.shape)}
        bits = _bits(tuned)
        data, planes = _pack(bits)
        plain += len(data)
        entry["of"] = "weights"
        if name not in new:
            origin = _bits(state[name].to(tuned.dtype))
            entry["base"] = fingerprint([state[name].to(tuned.dtype)])
            packed, its_planes = _pack(_fold(bits - origin))
            if np.array_equal(bits, origin):
                entry["of"], data, planes = "nothing", b"", []
            elif len(packed) < len(data):
                entry["of"], data, planes = "difference", packed, its_planes
        entries[name] = entry | {"planes": planes}
        if data:
            arrays[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    before = sum(tensor.nbytes for tensor in adapter.tensors.values())
    size = sum(len(array) for array in arrays.values())
    report = {"adapter_bytes": before, "delta_bytes": size, "ratio": _ratio(before, size)}
    report["planes_ratio"] = _ratio(before, plain)
    metadata = {"format": _FORMAT, "tensors": json.dumps(entries, separators=(",", ":")), "report": json.dumps(report)}
    metadata["digest"] = _digest(adapter.tensors)
    save_file(arrays, folder / DELTA_WEIGHTS, metadata=metadata)
    shutil.copyfile(adapter.folder / CONFIG_NAME, folder / DELTA_CONFIG)
    return report


def read_delta(folder: Path, base_model: Base) -> tuple[SavedAdapter, LoadedBase]:
    """The adapter that a delta was made of, bit for bit, and the base model that it needed.

    Raises:
        SurgicalError: no delta, a corrupt one, or another base model than it was made with.
    """
    values = read_config(folder / DELTA_CONFIG, "delta")
    path = folder / DELTA_WEIGHTS
    if not path.is_file():  # a named pipe would be waited for
        raise SurgicalError(f"{str(folder)!r} has no {DELTA_WEIGHTS}: copy or export it again.")
    with _reading(path, SafetensorError, OSError, *_MALFORMED):
        config = SurgicalConfig.from_peft_type(**values)
        if not isinstance(config, SurgicalConfig):
            raise SurgicalError(f"{str(folder)!r} is of the method {values.get('peft_type')!r}, not of SURGICAL.")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise SurgicalError(f"{str(path)!r} is of the format {metadata.get('format')!r}; this reads {_FORMAT!r}.")
        entries = json.loads(metadata["tensors"])
        dtypes = {name: _dtype(entry["dtype"]) for name, entry in entries.items()}
        if not dtypes:
            raise ValueError("it holds no tensor")
        shapes = {name: _shape_of(name, entry) for name, entry in entries.items()}
    tuned = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    base = load_base(config, tuned, base_model)
    state = with_rows(base.model.state_dict(), entries)
    with _reading(path, zlib.error, *_MALFORMED):
        tensors = {name: _restore(name, entry, arrays, state, dtypes[name]) for name, entry in entries.items()}
        if metadata.get("digest", digest := _digest(tensors)) != digest:  # a delta of the first version has none
            raise ValueError("its tensors are not those that it was made of")
    return SavedAdapter(folder, config, tensors), base


def _digest(tensors: dict[str, Tensor]) -> str:
    """A digest of the names and the bits: most damage to a delta unpacks to other weights without an error."""
    lines = [f"{name} {fingerprint([tensor])}\n" for name, tensor in sorted(tensors.items())]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


@contextmanager
def _reading(path: Path, *corrupt: type[Exception]) -> Iterator[None]:
    """Tells that `path` is corrupt for errors of these types, and lets all others pass, such as a lack of memory."""
    try:
        yield
    except SurgicalError:
        raise
    except corrupt as error:
        raise SurgicalError(f"{str(path)!r} is missing or corrupt ({error}): copy or export it again.") from error


def _shape_of(name: str, entry: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(map(operator.index, entry["shape"]))
    if min(shape, default=0) < 0 or math.prod(shape) >= 2**60:
        raise ValueError(f"{name!r} has the shape {shape}")
    return shape


def _restore(
    name: str, entry: dict[str, Any], arrays: dict[str, np.ndarray], state: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """One tensor of the adapter, from its planes and the base model's bits."""
    shape, width = _shape_of(name, entry), min(dtype.itemsize, 8)
    count = math.prod(shape) * dtype.itemsize // width
    if entry["of"] == "weights":
        bits = _unpack(arrays[name].tobytes(), entry["planes"], count, width)
    else:
        origin = _origin(name, entry, state, dtype)
        if len(origin) != count:
            raise ValueError(f"{name!r} has the shape {shape}, other than in the base model")
        if entry["of"] not in ("nothing", "difference"):
            raise ValueError(f"{name!r} is said to be of {entry['of']!r}")
        bits = origin
        if entry["of"] == "difference":
            bits = origin + _unfold(_unpack(arrays[name].tobytes(), entry["planes"], count, width))
    return torch.from_numpy(bits.view(np.uint8).copy()).view(dtype).reshape(shape)


def write_restored(adapter: SavedAdapter, folder: Path) -> None:
    """Write an adapter read from a delta to an existing `folder`: the files that the delta was made of."""
    tensors = {PREFIX + name: tensor for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copyfile(adapter.folder / DELTA_CONFIG, folder / CONFIG_NAME)


def _origin(name: str, entry: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
    """The base model's bits of one tensor."""
    if name not in state:
        raise SurgicalError(f"the delta is of {name!r}, and the base model has no weight of that name: give its own.")
    here = fingerprint([state[name].to(dtype)])
    if here != entry["base"]:
        raise SurgicalError(
            f"the delta was made with another base model: the fingerprint of {name!r} is {here} here and was "
            f"{entry['base']} there. Give the base model (and revision) that it was made with."
        )
    return _bits(state[name].to(dtype))


def _bits(tensor: Tensor) -> np.ndarray:
    """The bit patterns as unsigned integers, of any dtype, in one dimension."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"<u{min(tensor.element_size(), 8)}")


def _fold(difference: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ...: a small difference of either sign has zeros in its high bytes."""
    signed = difference.view(difference.dtype.str.replace("u", "i"))
    return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(difference.dtype)


def _unfold(folded: np.ndarray) -> np.ndarray:
    return (folded >> 1) ^ (~(folded & 1) + 1)


def _pack(bits: np.ndarray) -> tuple[bytes, list[tuple[str, int]]]:
    """All the lowest bytes, then all the next ones, ...; each plane compressed if that makes it smaller."""
    parts, planes = [], []
    for plane in bits.view(np.uint8).reshape(-1, bits.itemsize).T:
        plain = plane.tobytes()
        compressed = zlib.compress(plain)
        small = len(compressed) < len(plain)
        parts.append(compressed if small else plain)
        planes.append(("zlib" if small else "plain", len(parts[-1])))
    return b"".join(parts), planes


def _unpack(data: bytes, planes: list[tuple[str, int]], count: int, width: int) -> np.ndarray:
    if len(planes) != width or any(length * _MOST_DEFLATED < count for _, length in planes):
        raise ValueError("its planes do not fill it")
    matrix = np.empty((count, width), np.uint8)
    start = 0
    for index, (codec, length) in enumerate(planes):
        part = data[start : start + length]
        start += length
        # never more than there is room for, whatever a hostile file holds
        unpacking = zlib.decompressobj()
        plain = unpacking.decompress(part, count or 1) if codec == "zlib" else part
        if codec == "zlib" and not unpacking.eof:
            raise ValueError("one of its planes does not end where it should")
        matrix[:, index] = np.frombuffer(plain, np.uint8)
    if start != len(data):
        raise ValueError("its planes do not fill it")
    return matrix.reshape(-1).view(f"<u{width}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _ratio(before: int, after: int) -> float:
    return round(before / max(after, 1), 3)
