"""Similarity of what goes into a layer and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_map import kind_of
from ..blocks.unwrap import unwrap_model
from ..errors import SurgicalError
from .budget import FORWARD
from .criterion import not_finite, of_model, reshard
from .depth import of_layers
from .short_training.context import ScoringContext

FEWEST = 3  # examples: two lie on a line, and any two lines are alike
CONSTANT = 1e-10  # share of a representation's squares: what varies less is the same for all examples but for rounding
CLASS_TOKENS = ("cls_token", "class_embedding")


@of_model(batches=8)
def cka(context: ScoringContext) -> dict[str, float]:
    """`1 - CKA` of a layer's input `X` and output `Y`: how much it changes the representation of the examples.

    Linear CKA, `||X^T Y||^2 / (||X^T X|| ||Y^T Y||)` in Frobenius norms, a row an example, columns centered. The row
    is the first token ([CLS]) of texts and of images whose model has a class token; the last real token, by the
    attention mask, where attention is causal; the mean over all positions of other images and of sound, feature maps
    included (channels first). What has no positions is taken as it is.

    A layer to which all examples look alike has no score: the first one where [CLS] comes out of the embeddings the
    same for every text or image. Embeddings, final norms and heads have none, since they are no layers; a module or
    tensor has that of its layer. Layers that the model does not call as a module of tensors cannot be scored.

    Range: 0 to 1, no unit. Cost: a forward pass a batch, no gradients. Memory: two vectors for each layer and example,
    in float32 on the CPU, all examples at once (128 examples of 32 layers of 4096: 134 MB).

    Raises:
        SurgicalError: fewer than 3 examples; a loss or a representation that is NaN or infinite; no layer is called.

    Source: arXiv 2602.05988 and its code, which tunes the layers with the lowest CKA: `select_layers_encoder.py` by
    the first token, `select_layers_decoder.py` and `select_layers_llava.py` by the last, of 128 examples.
    Known disagreement: where [CLS] enters the first layer, the CKA there is that of rounding, and the code passes over
    the encoder layer with the lowest CKA, whichever that is; the last layer's output is taken behind the final norm
    there, before it here. Images and sound without text are ours.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="cka")
    """
    context.keep(context.budget.affordable(len(context.batches), FORWARD, "a forward pass of one batch"))
    count = len(context.batches)
    context.budget.stage(f"forward passes of {count} batch{'es' * (count > 1)}", FORWARD * count)
    layers = _block_of_layers(context)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {block: [] for block in layers.values()}
    for at in range(count):
        for block, rows in _forward(context, at, layers).items():
            if not all(bool(part.isfinite().all()) for part in rows):
                raise not_finite(f"representation in {block!r}", "batch", at)
            seen[block].append(rows)
    reshard(context.model)
    pairs = {block: [torch.cat(parts) for parts in zip(*rows, strict=True)] for block, rows in seen.items() if rows}
    if not pairs:
        raise SurgicalError(
            f"cka compares what goes into a layer with what comes out, and {type(context.model).__name__} calls none "
            "of its layers as a module that takes and returns tensors: take another criterion."
        )
    if (most := max(len(before) for before, _ in pairs.values())) < FEWEST:
        raise SurgicalError(
            f"cka compares examples with one another, and there are {most}: give a larger num_batches, or batches of "
            f"more examples; it takes {FEWEST} at least."
        )
    values = {block: linear_cka(before, after) for block, (before, after) in pairs.items()}
    return of_layers(context, {block: 1 - value for block, value in values.items() if value is not None})


def linear_cka(before: Tensor, after: Tensor) -> float | None:
    """Linear CKA of two representations, examples by features; None where one of them is the same for all examples.

    Computed in float64 from the inner products of the examples, which gives the same number as those of the features.
    """
    if len(before) != len(after):
        return None
    grams = []
    for rows in (before.double(), after.double()):
        centered = rows - rows.mean(0)
        if centered.square().sum() <= CONSTANT * rows.square().sum():
            return None
        grams.append(centered @ centered.T)
    one, other = grams
    return min(1.0, ((one * other).sum() / (one.norm() * other.norm())).item())


def _block_of_layers(context: ScoringContext) -> dict[nn.Module, str]:
    """The block of each layer that has weights in use."""
    owners = {id(weight): context.blocks[name] for name, unit in context.units.items() for weight in unit.values()}
    blocks: dict[nn.Module, str] = {}
    for layer in context.layers:
        held = [owners[id(weight)] for weight in layer.parameters() if id(weight) in owners]
        if block := next((block for block in held if kind_of(block) == "layer"), None):
            blocks[layer] = block
    return blocks


@torch.no_grad()
def _forward(context: ScoringContext, at: int, layers: Mapping[nn.Module, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of one batch before and after each block: of its first call and of its last."""
    batch = context.batches[at]
    reader = _Rows(unwrap_model(context.model), batch if isinstance(batch, Mapping) else {})
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def enter(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)), None)
        if given is not None and given.ndim > 1 and layers[layer] not in before:
            before[layers[layer]] = reader.of(layer, given)

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        returned = output[0] if isinstance(output, tuple | list) else output
        if isinstance(returned, Tensor) and returned.ndim > 1:
            after[layers[layer]] = reader.of(layer, returned)

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        context.budget.spend(FORWARD)
        loss = context.loss_fn(context.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not loss.isfinite():
        raise not_finite("loss", "batch", at)
    return {block: (rows, after[block]) for block, rows in before.items() if block in after}


class _Rows:
    """Reduces what a layer takes or returns to a row for each example."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        from transformers import PreTrainedModel

        self.batch = batch
        self.has_class_token = any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in model.named_parameters())
        self.has_two_stacks = isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder
        self.generates = isinstance(model, PreTrainedModel) and model.can_generate()

    def of(self, layer: nn.Module, states: Tensor) -> Tensor:
        """The rows, on the CPU and in float32 at least."""
        if states.ndim == 3:
            rows = self._of_sequence(layer, states)
        else:
            rows = states.flatten(2).mean(2) if states.ndim > 3 else states
        return rows.to("cpu", torch.promote_types(rows.dtype, torch.float32))

    def _of_sequence(self, layer: nn.Module, states: Tensor) -> Tensor:
        causal = self._is_causal(layer)
        if not (causal or self.has_class_token or self._fits("input_ids", states)):
            return states.mean(1)
        real = self._real(states, causal).to(states.device)
        at = torch.arange(states.shape[1], device=states.device)
        places = torch.where(real, at, -1).amax(1) if causal else torch.where(real, at, len(at)).amin(1)
        return states[torch.arange(len(states), device=states.device), places.clamp(0, len(at) - 1)]

    def _is_causal(self, layer: nn.Module) -> bool:
        """By what its attention says; where there is none, as in Mamba, by whether the model generates text."""
        said = [module.is_causal for module in layer.modules() if isinstance(getattr(module, "is_causal", None), bool)]
        return any(said) if said else self.generates and not self.has_two_stacks

    def _real(self, states: Tensor, causal: bool) -> Tensor:
        """Which positions are no padding."""
        if causal and self.has_two_stacks:
            if self._fits("decoder_attention_mask", states):
                return self.batch["decoder_attention_mask"] != 0
            if self._fits("labels", states):
                return self.batch["labels"] != -100
        elif self._fits("attention_mask", states):
            return self.batch["attention_mask"] != 0
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)

    def _fits(self, key: str, states: Tensor) -> bool:
        value = self.batch.get(key)
        return isinstance(value, Tensor) and value.shape == states.shape[:2]
