"""The tokenizer or image processor that goes with a model: what `pipeline` and `predict` read inputs by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import file_of

# Without one of these, AutoTokenizer makes an empty tokenizer for some models.
_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def processor_of(*names: str | Path | None) -> Any | None:
    """The processor, tokenizer or image processor in the first of these folders or Hub repositories that has one.

    Example:
        >>> processor_of("runs/label_map/adapter", "recipes/fashion_mnist/vit")
        ViTImageProcessorPil {...}
    """
    from transformers import AutoProcessor  # slow to import

    for name in filter(None, names):
        try:
            if any(file_of(str(name), file) for file in _FILES):
                return AutoProcessor.from_pretrained(str(name), trust_remote_code=False)
        except (OSError, ValueError, ImportError):  # not at hand, damaged, or with code that is not ours to run
            continue
    return None


def fits_pipeline(model: Any, processor: Any) -> bool:
    """True if transformers' `pipeline` can serve a model: it makes three channels of every image."""
    return processor is not None and getattr(getattr(model, "config", None), "num_channels", 3) == 3
