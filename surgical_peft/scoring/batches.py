"""Moves batches to the device, splits them into examples, and computes their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks.unwrap import unwrap_model
from ..errors import SurgicalError, first_of

LossFunction = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # the label that losses leave out
SLACK = 0.25  # of the largest loss: how far dropout, or a loss on the load of experts, may move it


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes itself.

    Raises:
        SurgicalError: a batch that is no mapping, or that gives no loss, or with labels that the model does not know.
            All other errors of the model pass through.
    """
    if not isinstance(batch, Mapping):
        raise SurgicalError(
            f"a batch is a {type(batch).__name__}, not a mapping of the model's arguments: give a collate_fn that "
            "returns a dict, or loss_fn=(model, batch) -> loss."
        )
    unlabeled = (
        f"the model returned no loss for a batch with the keys {', '.join(batch)}: add 'labels' to the batch, or "
        "give loss_fn=(model, batch) -> loss."
    )
    try:
        outputs = model(**batch)
    except ValueError as error:
        if _lacks_labels(batch, model, error):
            raise SurgicalError(unlabeled) from error
        raise
    except (IndexError, torch.AcceleratorError) as error:  # on a GPU, a label out of range fails an assertion
        wrong = _out_of_range(batch, model)
        if wrong is None:
            raise
        raise SurgicalError(wrong) from error
    # As Trainer does: transformers' outputs are mappings, those of other models may be plain dictionaries
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise SurgicalError(unlabeled)
    return loss


def _lacks_labels(batch: Mapping[str, Any], model: nn.Module, error: ValueError) -> bool:
    """True if the model fails for lack of decoder inputs, which it makes from labels."""
    bare = unwrap_model(model)
    if "labels" in batch or any(key.startswith("decoder_") for key in batch) or not isinstance(bare, PreTrainedModel):
        return False
    decodes = bare.config.is_encoder_decoder or bare.config.get_text_config(decoder=True).is_encoder_decoder
    return decodes and "inputs_embeds" in str(error)


def _out_of_range(batch: Mapping[str, Any], model: nn.Module) -> str | None:
    """The message about labels that the model has no output for; None if there are none. Losses ignore -100."""
    labels, bare = batch.get("labels"), unwrap_model(model)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not isinstance(bare, PreTrainedModel):
        return None
    words = bare.get_output_embeddings() is not None
    config: Any = bare.config
    known = config.get_text_config(decoder=True).vocab_size if words else config.num_labels
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= known))].unique()
    inputs, table = batch.get("input_ids"), "input_ids" in batch and bare.get_input_embeddings()
    if isinstance(inputs, Tensor) and isinstance(table, nn.Embedding) and int(inputs.max()) >= table.num_embeddings:
        return None  # the inputs are at fault
    if not len(wrong):
        return None
    shown = first_of(wrong.tolist())
    cure = "Take the tokenizer of this model" if words else "Load it with num_labels=..., or map the labels"
    return f"labels out of range: {shown}; {type(bare).__name__} has {known} classes, 0 to {known - 1}. {cure}."


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


def all_ignored(batch: Any) -> bool:
    """Whether losses ignore every label of a batch."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.numel() > 0 and bool((labels == IGNORED).all())


def check_labeled(batches: Iterable[tuple[int, Any]]) -> None:
    """Make sure that each batch, given with its place, has a label that losses do not ignore.

    Raises:
        SurgicalError: one has none.
    """
    nothing = [place for place, batch in batches if all_ignored(batch)]
    if nothing:
        raise SurgicalError(
            f"all labels of batch {nothing[0]} are {IGNORED}, which losses ignore: there is nothing to learn from it. "
            "Look at how labels are made, e.g. whether truncation cuts the answers off, or give larger batches."
        )


@torch.no_grad()
def check_separable(model: nn.Module, batch: Any, loss_of: LossFunction) -> None:
    """Make sure that a batch's loss is a mean, or a sum, of the losses of its examples.

    Raises:
        SurgicalError: it is not, as that of a contrastive loss: for one example it is 0, or NaN.
    """
    examples = list(examples_of(batch))
    if len(examples) < 2:
        return
    together, pairs = float(loss_of(model, batch)), [(float(loss_of(model, each)), each) for each in examples]
    alone = [loss for loss, each in pairs if math.isfinite(loss) or not all_ignored(each)]
    if not alone or not math.isfinite(together):
        return
    slack = SLACK * max(map(abs, (together, *alone)))
    if not (min(alone) - slack <= together <= max(alone) + slack or abs(together - sum(alone)) <= slack):
        raise SurgicalError(
            f"the loss of the first batch is {together:.4g}, that of its examples alone {min(alone):.4g} to "
            f"{max(alone):.4g}: it exists only over a batch, as a contrastive loss does, and the gradients of single "
            "examples say nothing. Score with a criterion on the gradients of batches, such as 'adam_gain' or 'bvr'."
        )
