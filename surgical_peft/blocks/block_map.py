"""The block map: the parameters of `embeddings`, of each repeated layer, of `final_norm` and of `head`.

Everything else in the package asks this map; no other module parses names of parameters or blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby

from torch import nn

from ..errors import SurgicalError
from ..validation import nearest
from .block_spec import BlockGrammar, listed
from .given_layers import as_paths, layers_of_adapters, stacks_at
from .layer_stacks import Stack, find_stacks
from .module_lists import join
from .partition import block_owners, describe_structure, ordered
from .unwrap import bare_parameter_name, unwrap_model

PART = "/"  # between a layer and a part of it


@dataclass(frozen=True)
class BlockMap:
    """Map from the parameters of a model to its blocks: a partition, in the order of execution.

    Attributes:
        names: block names, e.g. `("embeddings", "0", ..., "11", "final_norm", "head")`. With two or more stacks the
            repeated layers carry their stack: `("embeddings", "encoder.0", ..., "decoder.0", ..., "head")`. The stages
            of a hierarchical net are stacks too, whatever its author calls them: `"stages.2.5"` is the sixth layer of
            the third stage, `"stages.2.embeddings"` what leads into that stage, e.g. its downsampling.
        modules: for each block the paths of the largest modules that hold exactly its parameters, as in the bare
            model (no PEFT containers); they may hold weights tied to an earlier block besides. A path that names a
            parameter stands for one that no such module holds.
        stacks: for each stack (`""` when there is only one) its block names, first layer first.
        tied: for the second and further names of tied weights, and the modules that hold them, the block of the first.
        model_name: the class of the model.
        layer_paths: what `from_layers` was given; empty if the layers were found.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> BlockMap.find(ViTModel(ViTConfig(num_hidden_layers=2), add_pooling_layer=False)).names
        ('embeddings', '0', '1', 'final_norm')
    """

    names: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]
    stacks: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    model_name: str
    layer_paths: tuple[str, ...] = ()

    @classmethod
    def find(cls, model: nn.Module) -> BlockMap:
        """Read the block map off `model`, bare or wrapped by PEFT, DDP, FSDP or `torch.compile`.

        Where an adapter in the model was made with `SurgicalConfig(layers=...)`, that says which modules are layers.

        Raises:
            SurgicalError: no list of repeated layers was found; the message lists what was.
        """
        if paths := layers_of_adapters(model):
            return cls.from_layers(model, paths)
        model = unwrap_model(model)
        stacks = find_stacks(model)
        if not stacks:
            raise SurgicalError(
                f"no repeated blocks found in {type(model).__name__}: none of its lists (nn.ModuleList, "
                f"nn.Sequential) is evidently one of layers. {describe_structure(model)} Say which are the layers: "
                "SurgicalConfig(layers='path.of.the.list', blocks=[...]); in Python, what takes blocks= takes "
                "BlockMap.from_layers(model, 'path.of.the.list'). Or choose modules by name: "
                "SurgicalConfig(target_modules=[...])."
            )
        return cls._of(model, stacks, ())

    @classmethod
    def from_layers(cls, model: nn.Module, layers: str | Sequence[str]) -> BlockMap:
        """The block map of a model whose repeated layers you name, since `find` cannot guess them or guesses others.

        What is no layer is divided as by `find`: embeddings, final norm and head, by where it is declared.

        Args:
            model: bare or wrapped.
            layers: the path of a list in the bare model (`nn.ModuleList`, `nn.Sequential`, `nn.ModuleDict`), whose
                members are the layers; or a pattern for the layers themselves, where `*` stands for any part of one
                name: `"layer*"` for `layer1`, `layer2`, ..., `"steps.*.body"` for one module of each step. A list of
                such paths makes a stack of each, in the order in which they run; the stacks are named by what tells
                their paths apart.

        Raises:
            SurgicalError: a path that the model does not have, or that names no list; a list without parameters;
                layers that lie in one another.

        Example:
            >>> BlockMap.from_layers(model, "body.layer*").names
            ('embeddings', '0', '1', '2', 'head')
        """
        model, paths = unwrap_model(model), as_paths(layers)
        return cls._of(model, stacks_at(model, paths), paths)

    @classmethod
    def _of(cls, model: nn.Module, stacks: list[Stack], paths: tuple[str, ...]) -> BlockMap:
        owners, tied = block_owners(model, stacks)
        names = ordered(set(owners.values()), stacks)
        modules = {block: tuple(path for path, owner in owners.items() if owner == block) for block in names}
        layers = {
            stack.label: tuple(join(stack.label, str(at)) for at in range(len(stack.layers))) for stack in stacks
        }
        return cls(names, modules, layers, tied, type(model).__name__, paths)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The repeated layers of all stacks, in the map's order; of a divided map their parts.

        Example:
            >>> blocks.layers
            ('0', '1')
        """
        layers = {name for stack in self.stacks.values() for name in stack}
        return tuple(name for name in self.names if name in layers)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """The blocks that are heads."""
        return tuple(name for name in self.names if kind_of(name) == "head")

    @cached_property
    def poolers(self) -> tuple[str, ...]:
        """The heads that are only a pooler, as in a bare encoder: a loss on the hidden states does not reach them."""
        return tuple(name for name in self.heads if all("pool" in path for path in self.modules[name]))

    @cached_property
    def depths(self) -> dict[str, int]:
        """Distance of each block from the input: embeddings 0, the layers 1 to L, final norm and head L + 1.

        An encoder's layers count before its decoder's; the final norm of a stack is one above its last layer.
        """
        depth, depths = 0, {}
        for name in self.names:
            depth += self.kind(name) == "layer"
            depths[name] = depth + (self.kind(name) in ("final_norm", "head"))
        return depths

    def kind(self, name: str) -> str:
        """The kind of a block: `embeddings`, `layer` (also a part of one), `final_norm` or `head`.

        Raises:
            SurgicalError: the map has no such block.

        Example:
            >>> blocks.kind("11")
            'layer'
        """
        if name not in self.names:
            raise SurgicalError(
                f"{name!r} is no block of {self.model_name}: {nearest(name, self.names)}Blocks: {listed(self.names)}."
            )
        return kind_of(name)

    def tower_of(self, name: str) -> str:
        """The part of the model that a block is in: `"decoder"` of `"decoder.final_norm"`, `""` where it has no name.

        Example:
            >>> blocks.tower_of("stages.2.5")
            'stages.2'
        """
        return name.partition(PART)[0].rpartition(".")[0]

    def block_of(self, name: str) -> str:
        """The block that a parameter or module name belongs to; containers in the name are ignored.

        Raises:
            SurgicalError: the name lies in no block.

        Example:
            >>> blocks.block_of("vit.layers.3.attention.q_proj.weight")
            '3'
        """
        path = bare_parameter_name(name)
        while path:
            if path in self._owners:
                return self._owners[path]
            path = path.rpartition(".")[0]
        raise SurgicalError(f"{name!r} belongs to no block of {self.model_name}. Blocks: {listed(self.names)}.")

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {**self.tied, **{path: block for block, paths in self.modules.items() for path in paths}}

    def named_parameters(self, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
        """For each block the parameters of `model` by name: a partition, tied weights once, under their first name."""
        grouped: dict[str, dict[str, nn.Parameter]] = {block: {} for block in self.names}
        for name, parameter in model.named_parameters():
            grouped[self.block_of(name)][name] = parameter
        return grouped

    def parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """For each block the parameters of `model`: a partition, tied weights once.

        Example:
            >>> {block: sum(p.numel() for p in group) for block, group in blocks.parameters(model).items()}
        """
        return {block: list(named.values()) for block, named in self.named_parameters(model).items()}

    def parse(self, spec: int | str | Iterable[int | str]) -> tuple[str, ...]:
        """Turn a choice of blocks into their names, in the map's order.

        Args:
            spec: an index into the repeated layers (negative counts from the last), a slice as a string (`"0:3"`,
                `"-2:"`), a block name, `"all"` (every block, embeddings and head too), one of these for a named
                stack (`"decoder[-2:]"`), a tower with all its blocks by its own name (`"encoder"`, `"stages.0"`) or
                as `"vision"`, `"projector"` or `"language"`, or a list of any of them.

        Raises:
            SurgicalError: unknown name, index out of range, the same block twice, nothing selected by the whole or by
                one part of it, or an index without a stack where the model has several.

        Example:
            >>> blocks.parse([0, -1, "head"])
            ('0', '11', 'head')
        """
        parts = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]
        grammar = BlockGrammar(self.names, self.stacks, self.tied, self.model_name, self.modules)
        chosen: list[str] = []
        for part in parts:
            for block in grammar.parse(part):
                if block in chosen:
                    raise SurgicalError(f"block {block!r} is named twice in {spec!r}: name it once.")
                chosen.append(block)
        if not chosen:
            raise SurgicalError(f"{spec!r} selects no block. Choose at least one of: {listed(self.names)}.")
        return tuple(block for block in self.names if block in chosen)

    def divided(self, parts: Sequence[str]) -> BlockMap:
        """A map of parts to search among, such as attention | MLP, in place of each repeated layer.

        A part is named by its layer and a module in it, as `SurgicalConfig(target_modules={layer: [module]})` takes
        it. What the parts leave out of a layer, its norms for example, belongs to no part.

        Raises:
            SurgicalError: no part, or one twice.

        Example:
            >>> blocks.divided(["attention", "mlp"]).names
            ('embeddings', '0/attention', '0/mlp', '1/attention', '1/mlp', 'final_norm', 'head')
        """
        if not parts or len(set(parts)) != len(parts):
            raise SurgicalError(f"{list(parts)!r} does not divide a layer: name each part once, at least one.")

        def divide(names: Iterable[str]) -> tuple[str, ...]:
            divided = ([f"{name}{PART}{part}" for part in parts] if name in self.layers else [name] for name in names)
            return tuple(chain.from_iterable(divided))

        stacks = {label: divide(stack) for label, stack in self.stacks.items()}
        return replace(self, names=divide(self.names), stacks=stacks, modules={})


def kind_of(block: str) -> str:
    """The kind of a block by its name alone, for saved names; with a map at hand ask `BlockMap.kind`.

    Example:
        >>> kind_of("vision_model.head"), kind_of("stages.2.5"), kind_of("0/attention")
        ('head', 'layer', 'layer')
    """
    last = block.partition(PART)[0].rpartition(".")[2]
    return last if last in ("embeddings", "final_norm", "head") else "layer"


def blocks_in_words(names: Iterable[str]) -> str:
    """Block names for people, so that `0` is not read as a zero.

    Example:
        >>> blocks_in_words(["embeddings", "0", "2", "3", "4", "head"])
        'embeddings, blocks 0 and 2 to 4, head'
    """
    texts: list[str] = []
    for is_number, group in groupby(names, str.isdigit):
        runs: list[list[str]] = []
        for name in group:
            if is_number and runs and int(name) == int(runs[-1][-1]) + 1:
                runs[-1].append(name)
            else:
                runs.append([name])
        if is_number:
            *others, last = [text for run in runs for text in (run if len(run) < 3 else [f"{run[0]} to {run[-1]}"])]
            several = len(runs) > 1 or len(runs[0]) > 1
            texts.append(f"block{'s' * several} {', '.join(others) + ' and ' * bool(others)}{last}")
        else:
            texts += [run[0] for run in runs]
    return ", ".join(texts)
