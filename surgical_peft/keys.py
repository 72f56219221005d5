"""Which weights of a tuned module an adapter's file holds, and how PEFT and transformers are told their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


class LoadMap(dict[str, str]):
    """Saved names and the names in the wrapper. Iterating over it gives nothing; `items()` and the like do.

    transformers asks for the items, and applies them after its own renames of modules while it loads. PEFT iterates,
    and would look each name up as it is, which for an old name ends in a KeyError; it finds nothing to do here, and
    `SurgicalModel._remap_adapter_state_dict_for_load` does it right after.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(())


def saved_keys(module: nn.Module, tuned: Collection[str] | None) -> list[str]:
    """What of `module.state_dict()` an adapter saves that tunes the parameters `tuned` of it (None for all).

    Example:
        >>> saved_keys(nn.BatchNorm1d(2), ["bias"])
        ['bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    keys = list(module.state_dict())
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    untuned = names - set(names if tuned is None else tuned)
    if untuned:  # statistics belong to the weights beside them
        homes = {name.rpartition(".")[0] for name in names - untuned}
        keys = [key for key in keys if key not in untuned and (key in names or key.rpartition(".")[0] in homes)]
    return keys
