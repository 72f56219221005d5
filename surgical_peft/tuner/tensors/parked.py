"""Tensors that a module holds without showing them as parameters, moved, cast and saved with it all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .slots import BASE, Slot, is_sharded, with_data


class ParkedTensors(nn.Module):
    """Holds the tensors of a module that do not stand in it.

    They move, and change their dtype, with the module, and are in `state_dict()` under the name of their set; but they
    are neither parameters nor buffers, so that nobody averages, gathers, sends or counts them. Only DeepSpeed's ZeRO-3
    is shown them as parameters: it deals out, and saves, what it finds as such.

    Args:
        keep_base: where the base's set stays (see [`SurgicalConfig`][surgical_peft.SurgicalConfig]).

    Attributes:
        slots: the tensors, by the module's attributes.
        loading: whether a saved adapter is being loaded. `state_dict()` leaves out what is parked until then:
            transformers would report it as missing from the file.
    """

    def __init__(self, keep_base: str = "device") -> None:
        super().__init__()
        self.keep_base = keep_base
        self.slots: dict[str, Slot] = {}
        self.loading = False

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the set `name`, by the owner's attributes."""
        return {attribute: slot.of(name) for attribute, slot in self.slots.items() if name in slot}

    def show_parked(self) -> None:
        """Register the parked tensors as parameters, under ZeRO-3 only."""
        if not is_deepspeed_zero3_enabled():
            return
        self._modules.clear()
        for attribute, slot in self.slots.items():
            for name, tensor in slot.parked.items():
                if name not in self._modules:
                    self._modules[name] = nn.Module()
                held: Any = self._modules[name]  # its names may have dots
                (held._parameters if isinstance(tensor, nn.Parameter) else held._buffers)[attribute] = tensor

    def train(self, mode: bool = True) -> ParkedTensors:
        """As torch's; whoever sets the mode has done loading, as transformers does after its own `load_adapter`."""
        if self.loading:
            self.loading = False
            for slot in self.slots.values():
                slot.retie()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParkedTensors:
        super()._apply(fn, recurse)
        for slot in self.slots.values():
            home = fn(torch.empty(0, device=slot.home)).device
            if home.type == "meta" and torch.distributed.is_initialized():
                continue  # accelerate empties the model before FSDP2 shards it, and loads `state_dict()` again
            slot.home = home
            for name, tensor in slot.parked.items():
                if name == BASE and self.keep_base == "cpu":  # takes the dtype; is not to pass through the accelerator
                    values = tensor.detach().to(fn(tensor.detach().new_empty(0)).dtype)
                else:
                    values = fn(tensor.detach())
                slot.parked[name] = with_data(tensor, values)
        self.show_parked()
        return self

    def _parked(self) -> dict[str, tuple[Slot, str]]:
        """The tensors that only this child holds, by their names in `state_dict()`."""
        shown = self._modules  # under ZeRO-3, where they are its parameters
        return {
            f"{name}.{attribute}": (slot, name)
            for attribute, slot in self.slots.items()
            for name, tensor in slot.parked.items()
            if name not in shown and slot.standing != name and is_sharded(slot.here) <= is_sharded(tensor)
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, (slot, name) in {} if self.loading else self._parked().items():
            tensor = slot.parked[name]
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parked = {} if self.loading else self._parked()
        self.loading = False  # PEFT calls this last
        for key, (slot, name) in parked.items():
            values = state_dict.get(prefix + key)
            if values is None:
                missing_keys += [prefix + key] * strict
            elif values.shape != slot.parked[name].shape:
                shapes = f"{tuple(values.shape)} in the checkpoint and {tuple(slot.parked[name].shape)} here"
                error_msgs.append(f"size mismatch for {prefix + key}: {shapes}")
            elif local_metadata.get("assign_to_params_buffers", False):
                slot.parked[name] = with_data(slot.parked[name], values.detach())
            else:
                with torch.no_grad():
                    slot.parked[name].copy_(values)
        if strict:
            shown = [f"{prefix}{name}." for name in self._modules]
            ours = [key for key in state_dict if key.startswith(prefix) and not key.startswith(tuple(shown))]
            unexpected_keys += [key for key in ours if key.removeprefix(prefix) not in parked]

    def __getattr__(self, name: str) -> Any:
        """Parked sets go by their names, as torch's distributed checkpoints look up what `state_dict()` tells."""
        slots: dict[str, Slot] = self.__dict__.get("slots", {})
        parked = {attribute: slot.parked[name] for attribute, slot in slots.items() if name in slot.parked}
        if parked and name not in self._modules:  # where they are under ZeRO-3
            return SimpleNamespace(**parked)
        return super().__getattr__(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for slot in self.slots.values():
            if adapter_name in slot.parked and adapter_name not in slot.empty:
                tensor = slot.parked[adapter_name]
                slot.parked[adapter_name] = with_data(tensor, tensor.detach().to(device or slot.home))


def forget_caches(slots: Iterable[Slot]) -> None:
    """Clear what modules cache of tensors that have changed.

    LeViT's attention keeps such a thing in eval mode, and drops it in a `train` of its own.
    """
    for module in dict.fromkeys(module for slot in slots for module, _ in slot.places):
        if type(module).train is not nn.Module.train:
            modes = [(child, child.training) for child in module.modules()]
            loading = [(child, child.loading) for child in module.modules() if isinstance(child, ParkedTensors)]
            module.train(not module.training)
            module.train(not module.training)
            for child, training in modes:
                child.training = training
            for layer, flag in loading:
                layer.loading = flag
