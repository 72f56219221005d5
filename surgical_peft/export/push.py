"""Putting a trained adapter on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import logging
from peft.utils.constants import CONFIG_NAME

from ..atomic_files import is_plain_file
from ..errors import SurgicalError, reason_of
from ..typed_json import read_json
from .card_text import HERE
from .private import is_absolute, without_base

REPORT = "report.json"  # of a training, beside its adapter
# Of what `save_pretrained` of adapters, tokenizers and image processors writes, and `train`.
_SUFFIXES = (".json", ".jinja", ".md", ".model", ".png", ".safetensors", ".spm", ".tiktoken", ".txt", ".bpe", ".codes")

_PATIENCE = 6  # times what huggingface_hub waits for a download, HF_HUB_DOWNLOAD_TIMEOUT: a commit takes longer


@dataclass(frozen=True)
class Pushed:
    """The place of a pushed adapter.

    Attributes:
        repository: its name, `user/name`.
        commit: its address.
        private: whether only its owner sees it.
        left_out: files of the adapter's folder that are not of a kind which belongs there, or links; they stay here.
    """

    repository: str
    commit: str
    private: bool
    left_out: tuple[str, ...] = ()


def push(run: str | Path, repository: str, *, public: bool = False) -> Pushed:
    """Create a repository on the Hub and put a training's adapter and card into it, in one commit.

    The token is that of huggingface_hub's own login. In the card, the repository's name stands where it is loaded.
    Where a base model lies that is not from the Hub is left out of the config.

    Args:
        run: the folder that `surgical-peft train` wrote.
        repository: `user/name`, or `name` for the user's own; there must be none of that name, or an empty one.
        public: let everyone see it; else the repository is private.

    Raises:
        SurgicalError: no adapter with a card in `run`, a name that cannot be or is taken, no token or one without the
            right to write there, no network, no answer, metadata that the Hub refuses, or a card that says where
            things lie on this machine.

    Example:
        >>> push("runs/label_map", "me/label-map").repository
        'me/label-map'
    """
    folder = Path(run) / "adapter"
    if folder.is_symlink():
        raise SurgicalError(f"{str(folder)!r} is a link, which may lead anywhere: put the folder itself there.")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        if not is_plain_file(folder / name):
            remedy = f"make it with `surgical-peft card {run}`" if name == "README.md" else "train first"
            raise SurgicalError(f"{str(folder)!r} has no {name}, or only a link: {remedy}.")
    if constants.HF_HUB_OFFLINE:
        raise SurgicalError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it for this command.")
    if get_token() is None:
        raise SurgicalError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    files, left_out = _files(folder)
    texts = _texts(folder, files)
    _check_private(Path(run), texts)
    api = HfApi()
    with _clear_errors(repository), _with_limits():
        name = _create(api, repository, public)
        contents = {path: text.replace(f'"{HERE}"', f'"{name}"') for path, text in texts.items()}
        commit = api.create_commit(
            name,
            [
                CommitOperationAdd(path, contents[path].encode() if path in contents else folder / path)
                for path in files
            ],
            commit_message="Adapter trained with surgical-peft",
        )
    return Pushed(name, str(commit.commit_url), not public, left_out)


def _files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """What belongs to an adapter, by its kind, and what else lies there; links, which may lead anywhere, too."""
    files: list[str] = []
    others: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        is_known = path.suffix in _SUFFIXES and not any(part.startswith(".") for part in name.parts)
        (files if is_known and is_plain_file(path) else others).append(name.as_posix())
    return files, tuple(others)


def _texts(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The card and the configs, as they are published."""
    texts = {}
    for path in files:
        if path.endswith(CONFIG_NAME):
            texts[path] = (
                json.dumps(without_base(read_json(folder / path, "copy or save the adapter again")), indent=2) + "\n"
            )
        elif path.endswith(("README.md", "config.json")):
            try:
                texts[path] = (folder / path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise SurgicalError(f"{path} cannot be read as text ({error}): write it in UTF-8.") from error
    return texts


def _check_private(run: Path, texts: Mapping[str, str]) -> None:
    """Refuse a token, and places on this machine; a card of an earlier version may say them."""
    places = [str(run.resolve()), str(Path.home())]
    if (run / REPORT).is_file():
        recipe = read_json(run / REPORT, "train again").get("recipe")
        places += filter(is_absolute, _texts_in(recipe))
    token = get_token()
    for path, text in texts.items():
        if token and token in text:
            raise SurgicalError(f"{path} holds your token for the Hub: take it out, and make a new one.")
        for place in places:
            if len(place) > 1 and re.search(rf"(?:(?<=file://)|(?<![\w/.:-])){re.escape(place)}(?![\w-])", text):
                raise SurgicalError(
                    f"{path} says {place!r}, which would be published: `surgical-peft card {run}` writes the card "
                    "without, or take it out by hand."
                )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(part)


def _create(api: HfApi, repository: str, public: bool) -> str:
    """The full name of a repository that is new, or that a push which did not get through left empty."""
    try:
        return api.create_repo(repository, private=not public).repo_id
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    name = repository if "/" in repository else f"{api.whoami()['name']}/{repository}"
    info = api.model_info(name)
    if any(file.rfilename != ".gitattributes" for file in info.siblings or []):
        raise SurgicalError(f"{name} exists and is not empty: push under another name, or delete it first on the Hub.")
    if info.private == public:
        is_now, wanted = ("private", "public") if info.private else ("public", "private")
        raise SurgicalError(
            f"{name} exists, empty, and is {is_now}; you asked for a {wanted} one: change that in its settings on the "
            "Hub, or push under another name."
        )
    return name


@contextmanager
def _with_limits() -> Iterator[None]:
    """Inside, an answer of the Hub is waited for a minute at most; huggingface_hub itself has no limit.

    Retries are those of huggingface_hub, whose warnings would show where a file is uploaded, signature and all.
    """
    session, verbosity = get_session(), logging.get_verbosity()
    waits = session.timeout
    if waits.read is None:
        session.timeout = _PATIENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    logging.set_verbosity_error()
    try:
        yield
    finally:
        session.timeout = waits
        logging.set_verbosity(verbosity)


@contextmanager
def _clear_errors(repository: str) -> Iterator[None]:
    """One kind of error for all the ways in which the Hub refuses or is not there."""
    try:
        yield
    except SurgicalError:
        raise
    except (HTTPError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        is_upload = isinstance(error, RuntimeError) and error.__cause__ is not None
        raise SurgicalError(_in_words(error.__cause__ if is_upload else error, repository)) from error  # type: ignore[arg-type]


def _in_words(error: BaseException, repository: str) -> str:
    if isinstance(error, HfHubHTTPError):
        remedy = {
            401: "the token is not valid: log in again with `hf auth login`",
            403: "the token may not write there: give it that right, or push to a name of your own",
        }.get(error.response.status_code, "try again later, nothing that was trained is lost")
        reason = error.server_message or f"status {error.response.status_code}"
        return f"the Hub refuses {repository!r} ({reason}): {remedy}."
    if isinstance(error, HTTPError):
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached ({reason_of(error)}): look at the network and push "
            "again, nothing that was trained is lost. If the repository is not empty then, this push got through."
        )
    if isinstance(error, HFValidationError):
        return f"{repository!r} cannot be a repository's name: {error}"
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return f"the Hub refuses the card: {error} Mend adapter/README.md and push again."
    return (
        f"what answers at {constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}: "
        f"{reason_of(error)}): see whether a proxy or a login page stands between, and what HF_ENDPOINT says."
    )
