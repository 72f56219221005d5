"""`Choice`, what is to be trained of which model, and `Emission`, how another tool is told so."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from functools import cached_property

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ...blocks.block_map import blocks_in_words
from ...blocks.module_lists import parents, within
from ...errors import SurgicalError, first_of
from ...tuner.config import SurgicalConfig
from ...tuner.loading.saved_adapter import heads_of
from ...tuner.target_modules import modules_to_tune
from ...tuner.tensors.row_names import split_row
from ...tuner.tensors.tuned_tensors import TensorMap, united


@dataclass(frozen=True)
class Choice:
    """The parameters to train, and the model that they are of.

    Attributes:
        model: of transformers; it may be on the meta device.
        source: its folder or Hub id.
        config: by which our tuner trains them, with the blocks by their names.
        parameters: their names as `model.named_parameters()` has them, tied weights once.
    """

    model: nn.Module
    source: str
    config: SurgicalConfig
    parameters: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, source: str, config: SurgicalConfig) -> Choice:
        """The choice that `config` makes in `model`; both are left as they are.

        Raises:
            SurgicalError: blocks or modules that the model does not have.

        Example:
            >>> sorted(Choice.of(llama, "my-llama", SurgicalConfig(blocks=["final_norm"])).parameters)
            ['model.norm.weight']
        """
        settled, recorded = copy.copy(config), config.tuned_modules or {}
        tensors = TensorMap.find(model)
        chosen = tensors.chosen(united(modules_to_tune(model, settled), recorded))
        if rows := [name for name in chosen if split_row(name)]:
            raise SurgicalError(
                f"other tools train whole tensors, and this choice has single experts ({first_of(rows, most=2)}): the "
                "nearest that they can is all experts of a block, target_modules=['experts']."
            )
        paths = [path for path, _ in model.named_modules()]
        saved = heads_of(settled, paths)
        names = [name for name, _ in model.named_parameters()]
        trained = frozenset(name for name in names if name in chosen or within(name, saved))
        return cls(model, source, settled, trained)

    @property
    def names(self) -> list[str]:
        """The names of all parameters of the model, tied weights once."""
        return [name for name, _ in self.model.named_parameters()]

    @cached_property
    def paths(self) -> list[str]:
        """The largest modules that are trained whole, with a dot at their end, and the parameters beside them.

        Example:
            >>> Choice.of(llama, "my-llama", SurgicalConfig(blocks=["0", "final_norm"])).paths
            ['model.layers.0.', 'model.norm.']
        """
        mixed = {parent for name in self.names if name not in self.parameters for parent in parents(name)}
        paths: dict[str, None] = {}
        for name in self.names:
            if name in self.parameters:
                whole = [parent for parent in parents(name) if parent not in mixed]
                paths[f"{whole[-1]}." if whole else name] = None
        return list(paths)

    @property
    def pattern(self) -> str:
        """A regular expression without backslashes that `re.match` finds in the names of what is trained."""
        return f"^(?:{'|'.join(literal(path, '[.]') for path in self.paths)})"

    @property
    def in_words(self) -> str:
        """What is chosen, for a message or a comment."""
        blocks = self.config.blocks
        words = blocks_in_words(map(str, blocks)) if isinstance(blocks, list) else ""
        inside = self.config.target_modules
        return ", ".join([words] * bool(words) + [f"target_modules {inside}"] * bool(inside))

    def check_weights_of_language_model(self, tool: str) -> None:
        """Refuse what a tool that trains whole weights of language models cannot take.

        Raises:
            SurgicalError: a model of another kind, or LoRA beside the chosen weights.
        """
        self.check_language_model(tool)
        if self.config.lora is not None:
            raise SurgicalError(
                f"{tool} trains chosen weights or LoRA, and this choice is both: take --for trl, with our config."
            )

    def check_language_model(self, tool: str) -> None:
        """Refuse a model that writes no text.

        Raises:
            SurgicalError: it is of another kind.
        """
        known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        known |= {name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() if isinstance(name, str)}
        if type(self.model).__name__ not in known:
            raise SurgicalError(
                f"{tool} trains language models, with or without images, and {self.source!r} is a "
                f"{type(self.model).__name__}: train it here, or with transformers' Trainer."
            )

    def header(self, tool: str, *notes: str) -> str:
        """Comments for the top of a file: which tool, of which version, what is chosen; each begins with `#`."""
        count = sum(p.numel() for n, p in self.model.named_parameters() if n in self.parameters)
        kind = f"{type(self.model).__name__}, names as in transformers {transformers.__version__}"
        lines = [f"For {tool}.", f"Trains {self.in_words}: {count:,} parameters of {kind}.", *notes]
        return "".join(f"# {' '.join(line.split())}\n" for line in lines)


@dataclass(frozen=True)
class Emission:
    """A choice as another tool reads it, and what that tool will make of it.

    Attributes:
        text: of a file.
        file: a name for it.
        settings: those of the text that make the choice, in one line.
        trained: the names of the parameters that the tool trains by these settings, by its own rule.
    """

    text: str
    file: str
    settings: str
    trained: frozenset[str]


def literal(path: str, dot: str) -> str:
    """A pattern for names that begin with a module's path, or for the name of a parameter; without backslashes.

    Example:
        >>> literal("model.layers.1.", "[.]"), literal("model.scale", "[.]")
        ('model[.]layers[.]1[.]', 'model[.]scale$')
    """
    strange = re.sub(r"[\w.-]", "", path)
    if strange:
        raise SurgicalError(f"the parameter {path!r} has {strange[0]!r} in its name, which no pattern can be sure of.")
    return path.replace(".", dot) + "$" * (not path.endswith("."))


def quoted(text: str) -> str:
    """A string of JSON, YAML and Python at once."""
    return json.dumps(text)
