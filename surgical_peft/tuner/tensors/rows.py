"""Single experts of a weight in which experts are stacked: a slot for a row of a tensor.

The row is a parameter of its own in the memory of the stacked weight, which stays in its module and stays frozen. So
whatever an optimizer does, by decay or momentum, reaches the chosen experts only; and whoever reads the stacked weight
reads what was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SurgicalError
from ...scoring.distributed import under_deepspeed
from .parked import ParkedTensors
from .row_names import split_row
from .slots import BASE, Slot


class RowSlot(Slot):
    """A row of a stacked weight. Values are exchanged here, the weight itself stays.

    Args:
        places: the module and the name of the row in it, such as `"down_proj[3]"`.
        keep_base: as in `Slot`.

    Attributes:
        module: that owns the stacked weight.
        attribute: its name there.
        index: of the row.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], keep_base: str = "device") -> None:
        row = split_row(places[0][1])
        assert row is not None
        self.module = places[0][0]
        self.attribute, self.index = row
        self._row: nn.Parameter | None = None  # of the adapter that stands
        super().__init__(places, keep_base)

    @property
    def stacked(self) -> Tensor:
        """The weight that the row is of."""
        weight = self.module._parameters.get(self.attribute)
        if weight is None:
            raise SurgicalError(
                f"{type(self.module).__name__} has lost its {self.attribute}, of which an adapter tunes experts: "
                "unload or merge the adapter before you take weights out of modules."
            )
        return weight

    @property
    def here(self) -> Tensor:
        """What stands: the adapter's parameter, or the base's values."""
        return self._place if self._row is None else self._row

    @property
    def _place(self) -> Tensor:
        return self.stacked.data[self.index]

    def add(self, adapter: str, like: str = BASE, empty: bool = False, values: Tensor | None = None) -> None:
        """Give `adapter` a row of its own with the values of the set `like`; `empty` leaves them out."""
        if self.keep_base == "none":
            self._row = nn.Parameter(self._place, requires_grad=False)
            self.standing = adapter
        elif empty:
            self.empty.add(adapter)
            self.parked[adapter] = nn.Parameter(torch.empty_like(self._place, device="meta"), requires_grad=False)
        else:
            copy = self.of(like).detach().to(self._place.device, copy=True)
            self.parked[adapter] = nn.Parameter(copy, requires_grad=False)

    def load(self, adapter: str, values: Tensor) -> None:
        """Give `adapter` these values, in the dtype and on the device of what they replace."""
        row = self.of(adapter)
        if adapter in self.empty:
            self.empty.discard(adapter)
            place = self._place
            loaded = nn.Parameter(values.detach().to(place.device, place.dtype, copy=True), row.requires_grad)
            if adapter != self.standing:
                self.parked[adapter] = loaded
                return
            place.copy_(loaded.detach())
            loaded.data = place
            self._row = loaded
        else:
            with torch.no_grad():
                row.copy_(values)
            self.sync()

    def stand(self, name: str) -> None:
        """Write the values of the set `name` into the stacked weight."""
        if name == self.standing:
            return
        self.sync()
        left, place = self.standing, self._place
        if self._row is not None:
            if left not in self.empty:
                self._row.data = place.clone()
            self.parked[left] = self._row
        elif BASE not in self.parked:
            self.parked[BASE] = place.to("cpu" if self.keep_base == "cpu" else place.device, copy=True)
        there = self.parked[name] if name == BASE and self.keep_base == "cpu" else self.parked.pop(name)
        self.standing, self._row = name, None
        if name not in self.empty:
            place.copy_(there.detach())
        if name != BASE:
            assert isinstance(there, nn.Parameter)
            self._row = there
            if name not in self.empty:
                there.data = place

    def remove(self, adapter: str) -> None:
        """Drop the row of an adapter that does not stand."""
        self.parked.pop(adapter)
        self.empty.discard(adapter)

    def give_back(self, name: str) -> None:
        """For good: the values of the set `name` are the stacked weight's own."""
        self.stand(name)
        self.sync()
        self.standing, self._row, self.parked = BASE, None, {}

    def retie(self) -> None:
        """Nothing to do: a row stands in one place."""

    def sync(self) -> None:
        """Share memory with the stacked weight again after both were moved, as by `model.to(device)`."""
        row = self._row
        if row is None or self.standing in self.empty or row.is_meta:
            return
        place = self._place
        if row.data_ptr() != place.data_ptr():
            place.copy_(row.detach())
            if not under_deepspeed():  # which keeps what it trains in memory of its own
                row.data = place


class _Rows(torch.autograd.Function):
    """The stacked weight, whose gradient goes to its rows."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, slots: list[RowSlot], *rows: Tensor) -> Tensor:
        ctx.slots = [(slot, slot.standing) for slot in slots]
        return stacked.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for slot, standing in ctx.slots:
            if slot.standing != standing:
                raise SurgicalError(
                    f"experts of {type(slot.module).__name__} were those of {standing!r} in the forward pass and are "
                    f"those of {slot.standing!r} now: switch back before the backward pass, or run it first."
                )
        return (None, None, *(gradient[slot.index].clone() for slot, _ in ctx.slots))


def _lend(module: nn.Module, slots: Iterable[RowSlot]) -> None:
    """Let the forward pass of `module` read stacked weights whose gradients go to the rows that stand."""
    stacked: dict[str, list[RowSlot]] = {}
    for slot in slots:
        if slot.module is module:
            slot.sync()
            if slot.here.requires_grad and not slot.stacked.requires_grad:  # all of it is scored, or unfrozen by hand
                stacked.setdefault(slot.attribute, []).append(slot)
    for attribute, trained in stacked.items() if torch.is_grad_enabled() else ():
        weight = trained[0].stacked
        module.__dict__[attribute] = _Rows.apply(weight, trained, *(slot.here for slot in trained))


class _StandingRows(nn.Module):
    """Shows rows as parameters, for optimizers; `state_dict()` has them in the stacked weights."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update(rows)  # type: ignore[arg-type]  # their names have brackets

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class WithRows(ParkedTensors):
    """Tensors that do not stand in a module, and rows of its stacked weights that do."""

    def watch_rows(self) -> None:
        """Hook the modules whose stacked weights have rows here."""
        self.unwatch_rows()
        for module in dict.fromkeys(slot.module for slot in self._rows()):
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward, always_call=True)

    def unwatch_rows(self) -> None:
        """Remove these hooks."""
        for module in dict.fromkeys(slot.module for slot in self._rows()):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for at in [at for at, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[at]
                    module._forward_hooks_always_called.pop(at, None)

    def _rows(self) -> list[RowSlot]:
        return [slot for slot in self.slots.values() if isinstance(slot, RowSlot)]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if all(slot.module is not module for slot in self._rows()):
            raise SurgicalError(
                f"a copy of {type(module).__name__} runs, of which single experts are tuned in the model itself: "
                "train in one process for each device (torchrun, accelerate launch), not with nn.DataParallel."
            )
        shown = self._modules.get("standing")
        own = {id(slot.here) for slot in self._rows()}
        if shown is not None and any(id(row) not in own for row in shown.parameters()):
            raise SurgicalError(
                f"the parameters of single experts in {type(module).__name__} have been replaced since, as FSDP does "
                "when it shares weights out: an optimizer would step on others than those that run. Use DDP or one "
                "process, or tune all experts, target_modules=['experts']."
            )
        _lend(module, self._rows())

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        for attribute in {slot.attribute for slot in self._rows()}:
            module.__dict__.pop(attribute, None)

    def show_rows(self) -> None:
        """Register the rows of adapters that stand as parameters, for optimizers."""
        self._modules.pop("standing", None)
        standing = {slot.places[0][1]: slot.here for slot in self._rows() if slot.standing != BASE}
        if standing:
            self._modules["standing"] = _StandingRows(standing)
