"""Hands a tuned model over: to PEFT alone, to transformers alone, as a delta, as a LoRA, to the Hub."""

from __future__ import annotations

from .export import export_to_peft

__all__ = ["export_to_peft"]
