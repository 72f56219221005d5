"""Checks of settings, and names from YAML or the command line turned into the functions that they stand for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from types import ModuleType
from typing import Any

from .errors import SurgicalError


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'? "` if `known` has something like `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def resolve(name: str, package: ModuleType) -> Callable[..., Any]:
    """The function that `name` stands for: one that `package` exports, or the user's own as `"package.module:name"`.

    Raises:
        SurgicalError: no such name (the message gives the nearest one and lists all), or not of a function.

    Example:
        >>> resolve("rgn", criteria)
        <function rgn at 0x...>
    """
    kind = package.__name__.rpartition(".")[2]
    if name in package.__all__:
        return getattr(package, name)
    if ":" in name:
        if not is_reference(name):
            raise SurgicalError(f"{name!r} cannot be imported: write 'package.module:name'.")
        module_name, _, attribute = name.partition(":")
        try:
            value = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise SurgicalError(f"{name!r} cannot be imported: {error}. Write 'package.module:name'.") from error
        if not callable(value):
            raise SurgicalError(f"{name!r} is a {type(value).__name__}, not a function.")
        return value
    raise SurgicalError(
        f"{name!r} is none of the {kind}{': ' + hint if (hint := nearest(name, package.__all__)) else '. '}There are: "
        f"{', '.join(package.__all__)}; your own as 'package.module:name'."
    )


def is_reference(text: str) -> bool:
    """True for `package.module:name`, by which code of the user's own is named.

    Example:
        >>> [is_reference(text) for text in ("mine.rates:warm", "lisa", "0:3")]
        [True, False, False]
    """
    module, _, attribute = text.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call_with_options(
    key: str,
    name: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *more: str,
    gives: type = object,
) -> Any:
    """Call a function with options from a recipe.

    Args:
        key: of the options in the recipe, for the message.
        name: of the function, as the recipe has it.
        function: to call.
        options: its arguments.
        more: further names that are allowed beside its arguments.
        gives: what the function has to return.

    Raises:
        SurgicalError: options that do not fit, in a message that gives the nearest name and lists all; or the function
            returned something else.

    Example:
        >>> call_with_options("policy_options", "lisa", policies.lisa, {"every": 5}, gives=Policy)
    """
    signature = inspect.signature(function)
    known = [*signature.parameters, *more]
    try:
        signature.bind_partial(**options)  # an unknown option is named before a missing one
        signature.bind(**options)
        made = function(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, SurgicalError):
            raise
        wrong = next((nearest(str(option), known) for option in options if option not in known), "")
        raise SurgicalError(
            f"{key}: {dict(options)} does not fit {name}: {error}. {wrong[:1].upper()}{wrong[1:]}{name} has: "
            f"{', '.join(known)}."
        ) from error
    if not isinstance(made, gives):
        raise SurgicalError(
            f"{key}: {name!r} makes a {type(made).__name__}, not a {gives.__name__}: it has to return one."
        )
    return made


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a bool, a text or None is not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_choice(owner: str, name: str, value: Any, known: Collection[Any]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        SurgicalError: it is not; the message gives the nearest one and lists all.

    Example:
        >>> check_choice("lisa", "state_policy", "keep", ("keep", "reset"))
    """
    if value not in list(known):  # it may be no key
        hint = nearest(value, [word for word in known if isinstance(word, str)]) if isinstance(value, str) else ""
        raise SurgicalError(
            f"{name}={value!r} is unknown to {owner}{': ' + hint if hint else '. '}There are: "
            f"{', '.join(map(str, known))}."
        )


def check_count(
    owner: str, name: str, value: Any, what: str, *, at_least: float = 1, at_most: float = sys.maxsize
) -> None:
    """Refuse what is not a whole number within the bounds; `what` says what is counted.

    Raises:
        SurgicalError: it is not.

    Example:
        >>> check_count("lisa", "num_blocks", 2, "blocks trained at once")
    """
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        low = f" from {at_least}" if math.isfinite(at_least) else ""
        high = f" to {at_most}" if at_most < sys.maxsize else " upwards" if low else ""
        raise SurgicalError(f"{name}={value!r} is out of range for {owner}: {what}, a whole number{low}{high}.")


def check_number(
    owner: str,
    name: str,
    value: Any,
    what: str = "a finite number",
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Refuse what is no finite number, or not within the bounds.

    Raises:
        SurgicalError: it is not.

    Example:
        >>> check_number("layer_decay", "decay", 0.75, above=0, at_most=1)
    """
    if not (is_number(value) and above < value < below and at_least <= value <= at_most):
        bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        limits = "".join(f", {word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise SurgicalError(f"{name}={value!r} is out of range for {owner}: {what}{limits}.")


def check_cadence(owner: str, every: Any, words: Sequence[str] = ()) -> None:
    """Refuse an `every` that is neither one of the words nor a number of steps.

    Raises:
        SurgicalError: it is not.

    Example:
        >>> check_cadence("auto_rgn", "epoch", ("step", "epoch"))
    """
    if isinstance(every, str):
        check_choice(owner, "every", every, (*words, "a number of steps"))
    else:
        check_count(owner, "every", every, f"{' or '.join(map(repr, words))} or steps" if words else "steps")


def check_rates(owner: str, rates: Any) -> tuple[float, ...]:
    """A grid of learning rates, from the lowest to the highest.

    Raises:
        SurgicalError: an empty list, something else than finite numbers above 0, or one of them twice.

    Example:
        >>> check_rates("lora", [3e-3, 1e-3])
        (0.001, 0.003)
    """
    if not isinstance(rates, list | tuple) or not rates:
        raise SurgicalError(f"{owner}: rates: {rates!r} is no grid of learning rates, such as [1e-3, 3e-3].")
    for rate in rates:
        check_number(owner, "rates", rate, "learning rates such as [1e-3, 3e-3], each a finite number", above=0)
    if len(set(rates)) != len(rates):
        raise SurgicalError(f"{owner}: rates: {rates!r} has one of them twice: name it once.")
    return tuple(sorted(map(float, rates)))


def immutable(value: Any) -> Any:
    """A setting that nobody changes later: a list, set or range becomes a tuple, all else stays as it is."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
