"""Images without labels: what a recipe may say with `unlabelled`, and examples of augmented copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...errors import SurgicalError
from ...policies.policy import Policy
from ..recipe.recipe import ONLINE, Recipe
from .evaluation import Batch
from .marginal_entropy import UNLABELED
from .summary import DataSummary
from .task import Examples

COPIES = "copies"  # the key of a batch of a stream with the augmented copies
_NO_LABELS = {  # keys that do not fit, and why
    "problem_type": "the entropy is that of one class out of several",
    "class_weights": "they weigh labels in a loss that has none",
    "new_head": "the entropy makes a head surer of what it predicts, and a new one knows nothing",
    "imbalance": "it leaves training images out by their labels; take them out of the data",
    "folds": "they measure on training images, which have no labels",
}
_OF_EPOCHS = (  # training arguments that a stream does not follow
    *("num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("gradient_accumulation_steps", "max_grad_norm", "eval_strategy", "save_strategy", "train_sampling_strategy"),
    *("bf16", "fp16", "torch_compile", "neftune_noise_alpha"),
)


def check_unlabelled(recipe: Recipe) -> None:
    """Refuse what does not go with images without labels; without `unlabelled` all does.

    Raises:
        SurgicalError: a value that it cannot have, fewer than two copies, or a key that needs labels.
    """
    if recipe.unlabelled is False:
        return
    if recipe.unlabelled not in (True, ONLINE):
        raise SurgicalError(f"unlabelled={recipe.unlabelled!r} is unknown: true, false or {ONLINE}.")
    if recipe.copies < 2:
        raise SurgicalError(f"copies={recipe.copies} are too few: predictions for 2 or more copies have a mean.")
    for key, reason in _NO_LABELS.items():
        value = getattr(recipe, key)
        if value and (key, value) != ("problem_type", "single_label_classification"):
            raise SurgicalError(f"{key}={value!r} does not go with unlabelled: {reason}.")
    if recipe.training.get("label_smoothing_factor"):
        raise SurgicalError("label_smoothing_factor does not go with unlabelled: there are no labels to smooth.")
    if recipe.prefix_cache:
        raise SurgicalError("prefix_cache does not go with unlabelled: no two copies of an image are the same.")
    if recipe.is_online and recipe.early_stopping_patience is not None:
        raise SurgicalError("early_stopping_patience does not go with unlabelled: online: a stream has no epochs.")
    if recipe.is_online and recipe.test_metrics:
        raise SurgicalError(
            f"test_metrics={recipe.test_metrics} do not go with unlabelled: online: predictions along a stream are "
            "made once, and measured by the metric. Leave them out."
        )
    for key in _OF_EPOCHS if recipe.is_online else ():
        if key in recipe.training:
            raise SurgicalError(
                f"{key}={recipe.training[key]!r} does not go with unlabelled: online: a stream is gone through once, "
                "at one rate, a step for each batch of per_device_train_batch_size images (default 1). Leave it out."
            )
    check_policy(recipe, recipe.make_policy())


def check_policy(recipe: Recipe, policy: Policy | None) -> None:
    """Refuse a policy that does not go with images without labels.

    Raises:
        SurgicalError: one with a loss on labels, or on a stream one that counts epochs.
    """
    if not recipe.unlabelled or policy is None:
        return
    if policy.own_loss:
        raise SurgicalError(f"{policy} has a loss on labels, and with unlabelled there are none: take another policy.")
    if recipe.is_online and (policy.by_epoch or policy.probe_batches):
        raise SurgicalError(
            f"{policy} goes by the epochs of a training, and a stream is gone through once: take one that counts "
            "steps, or unlabelled: true."
        )


def summary_of(recipe: Recipe) -> DataSummary:
    """Lines on what labels are used for, if `unlabelled` is given."""
    if not recipe.unlabelled:
        return DataSummary()
    what = "the rate, where several are tried" if recipe.early_stopping_patience is None else "the best epoch"
    chosen = f"labels of validation measure, and by them is chosen {what}"
    if recipe.is_online:
        how = f"one step on {recipe.copies} augmented copies of each image before it is predicted"
        return DataSummary((f"unlabeled stream: {how}; no label is trained on. Metrics are along the stream", chosen))
    how = f"the entropy of the mean prediction over {recipe.copies} augmented copies of each image"
    return DataSummary((f"unlabeled: the labels of train are not used; the loss is {how}", chosen))


@dataclass(frozen=True)
class Copies(Dataset[dict[str, Tensor]]):
    """Augmented copies of each image, in place of the image: (copies, channels, height, width).

    The same index gives the same copies every time, as for all examples: so scores of blocks and methods are compared
    on the same loss, a resumed training is the one that was interrupted, and processes share what is made. Who wants
    more variety than that asks for more copies.

    Attributes:
        images: as the model takes them.
        make: the copies of the image at an index.
    """

    images: Examples
    make: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.make(index), "labels": torch.tensor(UNLABELED)}


@dataclass(frozen=True)
class Stream(Dataset[dict[str, Tensor]]):
    """Labeled images, each with its augmented copies under `COPIES`.

    Attributes:
        images: as the model takes them.
        make: the copies of the image at an index.
    """

    images: Examples
    make: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.images[index], COPIES: self.make(index)}


def images_of(examples: Examples) -> Examples:
    """The images of a stream or of copies, without making copies of them; other examples as they are."""
    return examples.images if isinstance(examples, Stream | Copies) else examples


@dataclass(frozen=True)
class ReadImages:
    """Predictions and references of a batch of a stream, which a model does without the copies.

    Attributes:
        read: those of a batch of images.
    """

    read: Callable[[nn.Module, Batch], tuple[list[Any], list[Any]]]

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[list[Any], list[Any]]:
        """What `read` gives."""
        return self.read(model, {key: value for key, value in batch.items() if key != COPIES})
