"""What a user says, and what `adapter_config.json` holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

from peft.config import PeftConfig

from .errors import SurgicalError
from .files import write_text
from .selection import Selection


class SurgicalPeftType(str, Enum):
    """Our entry in PEFT's mappings. The name equals the value: PEFT looks methods up by the string in the file."""

    SURGICAL = "SURGICAL"


@dataclass
class SurgicalConfig(PeftConfig):
    """Fully tune the chosen blocks of a model and leave the rest as it was.

    Source: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (arXiv 2210.11466).

    Args:
        blocks: which blocks: an index, slice or name as a string, or a list of them (see
            [`BlockMap.parse`][surgical_peft.BlockMap.parse]); `"auto"` lets
            [`get_surgical_model`][surgical_peft.get_surgical_model] choose. Saved as the final block names.
        target_modules: with `blocks`, tune only these modules inside them; alone, PEFT's own meaning (names that
            end so, or a regular expression for the whole name) for any type of module.
        exclude_modules: modules to leave out, matched as `target_modules`.
        modules_to_save: newly initialised modules, such as a new head, to train and save as well.
        criterion: for `blocks="auto"`, what scores the blocks: a name or a function; default is `probe`, which
            has the lowest regret on the shifts that criteria were developed on (benchmarks/criteria).
        num_blocks: for `blocks="auto"`, how many to take; by default, short joint trainings decide it.
        frozen_eval: keep everything that is not tuned in eval mode while training (no dropout, still BatchNorm
            statistics), as in the paper's code. PEFT's default elsewhere is train mode. A model wrapped by
            transformers' own `add_adapter` has no place for this: there, `train()` is for all modules.
        selection: filled in by the library: how the blocks were chosen. A record; loading never reads it.

    Raises:
        SurgicalError: nothing selected, or two answers to one question. Names are checked against the model when
            it is wrapped.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(model, SurgicalConfig(blocks=[0, 1]))
    """

    blocks: Optional[Union[int, str, list[Union[int, str]]]] = field(
        default=None, metadata={"help": "Blocks to tune: indices, slices, names, 'all' or 'auto'."}
    )
    target_modules: Optional[Union[str, list[str]]] = field(
        default=None, metadata={"help": "Modules to tune: inside the blocks, or anywhere if no blocks are given."}
    )
    exclude_modules: Optional[Union[str, list[str]]] = field(
        default=None, metadata={"help": "Modules to leave out, matched as target_modules."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "New modules, such as a head, to train and save as well."}
    )
    criterion: Optional[Union[str, Callable[..., float]]] = field(
        default=None, metadata={"help": "For blocks='auto': what scores the blocks."}
    )
    num_blocks: Optional[int] = field(default=None, metadata={"help": "For blocks='auto': how many blocks to take."})
    frozen_eval: bool = field(default=True, metadata={"help": "Keep all that is not tuned in eval mode."})
    selection: Optional[dict[str, Any]] = field(default=None, metadata={"help": "Record of how blocks were chosen."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SurgicalPeftType.SURGICAL
        if isinstance(self.blocks, tuple | set):
            self.blocks = list(self.blocks)
        if isinstance(self.target_modules, tuple | set):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, tuple | set):
            self.exclude_modules = sorted(self.exclude_modules)
        if isinstance(self.modules_to_save, str):  # PEFT would go through its letters
            self.modules_to_save = [self.modules_to_save]
        if self.blocks is None and self.target_modules is None:
            raise SurgicalError(
                "SurgicalConfig selects nothing: give blocks=[0, 1] (indices, slices or names), blocks='auto', or "
                "target_modules=['name']. BlockMap.find(model).names lists the blocks of a model."
            )
        if self.blocks == [] or self.blocks == "":
            raise SurgicalError(f"blocks={self.blocks!r} selects nothing: name at least one block, or 'all'.")
        if self.target_modules == [] or self.target_modules == "":
            raise SurgicalError(
                f"target_modules={self.target_modules!r} selects nothing: name at least one module, or leave it out "
                "to tune whole blocks."
            )
        auto_only = {"criterion": self.criterion, "num_blocks": self.num_blocks}
        given = [name for name, value in auto_only.items() if value is not None]
        if given and self.blocks != "auto":
            raise SurgicalError(
                f"{' and '.join(given)} only speak to blocks='auto', but blocks={self.blocks!r} already says which "
                "blocks to tune: drop one of the two."
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise SurgicalError(f"num_blocks={self.num_blocks} is out of range: tune at least 1 block.")

    @classmethod
    def from_selection(cls, selection: Selection, **kwargs: Any) -> SurgicalConfig:
        """The config that tunes a [`Selection`][surgical_peft.Selection], with the record of how it came about.

        Example:
            >>> SurgicalConfig.from_selection(top_k(score_blocks(model, dataloader), 2))
        """
        return cls(blocks=list(selection.blocks), selection=selection.record, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and let the model card beside it begin with the import that loading needs."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "README.md"
        if path.exists() and _HOW_TO_LOAD not in (text := path.read_text(encoding="utf-8")):
            header = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
            at = header.end() if header else 0
            write_text(path, text[:at] + _HOW_TO_LOAD + text[at:])


_HOW_TO_LOAD = """
**`pip install surgical-peft`, and `import surgical_peft` before loading:**

```python
import surgical_peft  # registers the method; without it PEFT stops with KeyError: 'SURGICAL'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

"""
