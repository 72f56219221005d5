"""Other tools that train a choice made here: one function a file, which writes what that tool reads.

A target is a function of a `Choice` that gives an `Emission`: a text, and the names of the parameters that the tool
trains by it, by the tool's own rule. Where it cannot say a choice, it gives the nearest that it can, which
`export.emit.emit` refuses.
"""

from __future__ import annotations

from .axolotl import axolotl
from .choice import Choice as Choice
from .choice import Emission as Emission
from .llama_factory import llama_factory
from .ms_swift import ms_swift
from .trl import trl
from .unsloth import unsloth
from .verl import verl

__all__ = ["axolotl", "llama_factory", "ms_swift", "trl", "unsloth", "verl"]
