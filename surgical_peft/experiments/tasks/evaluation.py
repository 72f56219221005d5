"""A metric of a model on examples, and its mean loss on them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from ...blocks.unwrap import unwrap_model
from ...errors import SurgicalError
from ...scoring.batches import IGNORED, model_loss
from ..metrics import SHIPPED, load_metric
from .task import Examples

BATCH_SIZE = 250
Batch = dict[str, Tensor]
UNWEIGHTED = ContextVar("UNWEIGHTED", default=False)  # set while losses are to leave class weights out


@dataclass(frozen=True)
class Measure:
    """A metric of a model on examples, in eval mode and on the model's device; the model keeps its mode.

    Attributes:
        compute: the metric of predictions and references.
        read: predictions and references of a batch, as lists.
        collate: makes a batch of examples.
        batch_size: of the batches; a metric does not depend on it, but the rounding of a model does.
        tokens: of an answer, at most, where `read` has the model write; None where it does not.
    """

    compute: Callable[[list[Any], list[Any]], float]
    read: Callable[[nn.Module, Batch], tuple[list[Any], list[Any]]]
    collate: Callable[[list[dict[str, Any]]], Batch] = default_data_collator
    batch_size: int = BATCH_SIZE
    tokens: int | None = None

    @torch.inference_mode()
    def __call__(self, model: nn.Module, examples: Examples) -> float:
        """The metric of `model` on `examples`."""
        device = next(model.parameters()).device
        training = model.training
        predictions: list[Any] = []
        references: list[Any] = []
        model.eval()
        try:
            draws = torch.Generator()  # a loader draws from one: not from that of a training which this may interrupt
            loader: DataLoader[Any] = DataLoader(examples, self.batch_size, collate_fn=self.collate, generator=draws)  # type: ignore[arg-type]
            for batch in loader:
                predicted, wanted = self.read(model, {name: value.to(device) for name, value in batch.items()})
                predictions += predicted
                references += wanted
        finally:
            model.train(training)
        if not references:
            raise SurgicalError("there is nothing to measure: no example, or no token to predict.")
        return self.compute(predictions, references)


@torch.inference_mode()
def mean_loss(
    model: nn.Module, examples: Examples, collate: Callable[[list[dict[str, Any]]], Batch], batch_size: int
) -> float:
    """The mean of a model's own loss, without class weights; the model keeps its mode, and is measured in eval mode.

    Each example counts once or, where it has several tokens with a label, each of these.

    Raises:
        SurgicalError: no example has a label, or the model gives no loss.
    """
    device, training = next(model.parameters()).device, model.training
    token = UNWEIGHTED.set(True)
    total, count = 0.0, 0
    model.eval()
    try:
        draws = torch.Generator()  # a loader draws from one: not from that of a training which this may interrupt
        loader: DataLoader[Any] = DataLoader(examples, batch_size, collate_fn=collate, generator=draws)  # type: ignore[arg-type]
        for batch in loader:
            size = _labels_in(model, batch)
            if size:
                total += size * float(model_loss(model, {name: value.to(device) for name, value in batch.items()}))
                count += size
    finally:
        UNWEIGHTED.reset(token)
        model.train(training)
    if not count:
        raise SurgicalError("there is no loss to measure: no example, or no token to predict.")
    return total / count


def _labels_in(model: nn.Module, batch: Batch) -> int:
    """Of how many labels the loss of a batch is the mean."""
    labels, bare = batch.get("labels"), unwrap_model(model)
    if labels is None or labels.ndim < 2 or labels.is_floating_point():
        return len(next(iter(batch.values())))
    if isinstance(bare, PreTrainedModel) and bare.can_generate() and not bare.config.is_encoder_decoder:
        labels = labels[:, 1:]  # nothing comes before the first token
    return int((labels != IGNORED).sum())


def classification(metric: str = "accuracy", **kwargs: Any) -> Measure:
    """A metric of the class with the largest logit; `kwargs` are those of `Measure`."""
    check_metric(metric, "accuracy", "macro_f1", "matthews_correlation")
    return Measure(load_metric(metric), read_class, **kwargs)


def check_metric(metric: str, *fitting: str) -> None:
    """Refuse a metric that ships and is for other tasks.

    Raises:
        SurgicalError: it is.
    """
    if metric in SHIPPED and metric not in fitting:
        raise SurgicalError(f"metric {metric!r} is not for this task, which has: {', '.join(fitting)}.")


def read_class(model: nn.Module, batch: Batch) -> tuple[list[int], list[int]]:
    """The class with the largest logit, and the right one, of each example."""
    labels = batch.pop("labels")
    return model(**batch).logits.argmax(-1).tolist(), labels.tolist()


def read_tokens(metric: str, ahead: int, model: nn.Module, batch: Batch) -> tuple[list[int] | list[float], list[int]]:
    """Of each right token: the likeliest one in its place, or with `log_likelihood` its own log-likelihood.

    Args:
        metric: what they are for.
        ahead: 1 if a position predicts the token after it, 0 if the one in its place.
        model: a language model.
        batch: with labels.
    """
    labels = batch["labels"]  # left in the batch: a decoder is fed with them
    logits = model(**batch).logits
    if ahead:
        logits, labels = logits[:, :-ahead], labels[:, ahead:]
    told = labels != IGNORED
    logits, labels = logits[told], labels[told]
    if metric == "log_likelihood":
        return (-nn.functional.cross_entropy(logits.float(), labels, reduction="none")).tolist(), labels.tolist()
    return logits.argmax(-1).tolist(), labels.tolist()
