"""The context of a criterion of the whole model: losses, and short trainings that leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...precision.master_weights import is_16_bit
from ..budget import FORWARD, GRADIENTS, Budget
from ..criterion import not_finite, reshard, tell_unreached
from .frozen_prefix import Prefix


@dataclass(frozen=True)
class ScoringContext:
    """The model as a whole-model criterion gets it: in eval mode, on its device, with all weights trainable.

    16-bit weights are trained through 32-bit masters: steps of Adam are smaller than what 16 bits can tell apart.

    Attributes:
        model: to be left as it was; `training` sees to its weights.
        units: for each unit its weights by their names in the bare model.
        blocks: the block that each unit belongs to.
        layers: the repeated layers of the model.
        batches: labeled batches, on the model's device.
        loss_fn: `(model, batch) -> scalar loss`.
        budget: counts what `loss` and the backward pass after it cost.
        basis: to be filled in: units whose score is no measurement of their own, with `GIVEN_UP` or `GUESSED`.
        agreed: broadcasts the numbers of the first process: the next step depends on them, and trained weights may
            differ in the last bit between machines.
    """

    model: nn.Module
    units: dict[str, dict[str, nn.Parameter]]
    blocks: dict[str, str]
    layers: Sequence[nn.Module]
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    agreed: Callable[[dict[str, float]], dict[str, float]] = dict
    budget: Budget = field(default_factory=Budget)
    prefix: Prefix = field(init=False)
    _masters: list[tuple[nn.Parameter, nn.Parameter]] = field(init=False, default_factory=list)
    basis: dict[str, str] = field(init=False, default_factory=dict)
    known: dict[str, Any] = field(init=False, default_factory=dict)  # results that several criteria use

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", Prefix(self.model, self.layers))

    def loss(self, at: int) -> Tensor:
        """Loss of the batch `at`; layers before the weights in training are not run where their outputs are known."""
        step, forward = self.known.get("costs in training", (GRADIENTS, FORWARD))
        self.budget.spend(step if torch.is_grad_enabled() else forward)
        with self.prefix.of(at):
            return self.loss_fn(self.model, self.batches[at])

    def share_run(self, name: str) -> float:
        """The share of the layers, 0 to 1, that a training step of this unit alone has to run, once `loss` was called.

        The others lie before it.
        """
        skipped = self.prefix.before(list(self.units[name].values()))
        return 1 - len(skipped) / len(self.layers) if self.layers else 1.0

    def costs(self, *names: str) -> tuple[float, float]:
        """Cost of a training step of these units alone, and of a forward pass, in training steps of the whole model.

        Call `loss` first: without it, the layers that lie before the units count as run.
        """
        weights = [weight for name in names for weight in self.units[name].values()]
        skipped = self.prefix.before(weights)
        size = sum(weight.numel() for weight in self.model.parameters())
        saved = sum(weight.numel() for layer in skipped for weight in layer.parameters()) / size
        # All that is no layer is taken for one more: where the model is small, calls cost more than numbers.
        run = 1 - min(saved, len(skipped) / (len(self.layers) + 1))
        tuned = sum(weight.numel() for weight in weights) / size
        return (1 - FORWARD) * run + FORWARD * tuned, FORWARD * run

    def cost(self, *names: str, passes: int = 1) -> float:
        """Cost of training these units through all batches `passes` times and reading the losses afterwards."""
        step, forward = self.costs(*names)
        return len(self.batches) * (passes * step + forward)

    def keep(self, count: int) -> None:
        """Keep the first `count` batches only."""
        del self.batches[count:]

    @contextmanager
    def only(self, count: int) -> Iterator[None]:
        """Keep the first `count` batches only, inside."""
        rest = self.batches[count:]
        self.keep(count)
        try:
            yield
        finally:
            self.batches.extend(rest)

    @torch.no_grad()
    def mean_loss(self, ats: Sequence[int]) -> float:
        """Mean loss of some batches."""
        mean = float(torch.stack([self.loss(at).double().cpu() for at in ats]).mean())
        return self.agreed({"loss": mean})["loss"]

    @contextmanager
    def training(self, *names: str) -> Iterator[dict[str, list[nn.Parameter]]]:
        """Only these units are trainable inside; afterwards their weights are as before, bit for bit.

        Yields for each unit the weights to step on: its own, or float32 masters of 16-bit ones.
        """
        reshard(self.model)
        chosen = {name: list(self.units[name].values()) for name in names}
        kept = [(weight, weight.detach().clone()) for weights in chosen.values() for weight in weights]
        inside = {id(weight) for weight, _ in kept}
        everything = [weight for unit in self.units.values() for weight in unit.values()]
        flags = [weight.requires_grad for weight in everything]
        for weight in everything:
            weight.requires_grad_(id(weight) in inside)
        stepped = {name: [self._master(weight) for weight in weights] for name, weights in chosen.items()}
        self.known["costs in training"] = self.costs(*names)
        try:
            with self.prefix.skipping([weight for weight, _ in kept]):
                yield stepped
        finally:
            self._masters.clear()
            del self.known["costs in training"]
            reshard(self.model)
            with torch.no_grad():
                for weight, value in kept:
                    weight.copy_(value)
            for weight, flag in zip(everything, flags, strict=True):
                weight.requires_grad_(flag)
                weight.grad = None

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if not is_16_bit(weight):
            return weight
        master = nn.Parameter(weight.detach().float())
        self._masters.append((weight, master))
        return master

    @torch.no_grad()
    def _round(self) -> None:
        for weight, master in self._masters:
            weight.copy_(master)

    def steps(
        self, optimizer: torch.optim.Optimizer, ats: Sequence[int], which: range, rate: float, total: int
    ) -> list[Tensor]:
        """Train the steps `which` out of `total` on some batches, over and over; the rate falls linearly to 0.

        Returns:
            The loss before each step.
        """
        losses = []
        self._round()
        for step in which:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / total)
            optimizer.zero_grad()
            loss = self.loss(ats[step % len(ats)])
            loss.backward()
            for weight, master in self._masters:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            optimizer.step()
            self._round()
            losses.append(loss.detach())
        return losses

    def moved(
        self, measure: Callable[[Sequence[Tensor], Sequence[Tensor]], float], steps: int, rate: float
    ) -> dict[str, float]:
        """`measure(before, after)` of the weights that move in `steps` steps of Adam on all units together.

        Fewer steps, and at least one, where the budget is less.

        Raises:
            SurgicalError: a loss that is NaN or infinite.
        """
        steps = self.budget.affordable(steps, 1.0, "a training step")
        self.budget.stage(f"{steps} training steps of all units", steps)
        with self.training(*self.units) as units:
            before = {name: [weight.detach().clone() for weight in unit] for name, unit in units.items()}
            optimizer = torch.optim.Adam([weight for unit in units.values() for weight in unit], lr=rate)
            ats = range(len(self.batches))
            for step, loss in enumerate(self.steps(optimizer, ats, range(steps), rate, steps)):
                if not loss.isfinite():
                    raise not_finite("loss", "batch", ats[step % len(ats)])
            with torch.no_grad():
                values = {name: measure(before[name], unit) for name, unit in units.items()}
        tell_unreached([name for name, value in values.items() if not value], values)
        return {name: value for name, value in values.items() if value}
