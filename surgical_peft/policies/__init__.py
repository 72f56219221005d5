"""What learning rates do while training: one function a file, each returns a `Policy`."""

from __future__ import annotations

from .auto_rgn import auto_rgn
from .layer_decay import layer_decay
from .static import static

__all__ = ["auto_rgn", "layer_decay", "static"]
