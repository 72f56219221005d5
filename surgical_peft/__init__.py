"""Fully fine-tune only the blocks that new data need; a PEFT method (`peft_type` SURGICAL).

Importing the package registers the method with PEFT, and has `Trainer.train` end what a policy began.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `surgical-peft --help` answers without torch, transformers and PEFT, which take seconds to import: where that command
# started the process, the public names come with the first that is used (`cli.main.Command` is the one that does so).
_OF_COMMAND = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem == "surgical-peft" or (
    "-m",
    __name__,
) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)

if TYPE_CHECKING or not _OF_COMMAND:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        return getattr(import_module(f"{__name__}.api"), name)
