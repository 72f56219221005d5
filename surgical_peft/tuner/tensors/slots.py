"""A tensor of the base model, the places where it stands, and the tensors that adapters put in its stead.

Objects are exchanged, not values: no number moves, and an autograd graph recorded before stays valid. FSDP2 and
DeepSpeed's ZeRO-3 own the storage of their weights; there each process exchanges the values of its shard.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ...errors import SurgicalError
from .tuned_tensors import put

BASE = "__base__"  # the base model's own set of tensors, as PEFT calls the rows of a batch without an adapter


class Slot:
    """One tensor of the base model: a parameter, or a buffer that is saved.

    Args:
        places: the modules and attributes where it stands, more than one if it is tied.
        keep_base: where the base's tensor stays while another one stands (see
            [`SurgicalConfig`][surgical_peft.SurgicalConfig]); `"packed"`: the base runs without, by quantized weights.

    Attributes:
        standing: the set whose tensor stands in the places now: an adapter's name, or `BASE`.
        own: the set that holds the object which the base model was built with.
        parked: the tensors that do not stand, by set.
        empty: sets on the meta device, whose values are loaded next.
        home: the device of what stands.
    """

    def __init__(self, places: list[tuple[nn.Module, str]], keep_base: str = "device") -> None:
        self.places = places
        self.keep_base = keep_base
        self.standing = BASE
        self.own = BASE
        self.parked: dict[str, Tensor] = {}
        self.empty: set[str] = set()
        self.home = self.here.device

    @property
    def here(self) -> Tensor:
        """The tensor in place."""
        module, name = self.places[0]
        tensor: Tensor | None = module._parameters.get(name)
        tensor = module._buffers.get(name) if tensor is None else tensor
        if tensor is None:
            raise SurgicalError(
                f"{type(module).__name__} has lost its {name}, which an adapter tunes (to pruning, for one): unload "
                "or merge the adapter before you take weights out of modules."
            )
        return tensor

    def __contains__(self, name: str) -> bool:
        return name == self.standing or name in self.parked

    @property
    def adapters(self) -> list[str]:
        """The adapters that have a tensor here."""
        return [name for name in dict.fromkeys([*self.parked, self.standing]) if name != BASE]

    def of(self, name: str) -> Tensor:
        """The tensor of the set `name`."""
        return self.here if name == self.standing else self.parked[name]

    def add(self, adapter: str, like: str = BASE, empty: bool = False, values: Tensor | None = None) -> None:
        """Give `adapter` a tensor with the values of the set `like`, or with `values` where the base has none.

        The first adapter gets the model's own object, so that hooks, ties and optimizers from before see what is
        trained; later ones get new objects with its hooks and attributes. `empty` leaves out the values.
        """
        if self.keep_base == "none":
            self.standing = self.own = adapter
            return
        if is_sharded(self.here):
            self.home = self.here.device  # may have been the meta device before it was sharded
        with gather_params_ctx([self.of(like), self.of(BASE)], modifier_rank=None):  # that ZeRO-3 has dealt out
            if empty:
                self.empty.add(adapter)
                self.parked[adapter] = twin(self.of(self.own), torch.empty_like(self.of(BASE), device="meta"))
            elif self.own == BASE:
                self._take_own(adapter, self.of(like).detach().clone() if like != BASE else values)
            else:
                values = self.of(like).detach() if values is None or like != BASE else values
                values = values.to(self.home, copy=True)
                self.parked[adapter] = twin(self.of(self.own), values)

    def load(self, adapter: str, values: Tensor) -> None:
        """Give `adapter` these values, in the dtype and on the device of what they replace."""
        tensor = self.of(adapter)
        if adapter not in self.empty:
            with torch.no_grad(), gather_params_ctx([tensor], modifier_rank=0):
                tensor.copy_(shard_like(tensor, values) if is_sharded(tensor) else values)
            return
        self.empty.discard(adapter)
        base = self.of(BASE)
        values, trained = values.to(self.home, base.dtype), tensor.requires_grad
        if self.own == BASE:
            self._take_own(adapter, values)
        else:
            self._set(adapter, twin(self.of(self.own), values))
        if isinstance(tensor, nn.Parameter):
            self.of(adapter).requires_grad_(trained)

    def _take_own(self, adapter: str, values: Tensor | None = None) -> None:
        """Hand the model's own object to `adapter`, with its values or others; the base gets a new one."""
        tensor = self.of(BASE)
        kept = tensor.detach()
        if self.keep_base == "packed":
            kept = torch.empty_like(kept, device="meta")
        elif values is None or self.keep_base == "cpu":
            kept = kept.to("cpu" if self.keep_base == "cpu" else kept.device, copy=True)
        self.own = adapter
        if self.standing == BASE and values is None:  # it stays where it is
            self.standing = adapter
            self.parked[BASE] = twin(tensor, kept)
            return
        self._set(BASE, twin(tensor, kept))
        self._set(adapter, tensor if values is None else with_data(tensor, values))

    def stand(self, name: str) -> None:
        """Put the tensor of the set `name` in all places."""
        if name == self.standing:
            return
        here, there = self.here, self.parked[name]
        left = self.standing
        if is_sharded(here) or is_dealt(here):
            del self.parked[name]
            there = _exchange_shards(here, there) if is_sharded(here) else _exchange_dealt(here, there)
            here.requires_grad, there.requires_grad = there.requires_grad, here.requires_grad
            self.parked[left] = there
            self.standing = name
            return
        # accelerate's dispatch_model moves parameters one by one, and knows nothing of what is parked
        home = self.home if left in self.empty or (left == BASE and self.keep_base == "packed") else here.device
        elsewhere = (
            there.device != home and name not in self.empty and not (name == BASE and self.keep_base == "packed")
        )
        lent = elsewhere and name == BASE and self.keep_base == "cpu" and self.own != BASE
        if elsewhere:
            values = there.detach().to(home)
            there = twin(there, values) if lent else with_data(there, values)
        if not lent:
            del self.parked[name]
        self._put(there)
        self.standing = name
        if left != BASE or BASE not in self.parked:  # a loan is dropped: the base does not change
            if left == BASE and self.keep_base == "cpu":
                here = with_data(here, here.detach().cpu())
            self.parked[left] = here

    def remove(self, adapter: str) -> None:
        """Drop the tensor of an adapter that does not stand; the base gets the model's own object back."""
        gone = self.parked.pop(adapter)
        self.empty.discard(adapter)
        if self.own == adapter:
            self.own = BASE
            if self.keep_base != "packed" and not is_sharded(self.here) and not is_dealt(self.here):
                base = self.of(BASE).detach()
                self.parked.pop(BASE, None)  # on the CPU, while it was lent
                self._set(BASE, with_data(gone, base).requires_grad_(False))

    def give_back(self, name: str) -> None:
        """For good: the model's own object, with the values of the set `name`, in all places."""
        if is_sharded(self.here) or is_dealt(self.here) or (name == BASE and self.keep_base == "packed"):
            self.stand(name)
            return
        tensor, source = self.of(self.own), self.of(name)
        if source is not tensor or tensor.device != self.home:
            tensor = with_data(tensor, source.detach().to(self.home))
        self._put(tensor)
        self.standing = self.own = name
        self.parked = {}

    def retie(self) -> None:
        """Put what stands in the first place into all others: loaders replace objects, one name at a time."""
        here = self.here
        for module, name in self.places[1:]:
            if (module._parameters if name in module._parameters else module._buffers)[name] is not here:
                put(module, name, here)

    def _set(self, name: str, tensor: Tensor) -> None:
        if name == self.standing:
            self._put(tensor)
        else:
            self.parked[name] = tensor

    def _put(self, tensor: Tensor) -> None:
        for module, name in self.places:
            put(module, name, tensor)


def twin(tensor: Tensor, values: Tensor) -> Tensor:
    """A frozen tensor of the same kind with other values, and the hooks and attributes of `tensor`."""
    if not isinstance(tensor, nn.Parameter):
        return values
    made = nn.Parameter(values, requires_grad=False)
    if not is_dealt(tensor):  # DeepSpeed's attributes are about the one that it deals out
        made.__dict__.update(tensor.__dict__)
    made._backward_hooks = tensor._backward_hooks  # the same dictionary, so that a handle removes a hook from both
    made._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks
    return made


def with_data(tensor: Tensor, values: Tensor) -> Tensor:
    """`tensor` itself with other values, or, where it cannot hold them (meta, subclasses), a new one."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta != values.is_meta:
        return twin(tensor, values).requires_grad_(tensor.requires_grad)
    tensor.data = values
    return tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a `DTensor`, whose storage FSDP2 or tensor parallelism owns."""
    if type(tensor) in (Tensor, nn.Parameter):  # without an import that takes a second
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_like(tensor: Tensor, values: Tensor, sent: bool = False) -> Tensor:
    """This process's shard of whole `values`, as `tensor` is sharded; shards as they are.

    Args:
        sent: by the first process; else every process has the values.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    if isinstance(values, DTensor):
        return values
    device = _local(tensor).device
    whole = values.detach().to(device, tensor.dtype) if not values.is_meta else torch.empty_like(values, device=device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=0 if sent else None)


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def is_dealt(tensor: Tensor) -> bool:
    """True if DeepSpeed's ZeRO-3 has sharded it over the processes."""
    return hasattr(tensor, "ds_id")


def _exchange_shards(here: Tensor, there: Tensor) -> Tensor:
    if not is_sharded(there):  # once; transformers leaves a new head on the meta device in all processes but the first
        there = twin(there, shard_like(here, there, sent=True)).requires_grad_(there.requires_grad)
    # the graph of a forward pass before may hold the storage, and runs backwards when the values are back
    with _unsafe_preserve_version_counter(_local(here)):
        _swap(_local(here), _local(there))
    return there


def _exchange_dealt(here: Any, there: Any) -> Tensor:
    if is_dealt(there):
        for parameter in (here, there):
            parameter.partition()  # small ones are kept whole between steps
        _swap(here.ds_tensor, there.ds_tensor)
    else:  # made after the model was dealt out
        with gather_params_ctx([here], modifier_rank=0):
            _swap(here, there)
    return there


def _swap(one: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
