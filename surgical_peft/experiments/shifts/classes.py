"""Shifts of classes: other labels, other subclasses, other shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import SurgicalError
from ...validation import nearest


def read_label_map(label_map: Any, classes: Sequence[str]) -> list[int | None]:
    """The new label of each class; None for classes that are left out.

    Args:
        label_map: a list with an entry for each class, null to leave it out; or a mapping from class names or numbers
            to labels, which leaves out the classes it does not name. None maps each class to its own number.
        classes: the classes' names.

    Raises:
        SurgicalError: not of these forms, of another length, an unknown class, or a label that is no number from 0.

    Example:
        >>> read_label_map({"shirt": 0, "coat": 0, "boot": 1}, ["boot", "coat", "dress", "shirt"])
        [1, 0, None, 0]
    """
    if label_map is None:
        return list(range(len(classes)))
    if isinstance(label_map, Mapping):
        chosen = {class_number("label_map", each, classes): label for each, label in label_map.items()}
        found = [chosen.get(number) for number in range(len(classes))]
    elif isinstance(label_map, list):
        found = label_map
    else:
        raise SurgicalError(f"label_map={label_map!r} is neither a list nor a mapping from classes to labels.")
    if len(found) != len(classes):
        raise SurgicalError(
            f"label_map={label_map} does not fit: it needs {len(classes)} entries, one for each class of the data: "
            f"{', '.join(classes)}."
        )
    for label in found:
        if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
            raise SurgicalError(f"label_map={label_map} does not fit: {label!r} is not a label, i.e. a number from 0.")
    return found


def keep_share(labels: Sequence[int], shares: Mapping[int, float], seed: int) -> list[int]:
    """Places of the examples that are left where only a share of some classes is kept.

    Args:
        labels: the class of each example.
        shares: what is kept of a class, more than 0 to 1; of the others everything is kept. At least one example of
            each class is left.
        seed: says which ones.

    Example:
        >>> keep_share([0, 1, 0, 1], {1: 0.5}, seed=0)
        [0, 1, 2]
    """
    everything = np.asarray(labels)
    kept = np.ones(len(everything), dtype=bool)
    for number, share in shares.items():
        places = np.flatnonzero(everything == number)
        left = max(1, round(share * len(places)))
        kept[np.random.default_rng((seed, number)).permutation(places)[left:]] = False
    return np.flatnonzero(kept).tolist()


def class_number(key: str, given: Any, classes: Sequence[str]) -> int:
    """The number of a class that the recipe's `key` gives by name or number; where names are numbers, by name.

    Example:
        >>> class_number("imbalance", 5, ["1", "3", "5"])
        2
    """
    name = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    if name in classes:
        return list(classes).index(name)
    are_numbers = all(other.removeprefix("-").isdecimal() for other in classes)
    if name is not given and not are_numbers and 0 <= given < len(classes):
        return int(given)
    numbers = "" if are_numbers else f", or 0 to {len(classes) - 1}"
    raise SurgicalError(
        f"{key}: there is no class {given!r}: {nearest(str(given), classes)}There are: {', '.join(classes)}{numbers}."
    )
