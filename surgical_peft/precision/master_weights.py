"""32-bit masters of 16-bit weights: an optimizer steps on them, and the model runs on what they round to.

Adam's steps at rates of 1e-3 and less are smaller than the distance between two bfloat16 numbers near 1 and vanish in
rounding. transformers 5 loads a bfloat16 checkpoint as bfloat16.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .float16_gradients import keep_in_float32, let_go
from .weight_versions import begin_alike, local, version

KEY = "master_weight"  # in a weight's optimizer state, beside what the optimizer keeps there
Place = tuple[list[Tensor], int, Tensor]  # a group's parameters, the position among them, the weight that is there


class MasterWeights:
    """Makes an optimizer step on float32 masters of its 16-bit weights, and round them to the weights.

    Outside a step the optimizer's groups hold the model's own parameters, so whatever clips or scales gradients,
    freezes weights or looks for parameters finds them. A master is part of its weight's optimizer state: it is saved,
    loaded, offloaded and dropped with it, and made anew where there is none. Where something else has changed a weight
    since the last step, its master follows.

    Memory: 4 bytes for each tuned 16-bit weight, 4 more for its gradient during a step, and the optimizer's own
    numbers are float32. Gradients of float16 weights are float32, without which they cannot be unscaled.

    Raises:
        SurgicalError: float16 weights under several processes, or with a torch that cannot keep their gradients in
            float32.

    Source: mixed precision training, Micikevicius et al. 2018 (arXiv 1710.03740), section 3.1.

    Example:
        >>> masters = MasterWeights(optimizer)
        >>> optimizer.register_step_post_hook(masters.give_back)  # before hooks that look for the weights
        >>> optimizer.register_step_pre_hook(masters.lend)  # after them
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._lent: list[tuple[list[Tensor], int, Tensor, Tensor]] = []  # places, with their masters
        self._stand_ins: list[tuple[list[Tensor], int, Tensor, Tensor]] = []
        self._read: dict[int, Tensor] = {}  # masters that are being loaded, by the weight's number
        self._rounded: dict[int, tuple[int, int]] = {}  # the version of each weight, by id, since its last step
        self.look_after(optimizer, optimizer.param_groups)
        optimizer.register_load_state_dict_post_hook(self.loaded)
        optimizer.master_weights = self  # type: ignore[attr-defined]
        optimizer.__class__ = _with_masters(type(optimizer))  # type: ignore[arg-type]  # classes have a hash

    def look_after(self, optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
        """Keep the gradients of these groups in a precision that can be unscaled, while the optimizer lives."""
        half = [weight for group in groups for weight in group["params"] if weight.dtype == torch.float16]
        keep_in_float32(half)
        weakref.finalize(optimizer, let_go, half).atexit = False

    @torch.no_grad()
    def lend(self, optimizer: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Put the masters in the places of the weights; a hook before the step."""
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        self._put_in(optimizer, lambda weight: weight.grad is not None or (closure and weight.requires_grad))
        self._pass_gradients()
        if closure is None or not self._lent:
            return None
        return (optimizer,), {**kwargs, "closure": self._on_the_weights(closure)}

    @torch.no_grad()
    def give_back(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        """Round the masters to the weights, and put these in their places; a hook after the step."""
        self._round()
        self._put_back(optimizer)

    def _put_in(self, optimizer: Optimizer, which: Callable[[Tensor], Any]) -> None:
        for params, at, weight in coarse_places(optimizer):
            if which(weight):
                state = optimizer.state.pop(weight, {})
                master = state.pop(KEY, None)
                if master is None:
                    master = weight.detach().float()
                    state = {key: _as_float32(value, weight) for key, value in state.items()}
                params[at] = master
                if state:  # optimizers take an empty one for a weight that they see for the first time
                    optimizer.state[master] = state
                self._lent.append((params, at, weight, master))
        self._follow()

    def _put_back(self, optimizer: Optimizer) -> None:
        for params, at, weight, master in self._lent:
            params[at], master.grad = weight, None
            optimizer.state[weight] = {**optimizer.state.pop(master, {}), KEY: master}
        self._lent.clear()

    def _pass_gradients(self) -> None:
        for _, _, weight, master in self._lent:
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)

    def _round(self) -> None:
        if self._lent:
            weights, masters = self._pairs()
            torch._foreach_copy_(weights, masters)
        for _, _, weight, _ in self._lent:
            self._rounded[id(weight)] = version(weight)

    def _follow(self) -> None:
        """Update the masters of weights that something else has changed."""
        changed = [place for place in self._lent if self._rounded.get(id(place[2])) != version(place[2])]
        if not changed and self._lent and not begin_alike(*self._pairs()):
            changed = self._lent
        for _, _, weight, master in changed:
            coarse, fine = local(weight), local(master)
            fine.copy_(torch.where(fine.to(coarse.dtype) == coarse, fine, coarse.float()))

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and their masters, of what is sharded this process's share."""
        return [local(weight) for _, _, weight, _ in self._lent], [local(master) for *_, master in self._lent]

    def _on_the_weights(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of a step, which runs the model and looks at the weights and their gradients."""

        def evaluate() -> Any:
            with torch.no_grad():
                self._round()
            for params, at, weight, _ in self._lent:
                params[at] = weight
            loss = closure()
            for params, at, _, master in self._lent:
                params[at] = master
            self._pass_gradients()
            return loss

        return evaluate

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """Around a step, hooks and all."""
        if hasattr(optimizer, "check_overrides"):
            _note_overrides(optimizer)
        try:
            yield
        finally:
            self._put_back(optimizer)  # a step that raised got no hook after it

    @contextmanager
    def all_lent(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, all masters stand in the places of the weights; rounded afterwards."""
        with torch.no_grad():
            self._put_in(optimizer, lambda weight: weight in optimizer.state)
        try:
            yield
        finally:
            self.give_back(optimizer)

    @contextmanager
    def loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, what is loaded becomes float32: optimizers load a state in its weight's dtype.

        Given is the state without the masters: a weight that has nothing else is new to an optimizer.
        """
        for params, at, weight in coarse_places(optimizer):
            params[at] = torch.empty(0, dtype=torch.float32, device=weight.device)
            self._stand_ins.append((params, at, weight, params[at]))
        states = state_dict["state"]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]  # FSDP2: names
        self._read = {at: states[key][KEY] for at, key in enumerate(keys) if KEY in states.get(key, {})}
        try:
            yield {**state_dict, "state": without_masters(states)}
        finally:
            self._put_weights(optimizer)

    def _put_weights(self, optimizer: Optimizer) -> None:
        for params, at, weight, stand_in in self._stand_ins:
            params[at] = weight
            if stand_in in optimizer.state:
                optimizer.state[weight] = optimizer.state.pop(stand_in)
        self._stand_ins.clear()

    def loaded(self, optimizer: Optimizer) -> None:
        """Put the weights and the masters in their places; before the hooks of a policy, which look for them."""
        self._put_weights(optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for at, master in self._read.items():
            optimizer.state[weights[at]][KEY] = master.to(weights[at].device, torch.float32, copy=True)
        self._read = {}


def without_masters(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states as the optimizer itself would have them."""
    rest = {at: {k: v for k, v in state.items() if k != KEY} for at, state in states.items()}
    return {at: state for at, state in rest.items() if state}


def is_16_bit(weight: Tensor) -> bool:
    """True if small steps vanish in rounding: bfloat16, float16, and what is coarser.

    Example:
        >>> is_16_bit(torch.zeros(2, dtype=torch.bfloat16))
        True
    """
    return weight.is_floating_point() and weight.dtype.itemsize < 4


def rounds_stochastically(optimizer: Optimizer) -> bool:
    """True if the optimizer rounds at random, so that small steps add up: torchao's with `bf16_stochastic_round`."""
    settings = {**optimizer.defaults, **vars(optimizer)}
    return any("stochastic" in name and value is True for name, value in settings.items())


def forget_moments(optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
    """Drop the optimizer's state of some weights, except their masters, which hold the weights themselves."""
    for weight in weights:
        state = optimizer.state.pop(weight, {})
        if KEY in state:
            optimizer.state[weight] = {KEY: state[KEY]}


def coarse_places(optimizer: Optimizer) -> Iterator[Place]:
    """The places of 16-bit weights in the groups of an optimizer."""
    for group in optimizer.param_groups:
        for at, weight in enumerate(group["params"]):
            if is_16_bit(weight):
                yield group["params"], at, weight


def _as_float32(value: Any, weight: Tensor) -> Any:
    """What an optimizer made for the weight before it had a master: Adagrad's sums."""
    return value.float() if isinstance(value, Tensor) and value.dtype == weight.dtype else value


def _note_overrides(optimizer: Any) -> None:
    """Tell bitsandbytes the places of weights with settings of their own, which it looks for by `id` in a step."""
    optimizer.check_overrides()
    settings = optimizer.mng.pid2config
    places = {
        (at, number): settings[id(weight)]
        for at, group in enumerate(optimizer.param_groups)
        for number, weight in enumerate(group["params"])
        if id(weight) in settings
    }
    optimizer.mng.index2config = places  # those of other optimizers' groups are no places here


def _copied(cls: type[Optimizer], state: dict[str, Any]) -> Optimizer:
    """An optimizer with masters from what torch keeps in a copy, which is all but the hooks."""
    optimizer = cls.__new__(cls)
    states = state["state"]
    optimizer.__setstate__({**state, "state": defaultdict(dict, without_masters(states))})
    for weight, kept in states.items():
        if KEY in kept:
            optimizer.state[weight][KEY] = kept[KEY]
    masters = MasterWeights(optimizer)
    optimizer.register_step_post_hook(masters.give_back)
    optimizer.register_step_pre_hook(masters.lend)
    return optimizer


@functools.cache
def _with_masters(cls: type[Optimizer]) -> type[Optimizer]:
    """The class of an optimizer with masters: as `cls`, within the contexts of its `master_weights`.

    A class, since schedulers and accelerate want methods.
    """

    def within(context: str, name: str) -> Callable[..., Any]:
        method = getattr(cls, name)

        @functools.wraps(method)  # with torch's mark on a step that calls the hooks
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with getattr(self.master_weights, context)(self):
                return method(self, *args, **kwargs)

        return call

    def load_state_dict(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        with self.master_weights.loading(self, state_dict) as rest:
            cls.load_state_dict(self, rest, *args, **kwargs)
        self.master_weights.loaded(self)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _copied, (cls, self.__getstate__())

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        cls.add_param_group(self, param_group)
        self.master_weights.look_after(self, self.param_groups[-1:])

    contexts = {"step": "stepping"}
    contexts |= {name: "all_lent" for name in ("train", "eval") if hasattr(cls, name)}  # schedule-free: moves weights
    methods: dict[str, Any] = {name: within(context, name) for name, context in contexts.items()}
    methods |= {"load_state_dict": load_state_dict, "add_param_group": add_param_group, "__reduce_ex__": reduce}
    methods |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), methods)
