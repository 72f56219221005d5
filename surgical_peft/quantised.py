"""Chosen modules of a quantised base become float: packed weights cannot be trained."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .errors import SurgicalError


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether this is a quantised weight: an integer, or of a class of the libraries that quantise."""
    number = parameter.is_floating_point() or parameter.is_complex()
    return not number or type(parameter).__module__.startswith(("bitsandbytes.", "torchao."))


def float_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """For each quantised linear layer in `module` its path and a float layer with the same, dequantised weight.

    bitsandbytes (4 and 8 bits), torchao and HQQ, as far as they are installed; PEFT does the arithmetic. The float
    layers take the dtype of the module's other parameters, which is that of the activations around them.

    Raises:
        SurgicalError: packed weights of another kind, or 4-bit ones that a forward pass on the CPU has reordered.
    """
    linear = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear)}
    for path, child in linear.items():
        # bitsandbytes does so at the first pass in eval mode on CPUs with bfloat16 arithmetic. PEFT would read the
        # weights in the usual order, and what bitsandbytes itself turns back (0.50) has its scales mixed up.
        if getattr(getattr(child.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise SurgicalError(
                f"{path or 'the layer'} has 4-bit weights that a forward pass on this CPU has put into another order: "
                "they cannot be made float any more. Load the model anew and choose its blocks before it is run."
            )
    weights = {path: dequantize_module_weight(child) for path, child in linear.items()}
    packed = {path: weight for path, weight in weights.items() if weight is not linear[path].weight}
    rest = {n: p for n, p in module.named_parameters() if not (is_packed(p) and n.rpartition(".")[0] in packed)}
    for name, parameter in rest.items():
        if is_packed(parameter):
            raise SurgicalError(
                f"{name} is packed ({type(parameter).__name__}, {parameter.dtype}) and PEFT cannot dequantise it: "
                "choose other blocks, or load the model with these modules left out of the quantisation."
            )
    dtype = next((parameter.dtype for parameter in rest.values() if parameter.is_floating_point()), None)
    return {path: _float_linear(linear[path], weight, dtype or weight.dtype) for path, weight in packed.items()}


def _float_linear(quantised: nn.Linear, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(quantised.in_features, quantised.out_features, bias=quantised.bias is not None)
    linear.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
    if quantised.bias is not None:
        linear.bias = nn.Parameter(quantised.bias.detach().to(dtype, copy=True))
    return linear.train(quantised.training)


def in_float(module: nn.Module) -> nn.Module:
    """`module` with its quantised layers replaced by float ones; another module if it is such a layer itself."""
    for path, linear in float_layers(module).items():
        if not path:
            return linear
        module.set_submodule(path, linear)
    return module
