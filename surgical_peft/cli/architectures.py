"""Models without their weights, for commands that only look at names and sizes."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from ..errors import SurgicalError, reason_of


def model_of_config(model: str) -> nn.Module:
    """The architecture of a model folder or Hub id, without its weights (on the meta device).

    Raises:
        SurgicalError: no config of a model there.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SurgicalError(
            f"the model {model!r} cannot be loaded, here or from the Hub: {reason_of(error)}"
        ) from error
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        return architecture(config) if architecture else transformers.AutoModel.from_config(config)
