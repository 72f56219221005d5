"""Parts of a layer by names that hold for every architecture: attention and its projections, MLP, experts, router."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import SurgicalError, first_of
from .block_spec import INDEX, SLICE
from .module_lists import is_attention, is_matrix, is_norm, join, parents, shape_of, within
from .unwrap import named_bare_modules

PARTS = ("attention", "mlp", "experts", "router")
PROJECTIONS = tuple(f"attention.{letter}" for letter in "qkvo")
Paths = dict[str, set[str] | None]  # modules by path, and the parameters in them; None for all

_PART = re.compile(r"(?P<part>\w+)(?:\.(?P<letter>[qkvo])|\[(?P<index>[^\[\]]*)\])?")
_LETTERS = {"q": "q|query", "k": "k|key", "v": "v|value", "o": "o|out|output"}
_OTHER_OUTPUTS = ("dense", "c_proj")
_MLP_CLASS = re.compile(r"mlp|feed_?forward|ffn|ff$|dense\w*dense$|moe(block)?$", re.IGNORECASE)
_MLP_NAME = re.compile(r"^(mlps?|ffn?s?(_.*)?|feed_?forward|(block_sparse_)?moe)$", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)$")
_ROUTER = re.compile(r"router|gating|(^|topk)gate$", re.IGNORECASE)
_WHOLE_LAYER = re.compile(r"(layer|block)$", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A part of a layer: `attention`, `attention.q`, `experts[3]`."""

    name: str
    letter: str | None
    index: str | None

    @staticmethod
    def is_one(text: str) -> bool:
        """True if `text` names a part."""
        match = _PART.fullmatch(text)
        return match is not None and match["part"] in PARTS

    @classmethod
    def read(cls, text: str) -> Part:
        """The part that `text` names.

        Raises:
            SurgicalError: only attention has projections, and only experts are numbered.
        """
        match = _PART.fullmatch(text)
        assert match is not None
        part = cls(match["part"], match["letter"], match["index"])
        if (part.letter and part.name != "attention") or (part.index is not None and part.name != "experts"):
            raise SurgicalError(
                f"{text!r}: only attention has projections (attention.q, .k, .v, .o), and only experts are numbered "
                f"(experts[3], experts[0:4]). Parts: {', '.join(PARTS)}."
            )
        return part


@dataclass(frozen=True)
class Layers:
    """Modules of the chosen blocks, in which parts are looked for.

    Attributes:
        modules: by path, in the order of the model.
        homes: paths of the blocks, the largest modules that hold them.
    """

    modules: Mapping[str, nn.Module]
    homes: frozenset[str]

    def find(self, part: Part, text: str) -> Paths:
        """The modules that are the part, and the parameters of them; none where the layers have no such part.

        Raises:
            SurgicalError: an expert that does not exist, experts whose weights are not stacked one by one, or a
                projection that attention has not to itself.

        Example:
            >>> Layers(modules, frozenset(["h.0"])).find(Part("attention", "o", None), "attention.o")
            {'h.0.attn.c_proj': None}
        """
        if part.letter:
            return {path: None for home in self.attention() for path in self._projections(home, part.letter, text)}
        if part.index is not None:
            numbered: Paths = {}
            for home in self.experts():
                numbered |= self._experts_at(home, part.index, text)
            return numbered
        return dict.fromkeys(getattr(self, part.name)())

    def attention(self) -> list[str]:
        """Self- and cross-attention without the norms before them."""
        return [self._smallest(path) for path in self._outermost(self._attends)]

    def mlp(self) -> list[str]:
        """Feed-forward nets, a mixture of experts too; of layers that have no module for it, its matrices."""
        attention = self._outermost(self._attends)
        named = [path for path in self._outermost(self._is_mlp) if not within(path, attention)]
        if named:
            return [self._smallest(path) for path in named]
        beside = {path.rpartition(".")[0] for path in attention}
        return [
            path
            for path, module in self.modules.items()
            if path.rpartition(".")[0] in beside and path not in attention and _has_matrix(module)
        ]

    def experts(self) -> list[str]:
        """The routed experts."""
        return self._outermost(lambda path, module: path.rpartition(".")[2] == "experts")

    def router(self) -> list[str]:
        """What sends tokens to experts."""
        blocks = {path.rpartition(".")[0]: path for path in self.experts()}

        def routes(path: str, module: nn.Module) -> bool:
            parent, _, name = path.rpartition(".")
            called = any(_ROUTER.search(word) for word in (name, type(module).__name__))
            return parent in blocks and path != blocks[parent] and "shared" not in name and called

        return self._outermost(routes)

    def existing(self) -> list[str]:
        """The names of the parts that there are."""
        return [name for name in PARTS if getattr(self, name)()]

    def _attends(self, path: str, module: nn.Module) -> bool:
        named = is_attention(module) or _ATTENTION_NAME.search(_name(path)) is not None
        return named and not is_norm(module) and not self._is_whole(path, module)

    def _is_mlp(self, path: str, module: nn.Module) -> bool:
        named = _MLP_CLASS.search(type(module).__name__) or _MLP_NAME.search(_name(path))
        return named is not None and not is_norm(module) and not self._is_whole(path, module)

    def _is_whole(self, path: str, module: nn.Module) -> bool:
        return path in self.homes and _WHOLE_LAYER.search(type(module).__name__) is not None

    def _outermost(self, wanted: Callable[[str, nn.Module], bool]) -> list[str]:
        outermost: dict[str, None] = {}
        for path, module in self.modules.items():
            if isinstance(module, nn.ModuleList) and _name(path) != "experts":
                continue
            if not within(path, outermost) and wanted(path, module) and _has_matrix(module):
                outermost[path] = None
        return list(outermost)

    def _smallest(self, path: str) -> str:
        """The smallest module in it that holds all its matrices: T5's attention without the norm before it."""
        children = [
            child
            for child, module in self.modules.items()
            if child.rpartition(".")[0] == path and (_has_matrix(module) or self._is_scale(module))
        ]
        direct = any(is_matrix(shape_of(p)) for p in self.modules[path].parameters(recurse=False))
        holding = [child for child in children if _has_matrix(self.modules[child])]
        return self._smallest(holding[0]) if len(holding) == 1 and not direct and len(children) > 1 else path

    @staticmethod
    def _is_scale(module: nn.Module) -> bool:
        return is_norm(module) and next(module.parameters(), None) is not None

    def _projections(self, home: str, letter: str, text: str) -> list[str]:
        matrices = [
            path
            for path, module in self.modules.items()
            if within(path, [home]) and any(is_matrix(shape_of(p)) for p in module.parameters(recurse=False))
        ]
        pattern = re.compile(
            rf"(w|to_|linear_)?({_LETTERS[letter]})(_[ab])?(_(proj|projection|lin|linear|layer|dense))?", re.IGNORECASE
        )
        chosen = [
            path
            for path in matrices
            if pattern.fullmatch(_name(path)) or (letter == "o" and _name(path) in _OTHER_OUTPUTS)
        ]
        if not chosen:
            inside = first_of([path[len(home) + 1 :] or path for path in matrices], most=8)
            raise SurgicalError(
                f"{text!r}: {home} has no matrix of its own for it. It holds {inside}: name one of these, or "
                "'attention' for all."
            )
        return chosen

    def _experts_at(self, home: str, index: str, text: str) -> Paths:
        experts = self.modules[home]
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            members = [join(home, name) for name, child in experts.named_children() if _has_matrix(child)]
            return {members[at]: None for at in _indices(index, len(members), text, home)}
        count = stacked(experts)
        if count is None:
            raise SurgicalError(
                f"{text!r}: the experts of {home} ({type(experts).__name__}) are neither a list nor stacked along the "
                "first dimension of three-dimensional weights, so one cannot be told from the others: take 'experts'."
            )
        chosen = _indices(index, count, text, home)
        return {home: {f"{name}[{at}]" for name in _parameters(experts) for at in chosen}}


def parts_of(model: nn.Module, homes: Collection[str]) -> list[str]:
    """The names of the parts that the modules at `homes`, layers of a model, have.

    Example:
        >>> parts_of(qwen3_moe, ["model.layers.0"])
        ['attention', 'mlp', 'experts', 'router']
    """
    known = frozenset(homes)
    return Layers({path: m for path, m in named_bare_modules(model) if within(path, known)}, known).existing()


def stacked(experts: nn.Module) -> int | None:
    """How many experts the first dimension of each parameter counts; None where it does not.

    Example:
        >>> stacked(model.model.layers[0].mlp.experts)  # gate_up_proj is of (128, 1536, 2048)
        128
    """
    shapes = [shape_of(parameter) for parameter in _parameters(experts).values()]
    counts = {shape[0] if shape else 0 for shape in shapes}
    return counts.pop() if len(counts) == 1 and any(len(shape) == 3 for shape in shapes) else None


def _indices(text: str, size: int, given: str, home: str) -> list[int]:
    inner = text.strip()
    where = f"the experts of {home} are 0 to {size - 1}"
    if SLICE.fullmatch(inner):
        bounds = [int(number) if number else None for number in inner.split(":")]
        if any(bound is not None and not -size <= bound <= size for bound in bounds[:2]) or 0 in bounds[2:]:
            raise SurgicalError(f"{given!r} is out of range: {where}. Negative numbers count from the last.")
        if not (chosen := list(range(size))[slice(*bounds)]):
            raise SurgicalError(f"{given!r} selects no expert: {where}. The end of a slice is not in it.")
        return chosen
    if not INDEX.fullmatch(inner):
        raise SurgicalError(f"{given!r} is not understood: put an index or a slice in the brackets; {where}.")
    if not -size <= int(inner) < size:
        raise SurgicalError(f"{given!r} does not exist: {where}. Negative numbers count from the last.")
    return [int(inner) % size]


def _name(path: str) -> str:
    """The last name in a path that is no number."""
    return next(
        (name for name in (part.rpartition(".")[2] for part in (path, *parents(path))) if not name.isdigit()), ""
    )


def _has_matrix(module: nn.Module) -> bool:
    return any(is_matrix(shape_of(parameter)) for parameter in _parameters(module).values())


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a bare module, by name, without the rows that an adapter shows beside them."""
    owners = named_bare_modules(module)
    return {join(path, name): p for path, owner in owners for name, p in owner._parameters.items() if p is not None}


def whole_or_rows(whole: Paths, rows: Paths) -> Paths:
    """Both, without rows of what is chosen whole.

    Example:
        >>> whole_or_rows({"0.mlp": None}, {"0.mlp.experts": {"up_proj[3]"}})
        {'0.mlp': None}
    """
    beside = {path: names for path, names in rows.items() if not within(path, {p for p, n in whole.items() if not n})}
    return {**whole, **beside}
