"""`SurgicalLayer`, the child of a tuned module that holds the tensor sets which do not stand in the module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import SurgicalError
from ..masks import set_requires_grad
from ..precision.foreign_optimizers import tell_of_others
from .tensors.parked import forget_caches
from .tensors.row_names import split_row
from .tensors.rows import RowSlot, WithRows
from .tensors.slots import BASE, Slot
from .tensors.tuned_tensors import Place, TensorMap

NO_BASE = (
    "keep_base='none' trains the chosen modules in place: their original weights are gone, so there is nothing to go "
    "back to. Load the base model afresh, or wrap it with keep_base='cpu' or 'device', which keep them. A saved "
    "adapter is loaded so by PeftModel.from_pretrained(base, folder, keep_base='cpu')."
)


class SurgicalLayer(WithRows, BaseTunerLayer):
    """Holds, for one module that owns tuned tensors, the base's set of them and those of the adapters.

    One set stands: its tensors are the module's own parameters and buffers. The module itself stays what it was, runs
    as before and knows nothing of this child, which takes no part in the forward pass.

    Args:
        owner: the module.
        root: the model that it is part of; default is the module itself.
        keep_base: where the base's set stays (see [`SurgicalConfig`][surgical_peft.SurgicalConfig]).

    Attributes:
        trained: for each adapter the attributes that it trains; the others are buffers, or fixed by the architecture.
    """

    adapter_layer_names: tuple[str, ...] = ("surgical_sets",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, owner: nn.Module, keep_base: str = "device", root: nn.Module | None = None) -> None:
        super().__init__(keep_base)
        self.__dict__.update(owner=owner, root=root or owner)  # not as submodules, which would be a circle
        self.trained: dict[str, set[str]] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(
        self,
        adapter: str,
        places: dict[str, list[Place]],
        trained: Collection[str],
        like: str = BASE,
        empty: bool = False,
        packed: dict[str, Tensor] | None = None,
    ) -> None:
        """Give `adapter` tensors of its own, of which it trains those in `trained`; it does not stand yet.

        Args:
            places: by the owner's attributes, all places where the tensor stands.
            like: the set whose values it begins with.
            empty: make them on the meta device, for weights that are loaded next (PEFT's `low_cpu_mem_usage`).
            packed: the base's values, where the base itself runs by quantized weights.
        """
        for attribute, where in places.items():
            if attribute not in self.slots:
                keep_base = self.keep_base if packed is None else "packed"
                kind = RowSlot if split_row(attribute) else Slot
                self.slots[attribute] = kind([(place.module, place.attribute) for place in where], keep_base)
            slot = self.slots[attribute]
            slot.add(adapter, like if like in slot else BASE, empty, (packed or {}).get(attribute))
        self.trained[adapter] = set(trained)
        self.watch_rows()
        self.set_requires_grad(adapter, False)
        self.arrange()

    @property
    def adapters(self) -> list[str]:
        """The adapters that have tensors here."""
        return list(self.trained)

    @property
    def surgical_sets(self) -> nn.ModuleDict:
        """The parameters of each adapter, as PEFT's status report and its dtype and device helpers want them."""
        sets = nn.ModuleDict()
        for adapter in self.trained:
            sets._modules[adapter] = held = nn.Module()  # any name, also "keys" or with a dot
            for attribute, tensor in self.tensors(adapter).items():
                if isinstance(tensor, nn.Parameter):
                    held._parameters[attribute] = tensor
        return sets

    @property
    def keeps_base(self) -> bool:
        """True if the base's set is kept."""
        return self.keep_base != "none"

    def get_base_layer(self) -> nn.Module:
        return self.__dict__["owner"]

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the input: for owners that call all their children in turn."""
        return hidden_states

    # Which set stands

    def rivals(self, adapters: Sequence[str]) -> list[str]:
        """Adapters that tune a tensor in common, so that they cannot stand together; empty if there are none."""
        together = [[name for name in adapters if name in slot] for slot in self.slots.values()]
        return next((names for names in together if len(names) > 1), [])

    def wanted(self, adapters: Sequence[str]) -> dict[str, str]:
        """For each attribute of the owner the set that stands if these adapters are active."""
        return {
            attribute: next((name for name in adapters if name in slot), BASE if self.keeps_base else slot.standing)
            for attribute, slot in self.slots.items()
        }

    def stand(self, adapters: Sequence[str]) -> None:
        """Put the tensors of these adapters in place, and the base's where they have none; flags stay as they are."""
        wanted = self.wanted(adapters)
        changed = {name: slot for name, slot in self.slots.items() if slot.standing != wanted[name]}
        for attribute, slot in changed.items():
            slot.stand(wanted[attribute])
        forget_caches(changed.values())
        self.show_parked()
        self.show_rows()

    def load(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        """Give `adapter` these values, by the owner's attributes."""
        for attribute, tensor in values.items():
            self.slots[attribute].load(adapter, tensor)
        forget_caches(self.slots.values())
        self.show_rows()

    def arrange(self) -> None:
        """Put in place the merged set, else the active one, else the base's."""
        self.stand(self.merged_adapters or ([] if self._disable_adapters else self.active_adapters))

    def check_set_adapter(self, adapter_names: str | list[str]) -> None:
        """Refuse adapters that cannot be active together here.

        Raises:
            SurgicalError: two of them have the same tensor, or none has and the base's is gone.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if both := self.rivals(names):
            raise SurgicalError(f"adapters {both} tune the same block and cannot be active at once: set one of them.")
        if not self.keeps_base and not any(name in self.trained for name in names):
            raise SurgicalError(NO_BASE)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:  # transformers does not ask all layers before it sets the first
            for module in self.__dict__["root"].modules():
                if isinstance(module, SurgicalLayer):
                    module.check_set_adapter(names)
        self.check_set_adapter(names)
        for adapter in self.trained:
            self.set_requires_grad(adapter, adapter in names and not inference_mode)
        self._active_adapter = names
        self.arrange()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            tensors = self.tensors(adapter) if adapter in self.trained else {}
            for attribute, tensor in tensors.items():
                set_requires_grad(tensor, requires_grad and attribute in self.trained[adapter])
            if requires_grad:
                tell_of_others(tensors.values())

    def requires_grad_(self, requires_grad: bool = True) -> SurgicalLayer:
        """For all adapters; transformers calls it when it has loaded one for inference."""
        self.set_requires_grad(list(self.trained), requires_grad)
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's, but no `requires_grad` changes: masks of policies, and graphs recorded before, stay valid."""
        if not enabled and not self.keeps_base:
            raise SurgicalError(NO_BASE)
        if not enabled:
            self.merged_adapters.clear()
        self._disable_adapters = not enabled
        self.arrange()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let an adapter stand from now on, whichever is active; no weight moves, so unmerging is exact.

        Raises:
            SurgicalError: two adapters at once, or, with `safe_merge`, a tuned weight that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.trained]
        if not names:
            return
        if both := self.rivals([*self.merged_adapters, *names]):
            raise SurgicalError(f"adapters {both} tune the same block; merge one, or unmerge the other first.")
        if safe_merge:
            for name in names:
                for attribute, tensor in self.tensors(name).items():
                    if not torch.isfinite(tensor).all():
                        raise SurgicalError(  # PEFT's words, for who looks for them
                            f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {attribute} "
                            f"of a {type(self.get_base_layer()).__name__} has NaN or infinite values: not merged."
                        )
        self.merged_adapters.extend(names)
        self.arrange()

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.arrange()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.trained:
            self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
            return
        if not self.keeps_base:
            raise SurgicalError(NO_BASE)
        was_active = adapter_name in self.active_adapters
        left = [name for name in self.active_adapters if name != adapter_name]
        others = [name for name in self.trained if name != adapter_name]
        if was_active and not left and others:
            warnings.warn(  # PEFT's words
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.",
                stacklevel=2,
            )
            self.set_adapter(others[0])
        else:
            self._active_adapter = left
            self.arrange()
        self.unwatch_rows()
        for attribute, slot in list(self.slots.items()):
            if adapter_name in slot:
                slot.remove(adapter_name)
                if not slot.adapters:
                    slot.give_back(BASE)
                    del self.slots[attribute]
        del self.trained[adapter_name]
        self.watch_rows()
        self.show_parked()
        if not self.trained:
            self.detach()

    def detach(self) -> None:
        """Remove this child from its owner."""
        self.unwatch_rows()
        owner = self.get_base_layer()
        for name in [name for name, child in owner._modules.items() if child is self]:
            del owner._modules[name]

    def give_back(self) -> None:
        """Leave the owner its own objects for good, with the merged values, else the base's; then `detach`."""
        for attribute, name in self.wanted(self.merged_adapters).items():
            self.slots[attribute].give_back(name)
        forget_caches(self.slots.values())
        self.detach()

    def extra_repr(self) -> str:
        return f"{', '.join(self.trained)}: {', '.join(self.slots)}"


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters and saved buffers by the first of their names, also where an adapter's stand."""
    layers = [module for module in model.modules() if isinstance(module, SurgicalLayer)]
    slots = {place: slot for layer in layers for slot in layer.slots.values() for place in slot.places}
    rows: dict[tuple[nn.Module, str], list[RowSlot]] = {}
    for row in slots.values():
        if isinstance(row, RowSlot) and BASE in row and row.standing != BASE:
            rows.setdefault((row.module, row.attribute), []).append(row)
    tensors: dict[str, Tensor] = {}
    for name, (place, *_) in TensorMap.find(model).places.items():
        slot = slots.get((place.module, place.attribute))
        tensors[name] = place.tensor if slot is None or BASE not in slot else slot.of(BASE)
        for row in rows.get((place.module, place.attribute), ()):
            tensors[name] = tensors[name].detach().clone() if tensors[name] is place.tensor else tensors[name]
            tensors[name][row.index] = row.of(BASE)
    return tensors
