"""The one exception of the package, and what its messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LONGEST = 4000  # characters of a message
_MEMORY = "free memory, or take smaller batches (per_device_train_batch_size) or shorter texts (max_length)"
_DISK = "see that the disk is not full and can be written to, and that the network is there"
_OF_MACHINE = {  # words of errors that have no class of their own, and what to do
    "can't start new thread": "end other processes, or allow more (ulimit -u)",
    "DataLoader worker (pid": "a process that loads data was ended, often for want of memory: free some, or load in "
    "this process (dataloader_num_workers: 0)",
    "(os error": _DISK,  # safetensors
    "PytorchStreamWriter failed": _DISK,  # torch.save
    "unexpected pos": _DISK,
    "iostream error": _DISK,
}


class SurgicalError(ValueError):
    """Raised for a wrong block, score, recipe or checkpoint.

    The message holds the value given, what is wrong with it, what to do, and what exists. One that a huge value makes
    long is cut in the middle.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _LONGEST:
            left, right = text[: _LONGEST - 500], text[-400:]
            text = f"{left} ... ({len(text) - len(left) - len(right):,} characters more) ... {right}"
        super().__init__(text)


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none.

    Example:
        >>> reason_of(AssertionError())
        'AssertionError'
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def first_of(names: Iterable[Any], most: int = 5) -> str:
    """Names for a message: the first ones, and whether there are more.

    Example:
        >>> first_of(range(9), most=3)
        '0, 1, 2, ...'
    """
    names = list(map(str, names))
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def machine_fault(error: BaseException) -> str | None:
    """What to do about an error that is of the machine, not of what was asked; None if it is another one.

    That is what may be otherwise at the next try: a disk, a network, a lack of memory, a process that was killed.

    Example:
        >>> machine_fault(MemoryError())
        'free memory, or take smaller batches (per_device_train_batch_size) or shorter texts (max_length)'
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return _MEMORY
    if isinstance(error, Exception) and should_reduce_batch_size(error):  # the memory of a device, or of the CPU
        return _MEMORY
    if isinstance(error, OSError):
        return _DISK
    told = [remedy for words, remedy in _OF_MACHINE.items() if words in str(error)]
    if told:
        return told[0]
    return machine_fault(error.__cause__) if error.__cause__ is not None else None
