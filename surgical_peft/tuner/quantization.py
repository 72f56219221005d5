"""Chosen modules of a quantized base become float: packed weights cannot be trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..blocks.unwrap import PARKED, named_bare_modules
from ..errors import SurgicalError
from .tensors.slots import BASE
from .tensors.tuned_tensors import put

WAS_PACKED = "surgical_was_packed"  # an attribute of float layers that stand where packed ones stood


def is_packed(parameter: Tensor) -> bool:
    """True for a quantized weight: an integer, a float of 8 bits, or of a class of a library that quantizes."""
    number = parameter.is_floating_point() or parameter.is_complex()
    wide = number and parameter.dtype.itemsize > 1
    return not wide or type(parameter).__module__.startswith(("bitsandbytes.", "torchao."))


class FloatLinear(nn.Linear):
    """Stands in for a quantized linear layer: trains its dequantized weight, and runs the packed one for the base.

    Where the float model has a `Conv1D`, as GPT-2 does, the weight is turned as it is there, so that a saved adapter
    is the same file for both.

    Args:
        packed: the layer to stand in for, of bitsandbytes (4 and 8 bits) or torchao.
        dtype: of the float weight; that of the activations around it.
    """

    def __init__(self, packed: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(
            packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta", dtype=dtype
        )
        self.__dict__["packed"] = packed  # no part of this module: its weights are parked
        self.__dict__["lent"] = None
        self.is_turned = issubclass(getattr(packed, "source_cls", nn.Linear), Conv1D)
        _share_hooks(packed, self)
        self.train(packed.training)
        self.refill()

    def values(self) -> dict[str, Tensor]:
        """The dequantized weight, and the bias."""
        packed, dtype = self.__dict__["packed"], self.weight.dtype
        weight = _dequantized(packed)
        assert weight is not None  # `packed_layers` has looked
        tensors = {"weight": (weight.T if self.is_turned else weight).to(dtype, copy=True).contiguous()}
        if packed.bias is not None:
            tensors["bias"] = packed.bias.detach().to(dtype, copy=True)
        return tensors

    def refill(self) -> None:
        """Copy the values of the packed layer."""
        for name, values in self.values().items():
            put(self, name, nn.Parameter(values))

    def forward(self, input: Tensor) -> Tensor:
        """With the weight of the set that stands."""
        layer: Any = getattr(self, PARKED, None)
        if layer is not None and layer.slots["weight"].standing != BASE:
            self.__dict__["lent"] = None
            return linear(input, self.weight.T if self.is_turned else self.weight, self.bias)
        return self._packed_on(input.device).forward(input)  # hooks have been called

    def _packed_on(self, device: torch.device) -> nn.Linear:
        packed: nn.Linear = self.__dict__["packed"]
        if packed.weight.device == device:
            return packed
        if self.__dict__["lent"] is None or self.__dict__["lent"].weight.device != device:
            self.__dict__["lent"] = copy.deepcopy(packed).to(device)
        return self.__dict__["lent"]

    def train(self, mode: bool = True) -> FloatLinear:
        """As torch's, with the packed layer in the same mode: bitsandbytes reads it."""
        self.__dict__["packed"].train(mode)
        self.__dict__["lent"] = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FloatLinear:
        def move(tensor: Tensor) -> Tensor:  # the base's set has no values, which torch refuses to move
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype)).dtype) if tensor.is_meta else fn(tensor)

        super()._apply(move, recurse)
        self.__dict__["lent"] = None
        layer: Any = getattr(self, PARKED, None)
        if layer is None or layer.keep_base == "device":
            self.__dict__["packed"]._apply(fn, recurse)
        return self

    def plain(self) -> nn.Module:
        """The float layer alone, around the same weight, of the class that it has in a float model."""
        with torch.device("meta"):
            made = (
                Conv1D(self.out_features, self.in_features)
                if self.is_turned
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        put(made, "weight", self.weight)
        if self.bias is not None:
            put(made, "bias", self.bias)
        _share_hooks(self, made)
        made.__dict__[WAS_PACKED] = True
        return made.train(self.training)


def _share_hooks(source: nn.Module, made: nn.Module) -> None:
    made._forward_hooks, made._forward_pre_hooks = source._forward_hooks, source._forward_pre_hooks
    made._forward_hooks_with_kwargs = source._forward_hooks_with_kwargs
    made._forward_pre_hooks_with_kwargs = source._forward_pre_hooks_with_kwargs
    made._forward_hooks_always_called = source._forward_hooks_always_called
    made._backward_hooks, made._backward_pre_hooks = source._backward_hooks, source._backward_pre_hooks
    made._is_full_backward_hook = source._is_full_backward_hook


def packed_layers(model: nn.Module, paths: Iterable[str], names: Collection[str]) -> dict[str, torch.dtype]:
    """The quantized linear layers whose weights are among `names`, and the dtype that each is to have in float.

    That is the dtype of the other parameters in the largest modules around them, which are at `paths`, or of those in
    the model: it is that of the activations.

    Raises:
        SurgicalError: packed weights of another kind, or integers that are none.
    """
    modules = dict(named_bare_modules(model))
    packed: dict[str, torch.dtype] = {}
    for path in paths:
        weights = _weights(modules[path], path)
        plain = _float_dtypes(weights) or _float_dtypes(_weights(model, ""))
        for name, (module, parameter) in weights.items():
            home = name.rpartition(".")[0]
            if name in names and is_packed(parameter) and home not in packed:
                weight = _dequantized(module) if isinstance(module, nn.Linear) else None
                of_torch = type(parameter) in (Tensor, nn.Parameter) and parameter.dtype.itemsize > 1
                if weight is None and (of_torch or parameter.dtype == torch.bool):
                    raise SurgicalError(
                        f"{name} holds integers ({parameter.dtype}), which no gradient can change: leave it out, by "
                        f"exclude_modules=[{home!r}], or make it a buffer."
                    )
                if weight is None:
                    raise SurgicalError(
                        f"{name} is packed ({type(parameter).__name__}, {parameter.dtype}) and cannot be dequantized: "
                        "choose other blocks, or load the model with these modules left out of the quantization."
                    )
                packed[home] = plain[0] if plain else weight.dtype
    return packed


def _weights(module: nn.Module, path: str) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    return {
        f"{name}.{attribute}": (owner, parameter)
        for name, owner in named_bare_modules(module, path)
        for attribute, parameter in owner._parameters.items()
        if parameter is not None
    }


def _float_dtypes(weights: Mapping[str, tuple[nn.Module, nn.Parameter]]) -> list[torch.dtype]:
    return [p.dtype for _, p in weights.values() if not is_packed(p) and p.is_floating_point()]


def _dequantized(packed: nn.Linear) -> Tensor | None:
    weight: Any = packed.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return _dequantized_in_cpu_order(weight)
    # PEFT sets the weight of what it is given to another one, which lacks the scales of an 8-bit layer that has run,
    # and is lost inside accelerate's init_empty_weights
    layer: Any = SimpleNamespace(weight=weight, state=getattr(packed, "state", None))
    values = dequantize_module_weight(layer)
    return None if values is weight else values.detach()


def _dequantized_in_cpu_order(weight: Any) -> Tensor:
    # bitsandbytes puts 4-bit weights into another order at the first pass in eval mode on CPUs with bfloat16
    # arithmetic. PEFT would read them in the usual one, and what bitsandbytes itself turns back (0.50) has its scales
    # in the wrong places.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    state = copy.copy(weight.quant_state)
    scales, state.original_nested = state.absmax, False  # they were unpacked, too
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales.T.reshape(-1).float()
    return dequantize_4bit(data, state).detach()


def unpack(model: nn.Module, in_float: Collection[nn.Module]) -> None:
    """Take every `FloatLinear` out of a model: plain float layers for those `in_float`, the packed ones for others."""
    for path, module in [(path, module) for path, module in model.named_modules() if isinstance(module, FloatLinear)]:
        model.set_submodule(path, module.plain() if module in in_float else module.__dict__["packed"])


def unpack_idle(model: nn.Module) -> None:
    """Restore the packed layers that no adapter replaces any more."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FloatLinear) and PARKED not in module._modules:
            model.set_submodule(path, module.__dict__["packed"])


def note_float_layers(model: nn.Module) -> None:
    """Let the model's own quantization record, if it has one, name the layers that were packed and are float now.

    `from_pretrained` reads it, of what `save_pretrained` has written.

    Warns:
        UserWarning: such a record has no place for them.
    """
    record = getattr(getattr(model, "config", None), "quantization_config", None)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    unpacked = [path for path, module in layers.items() if WAS_PACKED in module.__dict__]
    if record is None or not unpacked:
        return
    fields = record if isinstance(record, dict) else vars(record)
    method = fields.get("quant_method")
    field = "llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert"
    if field not in fields and method not in ("bitsandbytes", "torchao"):
        warnings.warn(
            f"the quantization record of the model ({type(record).__name__}) cannot say which layers are float now: "
            f"{', '.join(unpacked[:3])}{', ...' if len(unpacked) > 3 else ''}. The model runs, but from_pretrained "
            "cannot load what its save_pretrained writes: keep the adapter's files, and merge after loading.",
            stacklevel=2,
        )
        return
    packed = [path for path, module in layers.items() if is_packed(module.weight)]
    noted = fields.get(field)
    if noted is None:  # the loader leaves out the output layer by itself, but not beside a list
        noted, unpacked = [], [path for path in layers if path not in packed]
    new = [path for path in unpacked if should_convert_module(path, noted)]
    # It also takes a name for the end of others, but a pattern for their beginning only.
    clash = [path for path in new if any(not should_convert_module(other, [path]) for other in packed)]
    fields[field] = [*noted, *(rf"{path}(?=\.|$)" if path in clash else path for path in new)]
