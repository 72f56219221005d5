"""Batches: to the model's device, into single examples, and into a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import SurgicalError
from .wrappers import bare

LossFunction = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes itself.

    Raises:
        SurgicalError: a batch that is no mapping, or that gives no loss.
    """
    if not isinstance(batch, Mapping):
        raise SurgicalError(
            f"a batch is a {type(batch).__name__}, not a mapping of the model's arguments: give a collate_fn that "
            "returns a dict, or loss_fn=(model, batch) -> loss."
        )
    unlabelled = (
        f"the model returned no loss for a batch with the keys {', '.join(batch)}: add 'labels' to the batch, or "
        "give loss_fn=(model, batch) -> loss."
    )
    try:
        loss = getattr(model(**batch), "loss", None)
    except ValueError as error:  # a sequence-to-sequence model cannot even run without labels
        if "labels" in batch:
            raise
        raise SurgicalError(unlabelled) from error
    except (IndexError, RuntimeError) as error:
        wrong = _out_of_range(batch.get("labels"), model)
        if wrong is None:
            raise
        raise SurgicalError(wrong) from error
    if loss is None:
        raise SurgicalError(unlabelled)
    return loss


def _out_of_range(labels: Any, model: nn.Module) -> str | None:
    """What to say of labels that the model has no output for; None if there are none. -100 is what losses ignore."""
    config: Any = getattr(bare(model), "config", None)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or config is None:
        return None
    tokens = labels.ndim > 1 and getattr(config, "vocab_size", None) is not None
    classes = {getattr(config, "num_labels", None)} | ({config.vocab_size} if tokens else set())
    known = max((number for number in classes if number), default=None)
    if known is None:
        return None
    wrong = sorted({int(label) for label in labels.unique() if label != -100 and not 0 <= label < known})
    if not wrong:
        return None
    shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return (
        f"labels out of range: {shown}; {type(bare(model)).__name__} has {known} classes, 0 to {known - 1}. Load it "
        "with num_labels=..., or map the labels."
    )


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch where the weights are; as it is if accelerate's hooks will place it, or if it is no mapping."""
    device = next(model.parameters()).device
    if device.type == "meta" or not isinstance(batch, Mapping):
        return batch
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def examples_of(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one."""
    columns = (
        list(batch.values() if isinstance(batch, Mapping) else batch) if isinstance(batch, Mapping | Sequence) else []
    )
    lengths = [len(column) for column in columns if isinstance(column, Tensor) and column.ndim]
    if not lengths or not lengths[0]:
        raise SurgicalError(
            f"a batch is a {type(batch).__name__} {'of no examples' if lengths else 'without a tensor of rows'}: a "
            "criterion on single examples needs batches whose tensors have one row an example."
        )

    def row(column: Any, at: int) -> Any:
        is_rows = isinstance(column, Tensor | list | tuple) and not (isinstance(column, Tensor) and not column.ndim)
        return column[at : at + 1] if is_rows and len(column) == lengths[0] else column

    for at in range(lengths[0]):
        if isinstance(batch, Mapping):
            yield {key: row(column, at) for key, column in batch.items()}
        else:
            yield type(batch)(row(column, at) for column in batch)
