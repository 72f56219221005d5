"""The files of a saved adapter, looked at before a model is changed.

PEFT and transformers wrap the model first and open the weights afterwards, and neither tells the tuner where they
are. So `watch_reading` notes in the config which file it comes from, at the one place that all of them read it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...blocks.unwrap import bare_parameter_name
from ...errors import SurgicalError
from ..config import ConfigSource, SurgicalConfig, SurgicalPeftType

Shapes = dict[str, tuple[int, ...]]
_LONGEST_NAME = 1000  # characters


def watch_reading() -> None:
    """From now on, a config of ours knows the file that it is read from; a second call changes nothing.

    The files are checked there, too: PEFT reads the config before anything else, through whatever door.
    """
    current = PeftConfigMixin.__dict__["from_json_file"].__func__
    read = getattr(current, "_surgical_original", current)

    @functools.wraps(read)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        return _read_config(functools.partial(read, cls, path_json_file, **kwargs), cls, Path(path_json_file))

    from_json_file._surgical_original = read  # type: ignore[attr-defined]
    PeftConfigMixin.from_json_file = classmethod(from_json_file)


def _read_config(read: Callable[[], Any], cls: type, path: Path) -> Any:
    try:
        loaded = read()
    except (ValueError, TypeError, RecursionError) as error:  # JSON and encoding
        if not issubclass(cls, SurgicalConfig) and b'"blocks"' not in path.read_bytes():
            raise  # not ours, as far as can be seen
        raise SurgicalError(
            f"{path} is not valid JSON: {error}. Save the adapter again, or fetch it again."
        ) from error
    kind = loaded.get("peft_type", SurgicalPeftType.SURGICAL) if isinstance(loaded, dict) else None
    if isinstance(kind, str) and kind != SurgicalPeftType.SURGICAL and kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        return loaded  # another method's
    if not isinstance(loaded, dict) or (kind != SurgicalPeftType.SURGICAL and "blocks" not in loaded):
        return loaded  # PEFT's own error
    if kind != SurgicalPeftType.SURGICAL:
        raise SurgicalError(f"{path} has the 'peft_type' {kind!r}, which PEFT does not know: fetch the adapter again.")
    if "peft_type" not in loaded:
        if "blocks" not in loaded:
            return loaded
        raise SurgicalError(f'{path} has no \'peft_type\': write "peft_type": "SURGICAL" into it, if it is one.')
    if ":" in str(loaded.get("criterion")):
        raise SurgicalError(
            f"{path} asks to import and run {loaded['criterion']!r} as its criterion; a file may only name criteria "
            "of this package. Pass your own in Python."
        )
    weights = path.with_name(SAFETENSORS_WEIGHTS_NAME)
    if weights.is_file():
        _shapes(weights)
    elif path.with_name(WEIGHTS_NAME).exists():
        raise SurgicalError(
            f"{path.with_name(WEIGHTS_NAME)} holds pickled weights, which can run any code when they are read: "
            "refused. If you trust where it is from, convert it: safetensors.torch.save_file(torch.load(file, "
            f"weights_only=True), {SAFETENSORS_WEIGHTS_NAME!r})."
        )
    loaded.pop("strict_base", None)  # that is for who loads to say
    known = {field.name for field in fields(SurgicalConfig)}
    later = {name: loaded.pop(name) for name in sorted(loaded.keys() - known)}
    return {**loaded, "read_from": ConfigSource(path, later)}


def _shapes(file: Path) -> Shapes:
    """Names and shapes in a file of weights, from its header; that also tells whether the file is whole."""
    shapes = {key: tuple(part.get_shape()) for key, part in _header(file).items()}
    if long := [key for key in shapes if len(key) > _LONGEST_NAME]:
        raise SurgicalError(
            f"{file} has a name of {len(long[0]):,} characters, which no weight has: save or fetch it again."
        )
    return shapes


def _header(file: Path) -> dict[str, Any]:
    """The tensors in a file of weights, none of them read."""
    try:
        with safe_open(file, framework="pt") as weights:
            return {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SurgicalError(
            f"{file} is no whole safetensors file ({error}): it was cut short or changed. Save or fetch it again."
        ) from error


def saved_fractions(config: SurgicalConfig) -> set[str]:
    """Bare names of the saved weights that are fractions, in any precision; empty if it is not a saved adapter's."""
    file = _weights_of(config)
    header = {} if file is None else _header(file)
    return {bare_parameter_name(key) for key, part in header.items() if part.get_dtype().startswith(("F", "BF"))}


def saved_shapes(config: SurgicalConfig) -> Shapes | None:
    """Names and shapes of the weights that belong to `config`; None if it is not a saved adapter's.

    Raises:
        SurgicalError: there are none beside the config, or the file is damaged.
    """
    file = _weights_of(config)
    return None if file is None else _shapes(file)


def saved_tensors(config: SurgicalConfig, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The saved weights whose names in the base model are `wanted`, by these; none if it is not a saved adapter's."""
    file = _weights_of(config)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as weights:
        names = {bare_parameter_name(key): key for key in weights.keys()}  # noqa: SIM118
        return {name: weights.get_tensor(key) for name, key in names.items() if wanted(name)}


def _weights_of(config: SurgicalConfig) -> Path | None:
    if config.read_from is None:
        return None
    file = config.read_from.path.with_name(SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():  # a named pipe would be waited for
        where = _in_hub_cache(config.read_from.path)
        if where is None:
            raise SurgicalError(
                f"{file.parent} holds an adapter's config but no {SAFETENSORS_WEIGHTS_NAME}: save or fetch the "
                "adapter again. For a new adapter with the same choice use get_peft_model."
            )
        try:
            file = Path(hf_hub_download(filename=SAFETENSORS_WEIGHTS_NAME, **where))
        except EntryNotFoundError as error:
            raise SurgicalError(
                f"{where['repo_id']!r} has no {SAFETENSORS_WEIGHTS_NAME} that can be had: {error}. Pickled weights "
                "are not read; ask its author to save it again."
            ) from error
        except HfHubHTTPError:
            return None  # only who loads has the token: PEFT fetches and reports
    return file


def _in_hub_cache(path: Path) -> dict[str, Any] | None:
    """Arguments by which to ask the Hub for a file beside `path`, if that lies in a snapshot of a repository."""
    for folder in path.parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            home = folder.parent.parent
            inside = path.parent.relative_to(folder).as_posix()
            return {
                "repo_id": home.name.removeprefix("models--").replace("--", "/"),
                "revision": folder.name,
                "subfolder": None if inside == "." else inside,
                "cache_dir": str(home.parent),
            }
    return None
