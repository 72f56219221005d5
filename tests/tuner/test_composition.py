"""A wrapped model inside other modules and other tools, and what holds or reads its layers beside it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import BertModel, Wav2Vec2Config, Wav2Vec2ForCTC

from surgical_peft import SurgicalConfig, SurgicalError
from tests.support.families import FAMILIES
from tests.support.plain import PLAIN
from tests.support.toys import TOYS, VOCABULARY, Batch, Toy
from tests.support.wrapping import logits, nudge, same

EVERY = TOYS | FAMILIES | PLAIN  # of the two ViTs, the one with four layers
Answers = dict[str, Tensor]


def pair(family: Toy, tuned: bool = True, **kwargs: Any) -> PeftModel:
    """A model with two adapters on one block, the first of them active; both differ from the base if `tuned`."""
    model = get_peft_model(family.model(), SurgicalConfig(blocks=[family.first, family.last], **kwargs))
    model.add_adapter("second", SurgicalConfig(blocks=[family.last], **kwargs))
    for seed, name in enumerate(["second", "default"] if tuned else []):
        model.set_adapter(name)
        nudge(model, seed)
    return model.eval()


def answers(model: Any, batch: Batch) -> Answers:
    """What the base and both adapters say; the first adapter is active before and after."""
    found = {"default": logits(model, batch)}
    with model.disable_adapter():
        found["base"] = logits(model, batch)
    model.set_adapter("second")
    found["second"] = logits(model, batch)
    model.set_adapter("default")
    return found


def assert_same(mine: Answers, theirs: Answers) -> None:
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not same(mine[name], theirs[name])]
    assert len({tensor.sum().item() for tensor in mine.values()}) == len(mine)  # else it would show nothing


def by_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "inside another": lambda model, folder: copy.deepcopy(nn.ModuleDict({"inner": model}))["inner"],
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("deepcopy", name) for name in ("bert", "t5", "lstm", "lone")),
        *(("pickle", name) for name in ("llama_tied", "resnet", "lstm")),
        *(("torch.save", name) for name in ("levit", "lone")),
        *(("inside another", name) for name in ("bert", "resnet")),
    ],
)
def test_a_copy_has_all_adapters_and_is_apart(way: str, name: str, tmp_path: Path) -> None:
    batch, model = EVERY[name].batch(), pair(EVERY[name])
    expected = answers(model, batch)
    copied = COPIES[way](model, tmp_path)
    assert_same(answers(copied, batch), expected)
    mine = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not mine.intersection(id(tensor) for tensor in copied.state_dict(keep_vars=True).values())
    nudge(copied, seed=5)
    with torch.no_grad():
        for parameter in [p for p in copied.parameters() if not p.requires_grad]:
            parameter.add_(0.1)
    assert not same(logits(copied, batch), expected["default"])
    assert_same(answers(model, batch), expected)
    assert same(logits(copied.unload(), batch), logits(copied, batch))


@pytest.mark.parametrize(
    ("active", "name"),
    [
        *(("default", name) for name in ("bert", "llama_tied", "lone")),
        *(("second", name) for name in ("t5", "resnet")),
        *(("merged", name) for name in ("llama_tied", "levit", "lstm")),
        *(("disabled", name) for name in ("t5", "resnet", "lone")),
    ],
)
def test_the_state_dict_is_saved_and_loaded_whole(active: str, name: str, tmp_path: Path) -> None:
    family = EVERY[name]
    batch, model, other = family.batch(), pair(family), pair(family, tuned=False)
    expected = answers(model, batch)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    for each in (model, other):
        each.set_adapter("second" if active == "second" else "default")
        if active == "merged":
            each.merge_adapter()
        elif active == "disabled":
            each.base_model.disable_adapter_layers()
    file = str(tmp_path / "model.safetensors")
    if name in ("llama_tied", "t5"):  # which safetensors saves only so, wrapped or not
        save_model(model, file)
        load_model(other, file)
    else:
        save_file(model.state_dict(), file)
        assert not any(other.load_state_dict(load_file(file)))
    if active == "merged":
        other.unmerge_adapter()
    other.base_model.enable_adapter_layers()
    other.set_adapter("default")
    assert_same(answers(other, batch), expected)


@pytest.mark.parametrize("name", ["bert", "llama_tied", "resnet", "sequential"])
def test_accelerate_saves_and_loads_its_state(name: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, family = Accelerator(cpu=True), EVERY[name]
    plain = pair(family)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(plain, optimizer)

    def step(seed: int) -> None:
        torch.manual_seed(seed)
        model.train()
        accelerator.backward(model(**family.batch(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    step(0)
    accelerator.save_state(str(tmp_path))
    halfway = answers(plain, family.batch())
    step(1)
    expected = answers(plain, family.batch())
    plain.set_adapter("second")
    nudge(plain, seed=3)
    plain.set_adapter("default")
    accelerator.load_state(str(tmp_path))
    assert_same(answers(plain, family.batch()), halfway)
    step(1)
    assert_same(answers(plain, family.batch()), expected)


@pytest.mark.parametrize(
    ("name", "use_buffers"),
    [
        *((name, False) for name in ("bert", "llama_tied", "t5", "resnet")),
        ("resnet", True),
        ("levit", True),
        ("lone", True),
    ],
)
def test_an_averaged_model(name: str, use_buffers: bool) -> None:
    """EMA copies the model, and averages its parameters in their order."""
    batch, model = EVERY[name].batch(), pair(EVERY[name])
    start = answers(model, batch)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    averaged = AveragedModel(model, avg_fn=lambda mine, theirs, count: (mine + theirs) / 2, use_buffers=use_buffers)
    averaged.update_parameters(model)
    assert_same(answers(averaged.module, batch), start)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    nudge(model, seed=4)
    averaged.update_parameters(model)
    for name in names:
        expected = (before[name] + model.get_parameter(name).detach()) / 2
        assert torch.equal(averaged.module.get_parameter(name), expected), name
    found = answers(averaged.module, batch)
    assert same(found["base"], start["base"]) and same(found["second"], start["second"])
    assert not same(found["default"], start["default"])


class Logits(nn.Module):
    """Tensors in, one tensor out, as tracers want it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(**dict(zip(self.names, inputs, strict=True))).logits


def inputs_of(family: Toy) -> Batch:
    """Without labels, where the model does without."""
    batch = family.batch()
    return batch if family.name in PLAIN else {key: each for key, each in batch.items() if key != "labels"}


def traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return torch.jit.trace(model, inputs, check_trace=False)


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return torch.export.export(model, inputs, strict=False).module()


TRACED = [*((traced, name) for name in ("bert", "resnet", "sequential", "lone")), (exported, "bert")]
TRACED += [(exported, name) for name in ("resnet", "lone")]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("how", "name"), TRACED)
def test_a_trace_is_of_what_stands(how: Callable[..., Any], name: str) -> None:
    family = EVERY[name]
    batch, model = inputs_of(family), pair(family)
    expected = answers(model, batch)
    inner, inputs = Logits(model.get_base_model(), list(batch)), tuple(batch.values())
    with torch.no_grad():
        traces = {"default": how(inner, inputs)}
        with model.disable_adapter():
            traces["base"] = how(inner, inputs)
        model.set_adapter("second")
        traces["second"] = how(inner, inputs)
        model.set_adapter("default")
        for adapter, trace in traces.items():  # later, when something else stands
            torch.testing.assert_close(trace(*inputs), expected[adapter], rtol=1e-4, atol=1e-5)
    assert_same(answers(model, batch), expected)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("eager", "llama_tied"), ("eager", "resnet")],
)
def test_compiled_code_follows_what_stands(backend: str, name: str) -> None:
    family = EVERY[name]
    batch, model = inputs_of(family), pair(family)
    expected = answers(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(Logits(model, list(batch)), backend=backend)

    def check(found: Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*batch.values()), found, rtol=1e-4, atol=1e-5)

    for _ in range(2):
        check(expected["default"])
        with model.disable_adapter():
            check(expected["base"])
        model.set_adapter("second")
        check(expected["second"])
        model.set_adapter("default")
    nudge(model, seed=6)
    assert not same(logits(model, batch), expected["default"])
    check(logits(model, batch))


# Parents that know their layers otherwise than as submodules that they call.


class Block(nn.Module):
    kind = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.gain, self.seen = 0.0, None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.scale * self.one(x)
        return x + self.gain * self.seen


class Special(Block):
    kind = "special"


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Special(), Block()])
        for layer in self.layers:
            layer.gain = 0.5

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Listed(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.plan = [list(self.layers)]

    def run(self, x: Tensor) -> Tensor:
        for layer in self.plan[0]:
            x = layer(x)
        return x


class InDict(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.plan = {str(number): layer.one for number, layer in enumerate(self.layers)}

    def run(self, x: Tensor) -> Tensor:
        for layer in self.plan.values():
            x = torch.tanh(layer(x))
        return x


class InClosure(Parent):
    def __init__(self) -> None:
        super().__init__()
        inner = list(self.layers)
        self.steps = [lambda x, layer=layer: layer(x) for layer in inner]

    def run(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Writes(Parent):
    def run(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            layer.gain = 1.0 + number + float(x.detach().mean())
            x = layer(x)
        return x


class ReadsOutputs(Parent):
    def run(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            x = layer(x)
            total = total + layer.seen
        return total


class ReadsWeights(Parent):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.linear(x, layer.one.weight * layer.scale, layer.one.bias)
        return x


class ReadsClasses(Parent):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) if isinstance(layer, Special) and layer.kind == "special" else layer(x)
            x = 2 * x if type(layer) is Block else x
        return x


class ByName(Parent):
    def run(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        for number in range(len(self.layers)):
            x = torch.tanh(x @ weights[f"layers.{number}.one.weight"] * weights[f"layers.{number}.scale"])
        return x


class Chain(nn.Module):
    """Owns a weight, and calls all its children in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return self.scale * x


class CallsAllChildren(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chain() for _ in range(3))


class Scaled(nn.Sequential):
    """A container that owns a weight itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class OfContainers(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))


class CountsChildren(OfContainers):
    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer[-1](layer[0](x)) * layer.scale * len(layer)
        return x


class Shared(Parent):
    """One layer object in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[1]


PARENTS = {each.__name__: each for each in (Listed, InDict, InClosure, Writes, ReadsOutputs, ReadsWeights)}
PARENTS |= {
    each.__name__: each for each in (ReadsClasses, ByName, CallsAllChildren, OfContainers, CountsChildren, Shared)
}


@pytest.mark.parametrize("kind", PARENTS)
def test_a_parent_meets_its_own_layers(kind: str) -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    target = ["layers.1"]
    bare = PARENTS[kind]()
    base = bare(x)
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(name.startswith("layers.1."))
    outer = PARENTS[kind]()
    outer(x)  # some keep a tensor of this pass
    model = get_peft_model(outer, SurgicalConfig(target_modules=target))
    model.add_adapter("second", SurgicalConfig(target_modules=target))
    assert torch.equal(model(x), base)
    for each in (bare, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    tuned = bare(x)
    assert not torch.equal(tuned, base)
    for _ in range(2):
        assert torch.equal(model(x), tuned)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.set_adapter("second")
        assert torch.equal(model(x), base)
        model.set_adapter("default")
    assert torch.equal(model.merge_and_unload()(x), tuned)


@pytest.mark.parametrize("kind", ["Listed", "InClosure", "ReadsOutputs", "ReadsWeights", "ByName", "CallsAllChildren"])
def test_a_compiled_parent_follows_what_stands(kind: str) -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    model: Any = get_peft_model(PARENTS[kind](), SurgicalConfig(target_modules=["layers.1"]))
    compiled = torch.compile(model, backend="aot_eager")
    base = model(x)
    torch.testing.assert_close(compiled(x), base)
    compiled(x).square().sum().backward()  # and trains
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
    nudge(model)
    tuned = model(x)
    assert not torch.equal(tuned, base)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), tuned)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), base)


class Alike(Chain):
    """Does more with its children than calling them in turn."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = torch.tanh(self.scale * child(x))
        return x


class Last(Chain):
    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.children()
        for child in first:
            x = torch.relu(child(x))
        return self.scale * last(x)


class Several(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.stack([child(x) for child in self._modules.values()]).sum(0)


@pytest.mark.parametrize("kind", [Alike, Last, Several])
def test_an_owner_that_goes_through_its_children_is_right_or_refused(kind: type[nn.Module]) -> None:
    x, layers = torch.linspace(-1, 1, 8).reshape(2, 4), nn.ModuleList(kind() for _ in range(2))
    base = layers[1](x)
    try:
        get_peft_model(nn.ModuleDict({"layers": layers}), SurgicalConfig(target_modules=["layers.1"]))
    except SurgicalError:
        assert not [name for name, _ in layers.named_modules() if "surgical_" in name]
    assert torch.equal(layers[1](x), base)


class Parametrized(Parent):
    """Weights that torch computes of others, which it keeps in a list of modules."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        for layer in self.layers:
            kind(layer.one)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrized_weights_are_tuned(kind: str) -> None:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    torch.manual_seed(0)
    outer = Parametrized(getattr(torch.nn.utils.parametrizations, kind)).eval()
    base = outer(x)
    model: Any = get_peft_model(outer, SurgicalConfig(target_modules=["layers.1"]))
    assert torch.equal(model(x), base)
    tuned = nudge(model)(x)
    assert not torch.equal(tuned, base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), tuned) and torch.equal(copy.deepcopy(model)(x), tuned)
    assert torch.equal(model.unload()(x), base)


def test_wav2vec2s_embeddings_are_tuned() -> None:
    """Its convolution for positions has a weight norm; HuBERT's, WavLM's and others' too."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 16}
    config = Wav2Vec2Config(**sizes, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3))
    base, batch = Wav2Vec2ForCTC(config).eval(), {"input_values": torch.randn(1, 800)}
    expected = logits(base, batch)
    model = get_peft_model(base, SurgicalConfig(blocks="all"))
    assert not same(logits(nudge(model), batch), expected)
    assert same(logits(model.unload(), batch), expected)


# Inside a user's module, and around one.


class Classifier(nn.Module):
    """A user's own model: a wrapped one, and a new head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(3, 2)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.out(self.body(**batch).logits)


def test_a_wrapped_model_in_a_users_module(tmp_path: Path) -> None:
    family = TOYS["bert"]
    outer, batch = Classifier(pair(family)), inputs_of(family)
    body: Any = outer.body
    body.set_adapter("default")
    before, start = answers(body, batch), {n: t.clone() for n, t in outer.state_dict().items()}
    tuned = [name for name, parameter in outer.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad], lr=1e-2)
    outer.train()(**batch).square().sum().backward()
    optimizer.step()
    outer.eval()
    moved = {name for name, tensor in outer.state_dict().items() if not torch.equal(tensor, start[name])}
    frozen = {name for name, p in outer.named_parameters() if p.grad is not None and not p.grad.any()}
    assert moved == set(tuned) - frozen and {"out.weight", "out.bias"} < moved
    after = answers(body, batch)
    assert same(after["base"], before["base"]) and same(after["second"], before["second"])
    outer.load_state_dict(start)
    assert_same(answers(body, batch), before)
    outer.double()
    assert {tensor.dtype for tensor in outer.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(answers(body, batch)["second"].float(), before["second"], rtol=1e-4, atol=1e-5)
    body.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.model().double(), tmp_path)
    assert same(logits(loaded, batch), answers(body, batch)["default"])


class Transformer(nn.Module):
    """As SentenceTransformer's: takes and gives a dictionary of features."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: Batch) -> Batch:
        return {**features, "tokens": self.auto_model(input_ids=features["input_ids"]).last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: Batch) -> Batch:
        return {**features, "sentence_embedding": features["tokens"].mean(1)}


class SentenceEncoder(nn.Sequential):
    """`SentenceTransformer` in small: a sequence that starts with a transformers model."""

    def __init__(self) -> None:
        inner: Any = TOYS["bert"].model()
        super().__init__(Transformer(inner.bert), Pooling())

    @property
    def auto_model(self) -> BertModel:
        return self[0].auto_model  # type: ignore[return-value]

    def encode(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self({"input_ids": ids})["sentence_embedding"]


class CrossEncoder(nn.Module):
    """A user's class around a transformers classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TOYS["bert"].model()

    def encode(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=ids).logits


IDS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [SentenceEncoder, CrossEncoder])
def test_around_a_users_module(kind: type[Any], tmp_path: Path) -> None:
    outer = kind().eval()
    base = outer.encode(IDS)
    model: Any = get_peft_model(outer, SurgicalConfig(blocks=["0", "2"]))
    assert model.get_base_model() is outer
    assert torch.equal(outer.encode(IDS), base)
    tuned = {name for name, parameter in outer.named_parameters() if parameter.requires_grad}
    assert tuned and all(".layer.0." in name or ".layer.2." in name for name in tuned)
    nudge(model)
    expected = outer.encode(IDS)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(outer.encode(IDS), base)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(kind().eval(), tmp_path)
    assert torch.equal(loaded.encode(IDS), expected)
    assert torch.equal(copy.deepcopy(outer).encode(IDS), expected)
    assert torch.equal(loaded.merge_and_unload().encode(IDS), expected)
    assert torch.equal(model.unload().encode(IDS), base)


@pytest.mark.parametrize("kind", [SentenceEncoder, CrossEncoder])
def test_the_model_inside_a_users_module_is_wrapped(kind: type[Any], tmp_path: Path) -> None:
    """`model[0].auto_model = get_peft_model(model[0].auto_model, config)`."""
    outer = kind().eval()
    base = outer.encode(IDS)
    home, name = (outer[0], "auto_model") if kind is SentenceEncoder else (outer, "model")
    inner: Any = get_peft_model(getattr(home, name), SurgicalConfig(blocks=[-1]))
    setattr(home, name, inner)
    assert torch.equal(outer.encode(IDS), base)
    nudge(outer)
    expected = outer.encode(IDS)
    state = outer.state_dict()
    inner.save_pretrained(tmp_path)
    with inner.disable_adapter():
        assert torch.equal(outer.encode(IDS), base)
    copied = copy.deepcopy(outer)
    nudge(copied, seed=1)
    assert not torch.equal(copied.encode(IDS), expected) and torch.equal(outer.encode(IDS), expected)
    copied.load_state_dict(state)
    assert torch.equal(copied.encode(IDS), expected)
    fresh = kind().eval()
    home = fresh[0] if kind is SentenceEncoder else fresh
    setattr(home, name, PeftModel.from_pretrained(getattr(home, name), tmp_path))
    assert torch.equal(fresh.encode(IDS), expected)


@pytest.mark.parametrize("kind", [SentenceEncoder, CrossEncoder])
def test_native_injection_in_an_inner_model(kind: type[Any], tmp_path: Path) -> None:
    outer = kind().eval()
    base = outer.encode(IDS)
    inner = outer.auto_model if kind is SentenceEncoder else outer.model
    names = set(outer.state_dict())
    inner.add_adapter(SurgicalConfig(blocks=[-1]))
    assert torch.equal(outer.encode(IDS), base) and names <= set(outer.state_dict())
    nudge(outer)
    found = {"default": outer.encode(IDS)}
    inner.add_adapter(SurgicalConfig(blocks=["0", "2"]), "second")
    nudge(outer, seed=1)
    found["second"] = outer.encode(IDS)
    copied = pickle.loads(pickle.dumps(outer))
    for each in (outer, copied):
        inside = each.auto_model if kind is SentenceEncoder else each.model
        for _ in range(2):
            for name, expected in found.items():
                inside.set_adapter(name)
                assert torch.equal(each.encode(IDS), expected)
            inside.disable_adapters()
            assert torch.equal(each.encode(IDS), base)
            inside.enable_adapters()
    inner.save_pretrained(tmp_path)  # the active one
    fresh = kind().eval()
    inside = fresh.auto_model if kind is SentenceEncoder else fresh.model
    inside.load_adapter(str(tmp_path))
    assert torch.equal(fresh.encode(IDS), found["second"]) and not torch.equal(found["default"], found["second"])


@pytest.mark.parametrize("first", ["lora", "ours"])
def test_natively_beside_another_methods_adapter_it_is_right_or_refused(first: str) -> None:
    for name, query in (("bert", "query"), ("llama", "q_proj")):
        family = TOYS[name]
        base: Any = family.model()
        configs = {"lora": LoraConfig(target_modules=rf".*\.1\..*{query}"), "ours": SurgicalConfig(blocks=["0"])}
        second = "ours" if first == "lora" else "lora"
        base.add_adapter(configs[first], first)
        expected = logits(nudge(base), family.batch())
        try:
            base.add_adapter(configs[second], second)
        except SurgicalError:
            assert second not in base.peft_config
            assert torch.equal(logits(base, family.batch()), expected)
            continue
        base.set_adapter(first)
        assert torch.equal(logits(base, family.batch()), expected)
        base.set_adapter(second)
        assert torch.equal(logits(base, family.batch()), logits(family.model(), family.batch()))
        tuned = logits(nudge(base, seed=1), family.batch())
        base.set_adapter(first)
        assert torch.equal(logits(base, family.batch()), expected)
        base.train().eval().set_adapter(second)
        assert torch.equal(logits(base, family.batch()), tuned)
