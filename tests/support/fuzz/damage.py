"""Damage to files: of bytes, of JSON at any depth, and of the folder around them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from .values import odd

_TEXTS = [
    *(b"", b"{", b"5", b"null", b"[]", b"{}", b'"x"', b"NaN", b'{"a": NaN}', b"\xff\xfe\x00", b"\0" * 100),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"1e999", b'"\\ud800"'),
]
at = st.floats(0, 1, exclude_max=True)
json_damage = st.one_of(
    st.tuples(st.just("set"), st.lists(at, min_size=1, max_size=4), odd),
    st.tuples(st.just("drop"), st.lists(at, min_size=1, max_size=4)),
    st.tuples(st.just("add"), st.lists(at, max_size=3), odd),
    st.tuples(st.just("text"), st.sampled_from(_TEXTS)),
)
byte_damage = st.one_of(
    st.tuples(st.just("cut"), at),
    st.tuples(st.just("flip"), at, st.integers(0, 7)),
    st.tuples(st.just("write"), at, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("append"), st.binary(min_size=1, max_size=8)),
)
file_damage = st.tuples(st.just("file"), st.sampled_from(["missing", "folder", "pipe", "link to itself", "empty"]))


def damage(path: Path, how: tuple[Any, ...]) -> None:
    """Do to a file what `how` says, by one of the strategies above."""
    kind, *more = how
    if kind in ("set", "drop", "add"):
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(damaged(values, how)), encoding="utf-8")
    elif kind == "text":
        path.write_bytes(more[0])
    elif kind == "file":
        path.unlink()
        makers = {"folder": Path.mkdir, "pipe": os.mkfifo, "empty": Path.touch}
        if more[0] in makers:
            makers[more[0]](path)
        elif more[0] != "missing":
            path.symlink_to(path)
    else:
        path.write_bytes(_damaged_bytes(path.read_bytes(), how))


def _damaged_bytes(content: bytes, how: tuple[Any, ...]) -> bytes:
    kind, *more = how
    if kind == "append":
        return content + more[0]
    place = int(more[0] * len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << more[1]]) + content[place + 1 :]
    return content[:place] + more[1] + content[place + len(more[1]) :]


def damaged(values: Any, how: tuple[Any, ...]) -> Any:
    """Plain data with one value, at any depth, set, dropped or added."""
    kind, way, *more = how
    values = json.loads(json.dumps(values))
    holder, key = None, None
    inside = values
    for share in way:
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else []
        if not keys:
            break
        holder, key = inside, keys[int(share * len(keys))]
        inside = holder[key]
    if kind == "add":
        if isinstance(inside, dict):
            inside["added"] = more[0]
        elif isinstance(inside, list):
            inside.append(more[0])
    elif kind == "drop" and holder is not None:
        del holder[key]
    elif kind == "set" and holder is not None:
        holder[key] = more[0]
    return values


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a folder, to be damaged."""
    return Path(shutil.copytree(folder, target))
