"""What becomes of the original of a tuned module: kept beside the copies, parked on the CPU, or given up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .quantised import is_packed

NO_BASE = (
    "keep_base='none' trains the chosen modules in place: their original weights are gone, so there is nothing to go "
    "back to. Load the base model afresh, or wrap it with keep_base='cpu' or 'device', which keep them. A saved "
    "adapter is loaded so by PeftModel.from_pretrained(base, folder, keep_base='cpu')."
)


class KeepsOriginal(nn.Module):
    """Holds `original_module` beside `surgical_copies`, as `keep_base` says; a part of `SurgicalLayer`.

    While a copy answers, the original stands aside: it is in `state_dict()`, but `named_modules()` and
    `named_parameters()` leave it out. So parameters are counted once, and DDP and optimizers never meet weights that
    nothing uses.
    """

    original_module: nn.Module
    keep_base: str
    surgical_copies: nn.ModuleDict
    _active_adapter: str | list[str]
    merged_adapters: list[str]
    _disable_adapters: bool
    _lent: list[nn.Module]  # in a list, so that it is no submodule
    _tuned_names: dict[str, set[str]]

    @property
    def keeps_base(self) -> bool:
        """Whether the original weights are still there."""
        return "original_module" in self._modules

    def _names_in_use(self) -> list[str]:
        if self._disable_adapters:
            return []
        names = self.merged_adapters or self._active_adapter
        copies = self._modules["surgical_copies"]._modules  # type: ignore[union-attr]  # at every call of the layer
        return [name for name in ([names] if isinstance(names, str) else names) if name in copies]

    @property
    def stands_aside(self) -> bool:
        """Whether a copy answers instead of the original."""
        return bool(self._names_in_use())

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module`'s, but without an original that stands aside.

        ZeRO-3 is shown it: DeepSpeed readies all modules once, and this one may be asked for later.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        hidden = "original_module" if self.stands_aside and not is_deepspeed_zero3_enabled() else ""
        for name, child in self._modules.items():
            if child is not None and name != hidden:
                yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    # keep_base="cpu". The original never changes, so what is lent to the device is a copy, dropped afterwards.

    def device_in_use(self) -> torch.device | None:
        """The device of the copies; None before there is one."""
        for module in self.surgical_copies.values():
            for parameter in module.parameters():
                return parameter.device
        return None

    def original_on(self, device: torch.device | None) -> nn.Module:
        """The original module, or, where it is parked on the CPU, a copy of it on `device`."""
        original = self.original_module
        if self.keep_base != "cpu" or device is None or device.type == "cpu":
            return original
        if not self._lent:
            shared = {id(p): p for p in original.parameters() if p.device == device}
            self._lent.append(copy.deepcopy(original, shared).to(device))
        return self._lent[0]

    def _park(self) -> None:
        """Bring the original weights that some copy has a version of to the CPU, and drop what was lent."""
        self._lent.clear()
        if self.keep_base != "cpu":
            return
        names = set().union(*self._tuned_names.values())
        for name, parameter in self.original_module.named_parameters():
            if name in names:
                parameter.data = parameter.data.cpu()
        for module in self.original_module.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.cpu()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsOriginal:
        self._lent.clear()
        parked = self._modules.pop("original_module") if self.keep_base == "cpu" else None
        super()._apply(fn, recurse)
        if parked is not None:  # takes the dtype, not the device: it is not to pass through the accelerator
            parked._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype))
            self._modules["original_module"] = parked
        return self


_TRAINED = "_surgical_trained"  # on a parameter: whether it was trainable before the model was first wrapped


def note_trainable(model: nn.Module) -> None:
    """Remember what is trainable now: wrapping freezes it all, and a later adapter must not train a fixed weight."""
    for parameter in model.parameters():
        if not hasattr(parameter, _TRAINED):
            setattr(parameter, _TRAINED, parameter.requires_grad)


def fixed_by_architecture(module: nn.Module) -> set[str]:
    """Names of parameters that are not meant to train, such as sin-cos positions: frozen ones among trainable ones.

    If all are frozen, by an earlier adapter or the user, what `note_trainable` noted counts. If they were then, too,
    the user froze the model before wrapping it, as many do. Quantised weights are always frozen.
    """
    own = dict(module.named_parameters())
    trained = {name: parameter.requires_grad for name, parameter in own.items()}
    if not any(trained.values()):
        trained = {name: getattr(parameter, _TRAINED, False) for name, parameter in own.items()}
    return {name for name, p in own.items() if any(trained.values()) and not trained[name] and not is_packed(p)}
