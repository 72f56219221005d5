"""Damaged adapters and deltas: what loads or exports is to the bit what the files hold, or nothing is changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import struct
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli.main import main
from surgical_peft.export.export import export
from tests.support.toys import TOYS
from tests.support.wrapping import logits, nudge

from .configs import LORA
from .damage import at, byte_damage, copy_of, damage, damaged, file_damage, json_damage
from .outcomes import Family
from .values import WORDS, odd

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DELTA_CONFIG, DELTA = "delta_config.json", "delta.safetensors"
BERT = TOYS["bert"]
_FIELDS = [entry.name for entry in fields(SurgicalConfig) if entry.init and entry.name != "peft_type"]
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "BOOL": 1, "F64": 8, "C64": 8, "F8_E4M3": 1}
_NAMES = [*WORDS, "x" * 10**6, "base_model.model.x", "base_model.model.bert.encoder.layer.1.output.dense.bias"]
_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"blocks": [0, "head"]},
    "lora": {"blocks": ["head"], "lora": {"r": 2, "target_modules": ["query", "value"]}},
    "parts": {"blocks": [1, 2], "target_modules": ["attention"], "exclude_modules": ["LayerNorm"]},
}


@functools.cache
def made() -> Path:
    """A folder with a base model, an adapter of each kind, and their deltas; for the whole process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    BERT.model().save_pretrained(folder / "base")  # type: ignore[operator]
    for kind, arguments in _ADAPTERS.items():
        nudge(get_peft_model(_base(folder), SurgicalConfig(**arguments))).save_pretrained(folder / kind)
        export(folder / kind, folder / f"{kind} delta", "delta", base_model=_base(folder))
    return folder


@functools.cache
def _loaded(folder: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(folder / "base").eval()


def _base(folder: Path | None = None) -> Any:
    return copy.deepcopy(_loaded(folder or made()))


header_damage = st.one_of(
    st.tuples(st.just("rename"), at, st.sampled_from(_NAMES) | st.text(max_size=5)),
    st.tuples(st.just("drop tensor"), at),
    st.tuples(st.just("twin"), at, st.sampled_from(_NAMES)),
    st.tuples(st.just("shape"), at, st.lists(st.sampled_from([0, 1, 2, 16, 32, -1, 2**40, 2**63]), max_size=3) | odd),
    st.tuples(st.just("dtype"), at, st.sampled_from([*_DTYPES, "X", ""])),
    st.tuples(st.just("offsets"), at, st.sampled_from([[0, 0], [0, 4], [4, 0], [0, 2**62], [-1, 4]]) | odd),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 10**6, 2**31, 2**63])),
    st.tuples(st.just("metadata"), odd),
    st.tuples(st.just("real"), at, st.sampled_from([*_DTYPES][:-1])),
    st.tuples(st.just("nan"), at),
    st.tuples(st.just("real shape"), at, st.sampled_from(["flat", "double", "empty", "turned"])),
)
config_damage = st.one_of(
    st.tuples(st.just("key"), st.sampled_from(_FIELDS), odd),
    st.tuples(st.just("key"), st.just("lora"), st.dictionaries(st.sampled_from(LORA), odd, min_size=1, max_size=2)),
    st.tuples(st.just("lora key"), st.sampled_from(LORA), odd),
    st.tuples(st.just("key"), st.just("tuned_modules"), st.dictionaries(st.sampled_from(WORDS), odd, max_size=2)),
    json_damage,
)
DOORS = ["load", "load second", "peft", "merged", "delta", "lora", "adapter", "command line"]
cases = st.tuples(
    st.sampled_from(list(_ADAPTERS)),
    st.sampled_from(DOORS),
    st.one_of(
        st.tuples(st.just(CONFIG), config_damage | byte_damage | file_damage),
        st.tuples(st.just(CONFIG), config_damage),
        st.tuples(st.just(WEIGHTS), header_damage | byte_damage | file_damage),
        st.tuples(st.just(WEIGHTS), header_damage),
    ),
)
deltas = st.tuples(
    st.sampled_from(list(_ADAPTERS)),
    st.sampled_from(["adapter", "peft", "merged"]),
    st.one_of(
        st.tuples(st.just(DELTA_CONFIG), config_damage | byte_damage | file_damage),
        st.tuples(st.just(DELTA), header_damage | byte_damage | file_damage),
        st.tuples(st.just(DELTA), st.tuples(st.just("entries"), json_damage.filter(lambda how: how[0] != "text"))),
    ),
)


def spoil(folder: Path, name: str, how: tuple[Any, ...]) -> None:
    """Damage a file of an adapter or a delta."""
    path, kind = folder / name, how[0]
    if kind in ("key", "lora key"):
        values = json.loads(path.read_text())
        if kind == "key":
            values[how[1]] = how[2]
        else:
            values["lora"] = {**(values["lora"] or {}), how[1]: how[2]}
        path.write_text(json.dumps(values))
    elif name in (WEIGHTS, DELTA) and kind not in ("cut", "flip", "write", "append", "file"):
        path.write_bytes(_with_other_header(path.read_bytes(), how))
    else:
        damage(path, how)


def _with_other_header(content: bytes, how: tuple[Any, ...]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind, *more = how
    if kind == "length":
        return struct.pack("<Q", more[0]) + content[8:]
    names = [name for name in header if name != "__metadata__"]
    name = names[int(more[0] * len(names))] if isinstance(more[0], float) and 0 <= more[0] < 1 else names[0]
    start, end = header[name]["data_offsets"]
    if kind == "rename":
        header = {(more[1] if key == name else key): value for key, value in header.items()}
    elif kind == "drop tensor":
        header, body = _replaced(header, body, name, None)
    elif kind == "twin":
        header[more[1]] = {**header[name], "data_offsets": [len(body), len(body) + end - start]}
        body += body[start:end]
    elif kind in ("shape", "dtype", "offsets"):
        header[name][{"offsets": "data_offsets"}.get(kind, kind)] = more[1]
    elif kind == "metadata":
        header["__metadata__"] = more[0]
    elif kind == "entries":
        header["__metadata__"]["tensors"] = json.dumps(damaged(json.loads(header["__metadata__"]["tensors"]), more[0]))
    else:
        header, body = _replaced(header, body, name, _other(kind, more[-1], header[name]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def _other(kind: str, how: Any, entry: dict[str, Any]) -> tuple[str, list[int], bytes]:
    """Another tensor, whole, in the place of the one that a header describes."""
    shape = entry["shape"]
    count = int(np.prod(shape))
    if kind == "nan":
        return (
            entry["dtype"],
            shape,
            np.full(count, np.nan, np.float32).tobytes()[: count * _DTYPES.get(entry["dtype"], 1)],
        )
    if kind == "real":
        return how, shape, bytes(count * _DTYPES[how])
    other = {"flat": [count], "double": [2, *shape], "empty": [0, *shape[1:]], "turned": shape[::-1]}[how]
    return entry["dtype"], other, bytes(int(np.prod(other)) * _DTYPES.get(entry["dtype"], 1))


def _replaced(
    header: dict[str, Any], body: bytes, name: str, new: tuple[str, list[int], bytes] | None
) -> tuple[dict[str, Any], bytes]:
    """The file with one tensor changed or left out, and all offsets as they have to be then."""
    result, parts, place = {}, [], 0
    for key, entry in header.items():
        if key == "__metadata__":
            result[key] = entry
            continue
        dtype, shape, data = entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]
        if key == name and new is None:
            continue
        if key == name:
            dtype, shape, data = new  # type: ignore[misc]
        result[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        parts.append(data)
        place += len(data)
    return result, b"".join(parts)


def check_adapter(case: tuple[str, str, tuple[str, tuple[Any, ...]]], folder: Path) -> None:
    """Load or export a damaged adapter; nothing of it is in the model then, or all of it."""
    kind, door, (name, how) = case
    adapter = copy_of(made() / kind, folder / "adapter")
    spoil(adapter, name, how)
    config = adapter / CONFIG
    if door.startswith("load") and not (config.is_file() and _is_ours(config)):
        door = "peft"  # as far as PEFT can see it is no adapter of ours, and its own errors stand
    if door.startswith("load"):
        _check_load(adapter, is_second=door == "load second")
    else:
        check_export(adapter, folder / "out", door)


def _is_ours(path: Path) -> bool:
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return b'"blocks"' in path.read_bytes()
    return isinstance(values, dict) and "blocks" in values and values.get("peft_type", "SURGICAL") == "SURGICAL"


def _check_load(adapter: Path, is_second: bool) -> None:
    model = _base()
    if is_second:
        model = get_peft_model(model, SurgicalConfig(blocks=[1]))
    before = _state(model)
    try:
        if is_second:
            model.load_adapter(str(adapter), "second")
            model.set_adapter("second")
        else:
            model = PeftModel.from_pretrained(model, str(adapter))
    except SurgicalError:
        after = _state(model)
        assert before.keys() == after.keys(), "refused, and the model has other tensors"
        assert all(same(before[key], after[key]) for key in before), "refused, and the model has other weights"
        raise
    check_holds(model, adapter / WEIGHTS, "second" if is_second else "default")


def check_holds(model: Any, file: Path, name: str) -> None:
    """The model has the weights of the file, and the base's everywhere else."""
    held = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()}
    state = {_plain(key, name): tensor for key, tensor in _state(model.base_model.model).items()}
    base = _base().state_dict()
    for key, tensor in held.items():
        assert key in state, f"{key} of the file is nowhere"
        assert same(state[key], tensor), f"{key} is another than in the file"
    for key, tensor in base.items():
        assert key in held or key not in state or same(state[key], tensor), (
            f"{key} is neither the file's nor the base's"
        )
    trained = {key for key in state if ".lora_" in key}
    assert trained <= held.keys(), "LoRA weights that the file does not hold"
    logits(model, BERT.batch())  # it runs


def _state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _plain(key: str, name: str) -> str:
    return key.replace(f".{name}", "").replace(".base_layer", "").replace(".modules_to_save", "")


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit but for the precision, NaN included, and of one kind of number."""
    if one.shape != other.shape or one.is_floating_point() != other.is_floating_point():
        return False
    return torch.equal(one, other) or torch.allclose(one, other.to(one.dtype), rtol=0, atol=0, equal_nan=True)


def check_export(source: Path, out: Path, format: str, original: Path | None = None) -> None:
    """Export an adapter or a delta; what comes out answers as the adapter loaded does, or is not there at all."""
    try:
        if format == "command line":
            _run("export", str(source), str(out), "--format", "peft", "--base", str(made() / "base"))
        else:
            export(source, out, format, base_model=_base(), rank=16 if format == "lora" else None)
    except SurgicalError:
        assert not out.exists(), "refused, and something is left"
        raise
    adapter = original or source
    if format == "adapter":
        files = [load_file(folder / WEIGHTS) for folder in (out, adapter)]
        assert files[0].keys() == files[1].keys() and all(same(files[0][key], files[1][key]) for key in files[0])
        return
    expected = logits(PeftModel.from_pretrained(_base(), str(adapter)).eval(), BERT.batch())
    if format == "delta":
        export(out, out.with_name("back"), "adapter", base_model=_base())
        model = PeftModel.from_pretrained(_base(), str(out.with_name("back")))
    elif format == "merged":
        model = BertForSequenceClassification.from_pretrained(out)
    else:
        model = PeftModel.from_pretrained(_base(), str(out))
    given = logits(model.eval(), BERT.batch())
    near = {"lora": 1e-3, "merged": 1e-5}.get(format, 0.0)  # LoRA is rounded, in both
    assert torch.allclose(given, expected, rtol=near, atol=near, equal_nan=True), "it answers otherwise"


def _run(*arguments: str) -> None:
    """The command line in this process; its error line as an error of ours, if it is one."""
    before, output, errors = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["surgical-peft", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as stop:
        if stop.code == 2 and errors.getvalue().startswith("error:"):
            raise SurgicalError(errors.getvalue()) from None
        assert not stop.code, f"exit code {stop.code}: {errors.getvalue()}"
    finally:
        sys.argv = before


def check_delta(case: tuple[str, str, tuple[str, tuple[Any, ...]]], folder: Path) -> None:
    """Export a damaged delta: the adapter that it was made of comes out, or nothing."""
    kind, format, (name, how) = case
    delta = copy_of(made() / f"{kind} delta", folder / "delta")
    spoil(delta, name, how)
    check_export(delta, folder / "out", format, made() / kind)


FAMILIES = [Family("adapters", cases, check_adapter), Family("deltas", deltas, check_delta)]
