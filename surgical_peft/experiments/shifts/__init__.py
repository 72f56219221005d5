"""Shifts of data, to study on purpose: each is deterministic by its seed."""

from __future__ import annotations

from .classes import keep_share as keep_share
from .classes import read_label_map as read_label_map
from .images import CORRUPTIONS as CORRUPTIONS
from .images import contrast as contrast
from .images import corruption as corruption
from .images import gaussian_noise as gaussian_noise
from .texts import casing as casing
from .texts import character_noise as character_noise
