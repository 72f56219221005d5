"""The public names; importing them registers the method with PEFT.

It also has `Trainer.train` end what a policy began, and PEFT's model cards keep what ours say.
"""

from __future__ import annotations

from . import criteria, policies, procedures
from .auto import get_surgical_model
from .blocks.block_map import BlockMap
from .diagnosis.doctor import doctor
from .errors import SurgicalError
from .export.adapter_card import keep_cards
from .export.export import export_to_peft
from .optim.callback import SurgicalCallback
from .optim.optimizer import SurgicalOptimizerFactory, create_surgical_optimizer, surgical_optimizer
from .optim.trainer_patch import patch_trainer
from .prefix_cache import cache_prefix
from .scoring.block_scores import BlockScores
from .scoring.score import score_blocks
from .scoring.selection import Selection, above, top_fraction, top_k, within_budget
from .search.run import run_search
from .tuner.config import SurgicalConfig
from .tuner.model import SurgicalModel
from .tuner.register import register

__all__ = [
    "BlockMap",
    "BlockScores",
    "Selection",
    "SurgicalCallback",
    "SurgicalConfig",
    "SurgicalError",
    "SurgicalModel",
    "SurgicalOptimizerFactory",
    "above",
    "cache_prefix",
    "create_surgical_optimizer",
    "criteria",
    "doctor",
    "export_to_peft",
    "get_surgical_model",
    "policies",
    "procedures",
    "run_search",
    "score_blocks",
    "surgical_optimizer",
    "top_fraction",
    "top_k",
    "within_budget",
]

register()
keep_cards()
patch_trainer()
