"""`SurgicalConfig`: the user's choice, as `adapter_config.json` holds it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..atomic_files import write_text
from ..blocks.block_map import PART
from ..blocks.given_layers import as_paths
from ..errors import SurgicalError, reason_of
from ..scoring.selection import Selection
from ..typed_json import JsonReader
from ..validation import check_count
from .lora_arguments import as_list, lora_arguments
from .name_checks import check_head_config, check_names


class SurgicalPeftType(str, Enum):
    """Our entry in PEFT's mappings. The name equals the value: PEFT looks methods up by the string in the file."""

    SURGICAL = "SURGICAL"


_JSON = JsonReader("the adapter's config", "save or fetch the adapter again")
KEEP_BASE = ("device", "cpu", "none")
Choice = Union[str, list[str]]  # modules inside a block: "all", names, a regular expression, "all-norm", ...
Targets = Optional[Union[Choice, dict[str, Choice]]]


@dataclass(frozen=True)
class ConfigSource:
    """The file that a config was read from, and what a later version has put into it."""

    path: Path
    later_fields: dict[str, Any]


@dataclass
class SurgicalConfig(PeftConfig):
    """Fully tune the chosen blocks of a model and leave the rest as it was.

    Source: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (arXiv 2210.11466).

    Args:
        blocks: which blocks: an index, slice or name as a string, or a list of them (see
            [`BlockMap.parse`][surgical_peft.BlockMap.parse]); `"auto"` lets
            [`get_surgical_model`][surgical_peft.get_surgical_model] choose. Saved as the final block names.
        layers: where the repeated layers are, for a model whose list of them cannot be guessed, or is guessed wrong: a
            path, a pattern or a list of these, as [`BlockMap.from_layers`][surgical_peft.BlockMap.from_layers] takes
            them. Everything that asks for the blocks of the wrapped model goes by it, and it is saved.
        target_modules: with `blocks`, tune only these modules inside them; alone, PEFT's own meaning (names that
            end so, or a regular expression for the whole name) for any type of module. `"all-linear"`, `"all-norm"`
            (normalization layers) and `"all-bias"` choose by kind; in blocks, `"attention"`, `"attention.q"`, `"mlp"`,
            `"experts"`, `"experts[3]"` and `"router"` are parts of any architecture; a dictionary chooses for each
            block, as in `{"0": "all", "11": ["mlp"], "head": "all-bias"}`, and needs no `blocks` beside it.
        exclude_modules: modules to leave out, matched as `target_modules`.
        modules_to_save: newly initialized modules, such as a new head, to train and save as well.
        criterion: for `blocks="auto"`, what scores the blocks: a name or a function; default is `probe`, which
            has the lowest regret on the shifts that criteria were developed on (benchmarks/criteria).
        num_blocks: for `blocks="auto"`, how many to take; by default, short joint trainings decide it.
        keep_base: where the base's weights of tuned modules stay. `"device"`: beside the tuned ones, as PEFT does.
            `"cpu"`: in main memory until they are asked for (adapter disabled or switched), when a copy is lent to
            the device. `"none"`: nowhere; no second copy, but then there is nothing to disable, switch, delete or
            unload to, and one adapter is all a model can have.
        lora: a `LoraConfig`, or a dictionary of its arguments: LoRA on the modules it names in the rest of the model.
            Both are one adapter: trained, saved, loaded, switched and merged together.
        frozen_eval: while training, keep in eval mode what is not tuned and behaves otherwise in training (no dropout,
            still BatchNorm statistics), as in the paper's code. PEFT's default elsewhere is train mode; statistics
            that move then belong to the adapter, too. A model wrapped by transformers' own `add_adapter` has no place
            for this: there, `train()` is for all modules, and statistics that move are the adapter's.
        selection: filled in by the library: how the blocks were chosen. A record; loading never reads it.
        tuned_modules: filled in by the library: path of each tuned module and the names of its tuned parameters, null
            for all. A record, by which `export_to_peft` knows them, and loading what belongs to the adapter besides
            its blocks.
        fingerprint: filled in by the library: digest of the base weights of what is tuned, without `new_weights` and
            `modules_to_save`. Loading on another base warns.
        frozen_fingerprint: filled in by the library: digest of all that the adapter takes from the base, that is of
            the parameters and saved buffers which are not in its file.
        new_weights: filled in by the library: which weights of the adapter the base's checkpoint does not hold, so
            that they are others in every process. They are the adapter's, whatever `blocks` says.
        head_config: filled in by the library: what the model's config says of the head, where the base's checkpoint
            does not: `id2label` and `problem_type`, and of a new head `num_labels` and `pad_token_id`. Loading names
            the model's labels by it.
        strict_base: refuse another base instead, as in `PeftModel.from_pretrained(base, folder, strict_base=True)`; it
            holds for all adapters that are loaded into this model later, too. Not saved.
        read_from: filled in by the library: the file that the config comes from. Not saved.

    Raises:
        SurgicalError: nothing selected, or two answers to one question. Names are checked against the model when
            it is wrapped.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(model, SurgicalConfig(blocks=[0, 1]))
    """

    blocks: Optional[Union[int, str, list[Union[int, str]]]] = field(
        default=None, metadata={"help": "Blocks to tune: indices, slices, names, 'all' or 'auto'."}
    )
    layers: Optional[Union[str, list[str]]] = field(
        default=None, metadata={"help": "Path of the list of layers, where it cannot be guessed."}
    )
    target_modules: Targets = field(
        default=None, metadata={"help": "Modules to tune: inside the blocks, or anywhere if no blocks are given."}
    )
    exclude_modules: Optional[Union[str, list[str]]] = field(
        default=None, metadata={"help": "Modules to leave out, matched as target_modules."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "New modules, such as a head, to train and save as well."}
    )
    criterion: Optional[Union[str, Callable[..., float]]] = field(
        default=None, metadata={"help": "For blocks='auto': what scores the blocks."}
    )
    num_blocks: Optional[int] = field(default=None, metadata={"help": "For blocks='auto': how many blocks to take."})
    keep_base: str = field(default="device", metadata={"help": "Where original weights stay: device, cpu or none."})
    lora: Optional[Union[LoraConfig, dict[str, Any]]] = field(
        default=None, metadata={"help": "LoRA for modules outside what is tuned in full."}
    )
    frozen_eval: bool = field(default=True, metadata={"help": "Keep all that is not tuned in eval mode."})
    selection: Optional[dict[str, Any]] = field(default=None, metadata={"help": "Record of how blocks were chosen."})
    tuned_modules: Optional[dict[str, Optional[list[str]]]] = field(
        default=None, metadata={"help": "Record of the modules that are tuned, by path."}
    )
    fingerprint: Optional[str] = field(default=None, metadata={"help": "Digest of the base weights of what is tuned."})
    frozen_fingerprint: Optional[str] = field(default=None, metadata={"help": "Digest of what the base brings."})
    new_weights: Optional[list[str]] = field(
        default=None, metadata={"help": "Weights of the adapter that the base's checkpoint does not hold."}
    )
    head_config: Optional[dict[str, Any]] = field(default=None, metadata={"help": "Labels of the adapter's head."})
    strict_base: bool = field(default=False, compare=False, metadata={"help": "Refuse to load on another base."})
    read_from: InitVar[Optional[ConfigSource]] = None

    def __post_init__(self, read_from: ConfigSource | None) -> None:
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise SurgicalError(f"task_type={self.task_type!r} is none of PEFT's: {reason_of(error)}") from error
        self.peft_type = SurgicalPeftType.SURGICAL
        self.read_from = read_from
        self.buffers: dict[str, str] = {}  # digests of the base's statistics when it was wrapped; not saved
        self.later_fields = {} if read_from is None else read_from.later_fields
        if self.later_fields:
            warnings.warn(  # begins as PEFT's warning of the same does
                f"Unexpected keyword arguments {list(self.later_fields)} for class {type(self).__name__}, these are "
                f"ignored. {read_from and read_from.path} is from a later version of surgical_peft or PEFT. They are "
                "kept, and saved again; upgrade if they are to have an effect.",
                stacklevel=2,
            )
        if isinstance(self.blocks, tuple | set):
            self.blocks = list(self.blocks)
        if isinstance(self.blocks, dict):
            raise SurgicalError(f"blocks={self.blocks!r}: choices for each block go into target_modules.")
        if isinstance(self.target_modules, dict):
            self.target_modules = {str(key): as_list(choice) for key, choice in self.target_modules.items()}
            self.blocks = list(self.target_modules) if self.blocks is None else self.blocks
        self.target_modules = as_list(self.target_modules)
        self.exclude_modules = as_list(self.exclude_modules)
        if isinstance(self.modules_to_save, str):  # PEFT would go through its letters
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.layers, tuple):
            self.layers = list(self.layers)
        self._check_types()
        if self.blocks is None and self.target_modules is None:
            raise SurgicalError(
                "SurgicalConfig selects nothing: give blocks=[0, 1] (indices, slices or names), blocks='auto', or "
                "target_modules=['name']. BlockMap.find(model).names lists the blocks of a model."
            )
        if self.layers is not None and self.blocks is None:
            raise SurgicalError(
                f"layers={self.layers!r} says what the blocks are, and target_modules={self.target_modules!r} alone "
                "asks for none: add blocks='all', for these modules in any block, or leave layers out."
            )
        if self.blocks == [] or self.blocks == "":
            raise SurgicalError(f"blocks={self.blocks!r} selects nothing: name at least one block, or 'all'.")
        if self.target_modules in ([], "", {}):
            raise SurgicalError(
                f"target_modules={self.target_modules!r} selects nothing: name at least one module, or leave it out "
                "to tune whole blocks."
            )
        if self.keep_base not in KEEP_BASE:
            raise SurgicalError(f"keep_base={self.keep_base!r} is none of {', '.join(KEEP_BASE)}.")
        if self.lora is not None:
            self.lora = lora_arguments(self.lora)
        auto_only = {"criterion": self.criterion, "num_blocks": self.num_blocks}
        given = [name for name, value in auto_only.items() if value is not None]
        if given and self.blocks != "auto":
            raise SurgicalError(
                f"{' and '.join(given)} only speak to blocks='auto', but blocks={self.blocks!r} already says which "
                "blocks to tune: drop one of the two."
            )
        if self.num_blocks is not None:
            check_count("SurgicalConfig", "num_blocks", self.num_blocks, "blocks to tune")

    def _check_types(self) -> None:
        """Refuse what a file made by hand, or by an attacker, may hold."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "new_weights"):
            check_names(name, getattr(self, name))
        kinds: dict[str, Any] = {
            "blocks": int | str | list | None,
            "criterion": str | Callable | None,
            "auto_mapping": dict | None,
            "base_model_name_or_path": str | None,
            "revision": str | None,
            "inference_mode": bool,
            "num_blocks": int | None,
            "lora": LoraConfig | dict | None,
            "frozen_eval": bool,
            "selection": dict | None,
            "tuned_modules": dict | None,
            "fingerprint": str | None,
            "frozen_fingerprint": str | None,
            "head_config": dict | None,
            "strict_base": bool,
        }
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise SurgicalError(f"{name}={value!r} is a {type(value).__name__}: it should be {kind}.")
        check_names("layers", list(as_paths(self.layers)))
        check_names("blocks", [str(block) for block in self.blocks] if isinstance(self.blocks, list) else None)
        _JSON.read(dict[str, list[str] | None], self.tuned_modules or {}, "tuned_modules")
        check_head_config(self.head_config)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "base_model_name_or_path":  # set by get_peft_model: a new adapter, wherever the choice comes from
            self.__dict__["read_from"] = None

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without what is not saved."""
        known = super().to_dict()
        del known["strict_base"]  # what is in the file would go before what is said when loading
        return known

    @classmethod
    def from_selection(cls, selection: Selection, **kwargs: Any) -> SurgicalConfig:
        """The config that tunes a [`Selection`][surgical_peft.Selection], with the record of how it came about.

        Parts of blocks, as `BlockMap.divided` names them, become `target_modules` by block. Blocks of layers that were
        named, as by `BlockMap.from_layers`, bring their `layers` with them.

        Raises:
            SurgicalError: parts of blocks, and `target_modules` besides; other `layers` than those of the selection.

        Example:
            >>> SurgicalConfig.from_selection(top_k(score_blocks(model, dataloader), 2))
        """
        if selection.layer_paths:
            layers = kwargs.setdefault("layers", list(selection.layer_paths))
            if as_paths(layers) != selection.layer_paths:
                raise SurgicalError(
                    f"layers={layers!r}: the selection is of the blocks of layers={list(selection.layer_paths)}. "
                    "Leave layers out, or choose among the blocks of those."
                )
        inside: dict[str, Any] = {}
        for name in selection.blocks:
            block, _, part = name.partition(PART)
            inside[block] = [*inside.get(block, []), part] if part else "all"
        if all(choice == "all" for choice in inside.values()):
            return cls(blocks=list(selection.blocks), selection=selection.record, **kwargs)
        if kwargs.get("target_modules") is not None:
            raise SurgicalError(
                f"target_modules={kwargs['target_modules']!r} cannot be combined with parts of blocks "
                f"({', '.join(selection.blocks)}): leave one of them out."
            )
        return cls(**{**kwargs, "target_modules": inside}, selection=selection.record)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> SurgicalConfig:
        """As PEFT's; a `keep_base` given here goes before the saved one, which says how the adapter was trained.

        Example:
            >>> PeftModel.from_pretrained(base, "adapter", keep_base="cpu")
        """
        config = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "keep_base" in kwargs:
            config = replace(config, keep_base=kwargs["keep_base"], read_from=config.read_from)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, with what a later version has put into the file."""
        super().save_pretrained(save_directory, **kwargs)
        if self.later_fields:
            path = Path(save_directory) / CONFIG_NAME
            saved = {**json.loads(path.read_text(encoding="utf-8")), **self.later_fields}
            write_text(path, json.dumps(saved, indent=2, sort_keys=True))
