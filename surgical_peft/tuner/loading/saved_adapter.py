"""Reads an adapter's folder, and loads the base model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.constants import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ...blocks.module_lists import within
from ...errors import SurgicalError
from ...typed_json import read_json
from ..config import SurgicalConfig, SurgicalPeftType
from ..tensors.row_names import with_rows

PREFIX = "base_model.model."  # what PEFT puts before each name of the base model
Base = str | Path | nn.Module | None  # a folder or Hub id, the model itself, or None for what the adapter names

_CLASS_FOR_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it is saved: its folder, its config, and its weights by their names in the base model."""

    folder: Path
    config: SurgicalConfig
    tensors: dict[str, Tensor]

    @property
    def own(self) -> dict[str, Tensor]:
        """The base model's own weights: without LoRA's beside them."""
        return {name: tensor for name, tensor in self.tensors.items() if ".lora_" not in name}

    def new_to(self, base: LoadedBase) -> frozenset[str]:
        """Names of the weights that have no certain value in the base model: LoRA's, and those of new heads."""
        record = self.config.tuned_modules or {}
        known = {*record, *(f"{path}.{name}".lstrip(".") for path, names in record.items() for name in names or ())}
        new = base.undetermined.union(self.config.new_weights or ())
        return new | {name for name in self.tensors if not within(name, known)}


@dataclass(frozen=True)
class LoadedBase:
    """A base model, and the names of its weights that its checkpoint does not hold."""

    model: nn.Module
    undetermined: frozenset[str]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read the adapter that `save_pretrained` wrote to `folder`; nothing is built and no base model is needed.

    Raises:
        SurgicalError: no adapter there, one of another method, pickled, corrupt, or without the record of its modules.
    """
    folder = Path(folder)
    values = read_config(folder / CONFIG_NAME, "adapter")
    kind = values.get("peft_type")
    if kind != SurgicalPeftType.SURGICAL.value:
        raise SurgicalError(f"{str(folder)!r} is an adapter of the method {kind!r}; export takes those of SURGICAL.")
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / WEIGHTS_NAME).exists()
        reason = f"only pickled weights ({WEIGHTS_NAME}), which may run code" if pickled else "no weights"
        raise SurgicalError(
            f"{str(folder)!r} holds {reason}; {path.name} is missing. Save the adapter again: "
            "model.save_pretrained(folder)."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SurgicalError(f"{str(path)!r} is corrupt or incomplete ({error}): copy or save it again.") from error
    config = SurgicalConfig.from_pretrained(str(folder))
    strange = [key for key in tensors if not key.startswith(PREFIX)]
    record = config.tuned_modules or {}
    names = [*record, *(name for part in record.values() if part is not None for name in part)]
    if strange or not names or not all(isinstance(name, str) for name in names):
        fault = f"the key {strange[0]!r} without {PREFIX!r}" if strange else "no record of the tuned modules"
        raise SurgicalError(
            f"{str(folder)!r} has {fault}: load it with PeftModel.from_pretrained(base, folder) and save it again."
        )
    return SavedAdapter(folder, config, {key.removeprefix(PREFIX): value for key, value in tensors.items()})


def read_config(path: Path, kind: str) -> dict[str, Any]:
    """The dictionary in a JSON file of an adapter or a delta.

    Raises:
        SurgicalError: it is not there, or not readable.
    """
    if not path.is_file():
        inside = sorted(file.parent.name for file in path.parent.glob(f"*/{path.name}"))
        hint = f" Its folders {', '.join(inside)} do: give one of them." if inside else ""
        raise SurgicalError(f"{str(path.parent)!r} is no {kind}'s folder: it has no {path.name}.{hint}")
    return read_json(path, "copy or save it again")


def load_base(config: SurgicalConfig, tensors: Mapping[str, Tensor], base: Base = None) -> LoadedBase:
    """The base model, in the precision of the tuned `tensors`, and with a head for as many labels.

    Args:
        tensors: of the adapter, by their names in the base model; on the meta device if they are not at hand.

    Raises:
        SurgicalError: nothing says which model it is, or it cannot be loaded.
    """
    if isinstance(base, nn.Module):
        return LoadedBase(base, frozenset())
    name = _name_of_base(config, base)
    load = partial(_found, _class_of(config, name).from_pretrained, name)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    loading = {
        "dtype": dtypes.pop() if len(dtypes) == 1 else "auto",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    head = {key: value for key, value in (config.head_config or {}).items() if key == "num_labels"}
    model, info = load(**loading, **head)
    if not head and (count := _labels_of_new_head(model, tensors)):  # of a version that did not note it
        model, info = load(**loading, num_labels=count)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return LoadedBase(model.eval(), frozenset(info["missing_keys"]) | mismatched)


def _labels_of_new_head(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> int | None:
    """The number of labels, if all `tensors` of another shape than in the model differ in this alone."""
    state, labels = model.state_dict(), model.config.num_labels
    other = [
        (t.shape, state[name].shape) for name, t in tensors.items() if name in state and t.shape != state[name].shape
    ]
    counts = {there[:1] for there, here in other if here[:1] == (labels,) and here[1:] == there[1:]}
    alike = len(counts) == 1 and all(there[:1] in counts and here[:1] == (labels,) for there, here in other)
    return int(counts.pop()[0]) if alike else None


def skeleton_of_base(config: SurgicalConfig, base: Base = None) -> nn.Module | None:
    """The base model without its weights (on the meta device), for its names; None where nothing is known of it.

    Raises:
        SurgicalError: `base` is given and cannot be loaded.
    """
    if isinstance(base, nn.Module):
        return base
    try:
        name = _name_of_base(config, base)
        model_class = _class_of(config, name)
        values = _found(AutoConfig.from_pretrained, name)
    except SurgicalError:
        if base is not None:
            raise
        return None
    with torch.device("meta"):
        return model_class.from_config(values) if hasattr(model_class, "from_config") else model_class(values)


def check_fits(adapter: SavedAdapter, state: dict[str, Tensor], new: frozenset[str] = frozenset()) -> None:
    """Make sure that every weight of the adapter is one of the base model, of the same kind and (if not new) shape.

    Raises:
        SurgicalError: it is not; the base model is another one.
    """
    state = with_rows(state, adapter.own)
    for name, tuned in adapter.own.items():
        if name not in state:
            raise SurgicalError(
                f"the adapter tunes {name!r}, and the base model has no weight of that name: give the model that the "
                f"adapter was made from ({adapter.config.base_model_name_or_path!r})."
            )
        both_float = tuned.is_floating_point() and state[name].is_floating_point()
        same = tuned.shape == state[name].shape and (both_float or tuned.dtype == state[name].dtype)
        if not same and name not in new:
            raise SurgicalError(
                f"{name!r} is {_kind(tuned)} in the adapter and {_kind(state[name])} in the base model: give the one "
                f"that the adapter was made from ({adapter.config.base_model_name_or_path!r}); with a new head of "
                "another size, a folder to which it was saved with that head; if quantized, the unquantized one."
            )


def heads_of(config: SurgicalConfig, modules: Iterable[str]) -> list[str]:
    """The `modules` that PEFT saves as `modules_to_save`: those whose path ends with one of the names."""
    return [path for path in modules if any(path.endswith(name) for name in config.modules_to_save or [])]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _name_of_base(config: SurgicalConfig, base: str | Path | None) -> str:
    name = base or config.base_model_name_or_path
    if not name:
        raise SurgicalError(
            "the adapter does not say which base model it was made from: give it, as --base FOLDER on the command "
            "line or base_model=model in Python."
        )
    return str(name)


def _class_of(config: SurgicalConfig, name: str) -> Any:
    """The class with which the base model was loaded: as PEFT recorded it, else by the task, else by the model."""
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    class_name = _CLASS_FOR_TASK.get(str(config.task_type)) or mapping.get("base_model_class")
    if class_name is None:
        class_name = next(iter(_found(AutoConfig.from_pretrained, name).architectures or []), "AutoModel")
    model_class = getattr(transformers, str(class_name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel | _BaseAutoModelClass)):
        raise SurgicalError(
            f"the base model is a {class_name}, which is no model class of transformers: load it yourself and export "
            "in Python, with base_model=model."
        )
    return model_class


def _found(load: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    """`load(name)` without code of the model's own; one kind of error for all that transformers may miss."""
    try:
        return load(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SurgicalError(
            f"the base model {name!r} cannot be loaded ({reason}): give it, as --base FOLDER on the command line or "
            "base_model=model in Python."
        ) from error
