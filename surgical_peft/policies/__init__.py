"""What learning rates do while training: one function a file, each returns a `Policy`."""

from __future__ import annotations

from .auto_rgn import auto_rgn
from .auto_rgn_paper import auto_rgn_paper
from .auto_snr import auto_snr
from .badam import badam
from .bvg_ls import bvg_ls
from .discriminative import discriminative
from .gradual_unfreezing import gradual_unfreezing
from .layer_decay import layer_decay
from .lisa import lisa
from .lp_ft import lp_ft
from .progressive_freezing import progressive_freezing
from .sample_by_score import sample_by_score
from .stages import Stage as Stage
from .stages import stages
from .static import static
from .two_stage import ClassBalancedLoss as ClassBalancedLoss
from .two_stage import two_stage

__all__ = [
    "auto_rgn",
    "auto_rgn_paper",
    "auto_snr",
    "badam",
    "bvg_ls",
    "discriminative",
    "gradual_unfreezing",
    "layer_decay",
    "lisa",
    "lp_ft",
    "progressive_freezing",
    "sample_by_score",
    "stages",
    "static",
    "two_stage",
]
