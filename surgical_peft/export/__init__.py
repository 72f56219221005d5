"""Exports of a tuned model: for PEFT alone, for transformers alone, as a delta, as a LoRA, to the Hub."""

from __future__ import annotations

from .export import export_to_peft

__all__ = ["export_to_peft"]
