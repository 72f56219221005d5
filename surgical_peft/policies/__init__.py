"""Learning rates and frozen blocks during training.

Each name is a policy's class under the name that YAML and the command line have for it, or a function that gives one
with settings of its own (`auto_rgn_paper`, `discriminative`, `lp_ft`, `stages`, `two_stage`).
"""

from __future__ import annotations

from .auto_rgn import AutoRGN as auto_rgn
from .auto_rgn import auto_rgn_paper
from .auto_snr import AutoSNR as auto_snr
from .badam import Badam as badam
from .bvg_ls import BVGLS as bvg_ls
from .gradual_unfreezing import GradualUnfreezing as gradual_unfreezing
from .grass import Grass as grass
from .layer_decay import LayerDecay as layer_decay
from .layer_decay import discriminative
from .lisa import Lisa as lisa
from .lp_ft import lp_ft
from .misa import Misa as misa
from .progressive_freezing import ProgressiveFreezing as progressive_freezing
from .sample_by_score import SampleByScore as sample_by_score
from .stages import Stage as Stage
from .stages import stages
from .static import Static as static
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
    "grass",
    "layer_decay",
    "lisa",
    "lp_ft",
    "misa",
    "progressive_freezing",
    "sample_by_score",
    "stages",
    "static",
    "two_stage",
]
