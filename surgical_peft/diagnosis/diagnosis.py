"""`Diagnosis`: the state of every tensor in a training, and the faults found; prints as a table, goes through JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..atomic_files import finite
from ..blocks.block_map import blocks_in_words
from ..errors import first_of
from ..rendering import TextTable

FAULTS = {  # what is wrong, and what to do
    "unused": ("trainable, but the forward pass does not use it", "freeze it, or give a batch that needs it"),
    "no_gradient": (
        "trainable and used, but no gradient reaches it",
        "freeze what the loss does not depend on; look for detach(), no_grad() and use_reentrant=True",
    ),
    "zero_gradient": (
        "of a block whose gradients are all zero",
        "look at the batch's labels, and for a factor of zero behind the block",
    ),
    "bad_gradient": ("its gradient is NaN or infinite", "look at the batch, lower the rate, train in float32"),
    "not_in_optimizer": ("trainable, but not in the optimizer", "make the optimizer after choosing what is trained"),
    "frozen_in_optimizer": ("in the optimizer, but frozen", "make the optimizer after choosing what is trained"),
    "not_of_model": (
        "in the optimizer, but not in the model",
        "make the optimizer after resizing, replacing or wrapping, and after switching adapters",
    ),
    "twice": ("twice in the optimizer, which steps on it twice", "give each parameter once"),
    "decayed": ("a norm or bias with weight decay", "put these into a group with weight_decay=0, as Trainer does"),
    "no_master": (
        "16-bit in the optimizer without a float32 master, so that small steps vanish in rounding",
        "use create_surgical_optimizer or surgical_optimizer(args), or load in float32",
    ),
    "not_moved": ("has a gradient, but the step did not change it", "look at the learning rate and the precision"),
    "moved_frozen": ("frozen, but the step changed it", "put frozen modules into eval mode, empty stale gradients"),
    "untied": ("tied by the config, but two tensors in the model", "call model.tie_weights() before wrapping"),
    "unknown_name": (
        "trainable, but an inference engine would get it under no name of the base model, or not at all",
        "remove parametrizations and wrappers before weights are sent, or call the adapter 'default'",
    ),
}


@dataclass(frozen=True)
class TensorReport:
    """One tensor in one training step.

    Attributes:
        name: in the bare model; of what the model does not have, its place in the optimizer.
        block: of the model's block map; empty where there is none.
        parameters: how many numbers.
        trainable: whether it has `requires_grad`.
        in_optimizer: whether a group of the optimizer holds it.
        used: whether the forward pass used it.
        gradient: `"none"`, `"zero"`, `"finite"` or `"bad"`.
        weight_decay: of its group; 0 without one.
        dtype: of torch, e.g. `"bfloat16"`.
        master: whether the optimizer keeps a float32 master of it.
        moved: whether the step changed it.
        tied: its other names.
        engine: how an inference engine gets it, as TRL sends weights: `"own"` name, `"merged"` or `"not"`.
        faults: keys of `FAULTS`.
    """

    name: str
    block: str
    parameters: int
    trainable: bool
    in_optimizer: bool
    used: bool
    gradient: str
    weight_decay: float
    dtype: str
    master: bool
    moved: bool
    tied: tuple[str, ...]
    engine: str
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found in one training step.

    Attributes:
        tensors: all of the model, in its order, then what only the optimizer has.
        loss: of the step.
        optimizer: its class.

    Example:
        >>> diagnosis.is_healthy, list(diagnosis.faults)
        (False, ['not_in_optimizer'])
        >>> print(diagnosis)
    """

    tensors: tuple[TensorReport, ...]
    loss: float
    optimizer: str

    @property
    def faults(self) -> dict[str, list[str]]:
        """For each fault found the names of the tensors that have it."""
        named = {fault: [tensor.name for tensor in self.tensors if fault in tensor.faults] for fault in FAULTS}
        return {fault: names for fault, names in named.items() if names}

    @property
    def is_healthy(self) -> bool:
        """True if no fault was found."""
        return not self.faults

    def table(self) -> TextTable:
        """A row for all tensors that fare alike."""
        alike: dict[tuple[tuple[str, ...], bool], list[TensorReport]] = {}
        for tensor in self.tensors:
            alike.setdefault((_cells(tensor), bool(tensor.faults)), []).append(tensor)
        rows = []
        for (cells, is_faulty), tensors in alike.items():
            blocks = blocks_in_words(dict.fromkeys(tensor.block for tensor in tensors if tensor.block))
            rows.append([f"{'! ' * is_faulty}{blocks or 'no block'}", f"{len(tensors):,}", *cells])
        header = ["of", "tensors", "trained", "optimizer", "gradient", "decay", "dtype", "moved", "tied", "engine"]
        notes = ["! with a fault. * with a float32 master. Engine: under which name an inference engine gets it."]
        faulty = [number for number, row in enumerate(rows) if row[0].startswith("!")]
        return TextTable(f"One step of {self.optimizer}, loss {self.loss:.4g}", header, rows, notes, bold=faulty)

    def lines(self) -> Iterator[str]:
        """A line for each fault: what is wrong, with which tensors, and what to do."""
        for fault, names in self.faults.items():
            what, remedy = FAULTS[fault]
            tensors = f"{len(names):,} tensor{'s' * (len(names) > 1)}"
            yield f"{fault}: {what} ({tensors}: {first_of(names, most=3)}): {remedy}."
        if self.is_healthy:
            yield "No faults."

    def __str__(self) -> str:
        return "\n".join([str(self.table()), "", *self.lines()])

    def to_json(self) -> str:
        """All of it as JSON; a loss that is not finite is null."""
        values = {"loss": finite(self.loss), "optimizer": self.optimizer, "faults": self.faults}
        return json.dumps({**values, "tensors": [asdict(tensor) for tensor in self.tensors]}, indent=2)


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    def yes(value: bool) -> str:
        return "yes" if value else "-"

    return (
        yes(tensor.trainable),
        yes(tensor.in_optimizer),
        tensor.gradient if tensor.used else "unused",
        f"{tensor.weight_decay:g}",
        tensor.dtype + "*" * tensor.master,
        yes(tensor.moved),
        yes(bool(tensor.tied)),
        tensor.engine,
    )
