from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, MambaConfig, MambaForCausalLM

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError
from surgical_peft.tuner.layer import SurgicalLayer
from surgical_peft.tuner.target_modules import modules_to_tune
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Toy


class MLP(nn.Module):
    """As in PEFT's README: no blocks, no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lin1 = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.lin0(x).relu()))


class Lists(nn.Module):
    """Blocks of a list that its forward iterates over, next to a lone parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in "ab"])
        self.extra = nn.ParameterList([nn.Parameter(torch.zeros(4))])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["norm"](layer["fc"](x))
        return self.head(x + self.token + self.extra[0])


def targets(model: nn.Module, **kwargs: Any) -> list[str]:
    return list(modules_to_tune(model, SurgicalConfig(**kwargs)))


@torch.no_grad()
def answer(model: nn.Module, toy: Toy) -> Tensor:
    return model(**toy.batch()).logits


def test_a_block_is_tuned_as_one_module() -> None:
    vit = TOYS["vit"].model()
    assert targets(vit, blocks=[0, -1, "head"]) == ["vit.layers.0", "vit.layers.11", "classifier"]
    assert targets(vit, blocks="embeddings") == ["vit.embeddings"]
    assert targets(TOYS["gpt2"].model(), blocks="final_norm") == ["transformer.ln_f"]


def test_final_block_names_are_settled() -> None:
    config = SurgicalConfig(blocks=["-1", 0, "head"])
    modules_to_tune(TOYS["vit"].model(), config)
    assert config.blocks == ["0", "11", "head"]


def test_target_modules_are_looked_for_inside_the_blocks_only() -> None:
    vit = TOYS["vit"].model()
    assert targets(vit, blocks=[0, 1], target_modules=["attention"]) == [
        "vit.layers.0.attention",
        "vit.layers.1.attention",
    ]
    assert targets(vit, blocks=[1], target_modules=["fc1", "attention.q_proj"]) == [
        "vit.layers.1.attention.q_proj",
        "vit.layers.1.mlp.fc1",
    ]
    assert targets(vit, blocks=[1], target_modules=r".*\.mlp\.fc\d") == [
        "vit.layers.1.mlp.fc1",
        "vit.layers.1.mlp.fc2",
    ]


def test_the_outermost_match_is_tuned() -> None:
    vit = TOYS["vit"].model()
    assert targets(vit, blocks=[0], target_modules=["mlp", "fc1"]) == ["vit.layers.0.mlp"]
    assert targets(vit, blocks=[0], target_modules=r".*mlp.*") == ["vit.layers.0.mlp"]


def test_all_linear_means_linear_layers_but_the_output() -> None:
    vit, llama = TOYS["vit"].model(), TOYS["llama"].model()
    names = targets(vit, blocks=[2], target_modules="all-linear")
    assert len(names) == 6 and all(isinstance(vit.get_submodule(name), nn.Linear) for name in names)
    assert "lm_head" not in targets(llama, target_modules="all-linear")
    assert "classifier" not in targets(TOYS["bert"].model(), target_modules="all-linear", task_type="SEQ_CLS")


def test_without_blocks_target_modules_mean_what_they_mean_in_peft() -> None:
    vit = TOYS["vit"].model()
    assert len(targets(vit, target_modules=["mlp"])) == 12
    assert targets(MLP(), target_modules=["lin0", "norm"]) == ["lin0", "norm"]
    assert targets(MLP(), target_modules=r"lin\d") == ["lin0", "lin1"]


def test_excluded_modules_inside_a_block_are_left_out() -> None:
    """The block was tuned as a whole, excluded modules and all."""
    vit = TOYS["vit"].model()
    assert targets(vit, blocks=[0], exclude_modules=["mlp"]) == [
        "vit.layers.0.attention",
        "vit.layers.0.layernorm_before",
        "vit.layers.0.layernorm_after",
    ]
    assert targets(vit, blocks=[0], target_modules=["attention"], exclude_modules=r".*[qkv]_proj") == [
        "vit.layers.0.attention.o_proj"
    ]
    assert targets(vit, blocks=[0, 1], exclude_modules=["layers.1"]) == ["vit.layers.0"]


def test_lists_are_taken_apart_down_to_what_has_a_forward() -> None:
    """A wrapped nn.ModuleList could not be iterated over, and failed in the first forward pass."""
    assert targets(Lists(), target_modules=["layers.0"]) == ["layers.0.fc", "layers.0.norm"]
    model = get_peft_model(Lists(), SurgicalConfig(target_modules=["layers"]))
    model(torch.ones(1, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blocks": ["nope"]}, "'nope'.*embeddings, 0, 1.*head"),
        ({"blocks": [12]}, "0 to 11"),
        ({"blocks": [0, "0:2"]}, "named twice"),
        ({"blocks": "auto"}, "get_surgical_model"),
        ({"blocks": [0], "target_modules": ["q_pro"]}, r"no module.*\['0'\].*q_proj"),
        ({"blocks": [0], "target_modules": ["dropout"]}, "no module"),
        ({"blocks": [0], "target_modules": ["classifier"]}, "no module"),
        ({"target_modules": ["nope"]}, "no module.*in the model"),
        ({"blocks": [0], "exclude_modules": ["nope"]}, r"exclude_modules=\['nope'\]"),
        ({"blocks": [0], "exclude_modules": ["layers.0"]}, r"exclude_modules=\['layers.0'\]"),
        ({"blocks": [0], "modules_to_save": ["mlp"]}, "vit.layers.0.mlp, but blocks"),
        ({"blocks": [0], "modules_to_save": ["vit"]}, "names vit,"),
        ({"blocks": [0], "modules_to_save": ["clasifier"]}, "ViTForImageClassification"),
        ({"blocks": ["head"], "modules_to_save": ["clasifier"]}, "matches no module"),
    ],
)
def test_a_refused_config_leaves_model_and_config_as_they_were(kwargs: dict[str, Any], message: str) -> None:
    model = TOYS["vit"].model()
    names, grads = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    modes, attributes = [module.training for module in model.modules()], set(vars(model))
    config = SurgicalConfig(**kwargs)
    before = copy.deepcopy(config)

    with pytest.raises(SurgicalError, match=message):
        get_peft_model(model, config)

    assert list(model.state_dict()) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert config == before


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama_tied"])
@pytest.mark.parametrize("blocks", [["embeddings"], "all"])
def test_tied_weights_are_tuned_at_all_ends_and_saved_once(name: str, blocks: object, tmp_path: Path) -> None:
    toy = FAMILIES[name]
    base = toy.model()
    ends = [n for n, p in base.named_parameters(remove_duplicate=False) if p is base.get_input_embeddings().weight]
    assert len(ends) > 1
    model = get_peft_model(base, SurgicalConfig(blocks=blocks, frozen_eval=False))
    by_hand = toy.model()
    chosen = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    for n, parameter in by_hand.named_parameters():
        parameter.requires_grad_(n in chosen)
    for each in (model, by_hand):
        step(each, toy)
    expected = answer(by_hand, toy)
    assert torch.equal(answer(model, toy), expected)

    def one(wrapped: nn.Module) -> bool:
        return len({id(wrapped.get_parameter(end)) for end in ends}) == 1

    with model.disable_adapter():
        assert one(base) and torch.equal(answer(model, toy), answer(toy.model(), toy))
    assert one(base)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in saved if key.removeprefix("base_model.model.") in ends] == [f"base_model.model.{ends[0]}"]
    for loaded in (
        PeftModel.from_pretrained(toy.model(), tmp_path, adapter_name="other", low_cpu_mem_usage=True),
        PeftModel.from_pretrained(toy.model(), tmp_path),
    ):
        assert one(loaded.get_base_model())
        assert torch.equal(answer(loaded, toy), expected)
    merged = model.merge_and_unload()
    assert one(merged) and torch.equal(answer(merged, toy), expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_transformers_own_loading_keeps_ends_tied(trainable: bool, tmp_path: Path) -> None:
    """It puts a new object into one place of each tensor."""
    toy = FAMILIES["llama_tied"]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=["embeddings"]))
    step(model, toy)
    model.save_pretrained(tmp_path)
    base = toy.model()
    base.load_adapter(tmp_path, is_trainable=trainable)
    base.train(trainable)
    assert torch.equal(answer(base, toy), answer(model, toy))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    base.disable_adapters()
    assert torch.equal(answer(base, toy), answer(toy.model(), toy))


def test_either_end_of_a_tied_weight_names_it() -> None:
    toy = FAMILIES["llama_tied"]
    for names in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]):
        config = SurgicalConfig(target_modules=names)
        model = get_peft_model(toy.model(), config)
        assert config.tuned_modules == {"model.embed_tokens": None}
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "base_model.model.model.embed_tokens.weight"
        ]


def test_a_block_is_tuned_without_a_weight_tied_to_another_block() -> None:
    """A weight is in one block: BERT's output embeddings are in `embeddings`, not in the head around them."""
    config = BertConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=24
    )
    model = BertForMaskedLM(config)
    blocks = BlockMap.find(model)
    for name, parameters in blocks.named_parameters(model).items():
        tuned_ones = get_peft_model(copy.deepcopy(model), SurgicalConfig(blocks=[name]))
        trained = {n.removeprefix("base_model.model.") for n, p in tuned_ones.named_parameters() if p.requires_grad}
        assert trained == set(parameters)
        assert tuned_ones.get_base_model().cls.predictions.decoder.weight.requires_grad is (name == "embeddings")


def test_a_lone_parameter_is_tuned_and_saved(tmp_path: Path) -> None:
    for kwargs, names in (({"blocks": ["embeddings"]}, ["token"]), ({"target_modules": ["extra"]}, ["extra.0"])):
        source = Lists()
        model = get_peft_model(copy.deepcopy(source), SurgicalConfig(**kwargs))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert [name.removeprefix("base_model.model.") for name in trained] == names
        with torch.no_grad():
            model.get_parameter(trained[0]).add_(1)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(source, tmp_path)
        assert torch.equal(loaded.get_parameter(trained[0]), model.get_parameter(trained[0]))


def test_weights_in_the_same_memory_are_refused() -> None:
    """They are no one parameter that could be exchanged in both places."""
    model = MLP()
    model.lin1 = nn.Linear(8, 4)
    model.lin1.weight = nn.Parameter(model.lin0.weight.data.t())
    before = model.lin0.weight
    for names in (["lin0"], ["lin1"]):
        with pytest.raises(SurgicalError, match=r"lin[01]\.weight .*lin[01]\.weight"):
            get_peft_model(model, SurgicalConfig(target_modules=names))
    assert model.lin0.weight is before and before.requires_grad
    whole = torch.randn(8)
    model.norm.weight, model.norm.bias = (nn.Parameter(part) for part in whole.chunk(2))  # side by side, as an LSTM's
    get_peft_model(model, SurgicalConfig(target_modules=["norm"]))


def test_a_layer_that_forbids_setting_its_weights_is_refused() -> None:
    class Sealed(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "bias" and "sealed" in self.__dict__:
                raise TypeError("it is sealed")
            super().__setattr__(name, value)

    model = MLP()
    model.lin1 = Sealed(8, 4)
    model.lin1.sealed = True
    names = list(model.state_dict())
    with pytest.raises(SurgicalError, match=r"lin1\.bias.*Sealed.*it is sealed"):
        get_peft_model(model, SurgicalConfig(target_modules=["lin0", "lin1"]))
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


def test_adapters_may_overlap_in_parts(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0]))
    model.add_adapter("mlps", SurgicalConfig(blocks=[0, 1], target_modules=["mlp"]))
    expected = {}
    for name in ("default", "mlps"):
        model.set_adapter(name)
        step(model, toy)
        expected[name] = model(**toy.batch()).logits
    for name in ("default", "mlps", "default"):
        model.set_adapter(name)
        assert torch.equal(model(**toy.batch()).logits, expected[name])
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(toy.model(), tmp_path)(**toy.batch()).logits, expected["default"])
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path / "mlps")
    assert torch.equal(loaded(**toy.batch()).logits, expected["mlps"])
    with pytest.raises(SurgicalError, match=r"\['default', 'mlps'\]"):
        model.base_model.set_adapter(["default", "mlps"])
    assert torch.equal(model(**toy.batch()).logits, expected["default"])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"blocks": [0]}, {"blocks": [1], "modules_to_save": ["layers.0"]}, "with a SurgicalLayer"),
        ({"blocks": ["head"]}, {"blocks": [0], "modules_to_save": ["classifier"]}, "with a SurgicalLayer"),
        ({"blocks": [0], "modules_to_save": ["classifier"]}, {"blocks": ["head"]}, "with a ModulesToSaveWrapper"),
    ],
)
def test_parts_of_what_another_adapter_tunes_are_refused(first: dict, second: dict, message: str) -> None:
    """A head that one adapter saves and the other tunes was wrapped twice, or refused with the model half changed."""
    model = get_peft_model(TOYS["vit"].model(), SurgicalConfig(**first))
    names = list(model.state_dict())
    grads = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(SurgicalError, match=message):
        model.add_adapter("second", SurgicalConfig(**second))
    assert list(model.state_dict()) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert list(model.peft_config) == ["default"]


def test_other_methods_modules_are_not_wrapped_again() -> None:
    model = TOYS["vit"].model()
    model.add_adapter(LoraConfig(target_modules=["vit.layers.0.mlp.fc1"]), "lora")
    with pytest.raises(SurgicalError, match=r"vit\.layers\.0\.mlp\.fc1 with a Linear"):
        model.add_adapter(SurgicalConfig(blocks=[0]), "surgical_one")


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_a_wrapped_model_is_not_wrapped_again(adapter_name: str) -> None:
    """A notebook cell run twice tuned the old blocks as well, under a config that named only the new ones."""
    model = get_peft_model(TOYS["vit"].model(), SurgicalConfig(blocks=[0]))
    with (
        pytest.raises(SurgicalError, match=r"wrapped already.*unload\(\).*add_adapter"),
        pytest.warns(UserWarning, match="second time"),
    ):
        get_peft_model(model, SurgicalConfig(blocks=[1]), adapter_name=adapter_name)
    base = model.get_base_model()
    with pytest.raises(SurgicalError, match="wrapped already"), pytest.warns(UserWarning):
        get_peft_model(base, SurgicalConfig(blocks=[1]))


@pytest.mark.parametrize(("first", "second"), [("default", "attention"), ("0", "default"), ("default", "weight")])
def test_of_two_adapters_none_is_named_like_a_module(first: str, second: str) -> None:
    """PEFT left the weights below that module out of the other adapter's file, without a word."""
    model = get_peft_model(TOYS["vit"].model(), SurgicalConfig(blocks=[0]), adapter_name=first)
    with pytest.raises(SurgicalError, match="name of a module"):
        model.add_adapter(second, SurgicalConfig(blocks=[1]))
    assert list(model.peft_config) == [first]


def test_two_adapters_may_share_a_config() -> None:
    config = SurgicalConfig(blocks=[0])
    model = get_peft_model(TOYS["vit"].model(), config)
    model.add_adapter("second", config)
    assert layers(model)[0].adapters == ["default", "second"]


def test_a_shared_config_object_means_a_copy_of_the_adapter() -> None:
    """TRL makes its reference so, and then copies what is called `.default.`, which our weights are not."""
    toy, config = TOYS["vit"], SurgicalConfig(blocks=[0])
    model = get_peft_model(toy.model(), config)
    with torch.no_grad():
        model.base_model.model.vit.layers[0].mlp.fc1.weight.add_(1)
    expected = model(**toy.batch()).logits
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("afresh", SurgicalConfig(blocks=[0]))
    model.set_adapter("ref")
    assert torch.equal(model(**toy.batch()).logits, expected)
    model.set_adapter("afresh")
    assert torch.equal(model(**toy.batch()).logits, toy.model()(**toy.batch()).logits)


def test_a_head_that_peft_adds_is_not_saved_twice() -> None:
    config = SurgicalConfig(blocks=["head"], task_type="SEQ_CLS")
    get_peft_model(TOYS["bert"].model(), config)
    assert config.modules_to_save == ["score"]  # PEFT adds both usual names; the other one is the tuned head


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": r"lin\d"},
        {"target_modules": "all-linear"},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ".*", "exclude_modules": ["norm"]},
        {"target_modules": ["norm"]},
    ],
)
def test_a_plain_module_goes_the_whole_way(kwargs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = MLP(), torch.randn(5, 4)
    source = copy.deepcopy(base)
    model = get_peft_model(base, SurgicalConfig(**kwargs))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    tuned = model(x)
    assert not torch.equal(tuned, source.eval()(x))

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(source), tmp_path, adapter_name="other")
    assert torch.equal(loaded(x), tuned)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), source(x))
    merged = loaded.merge_and_unload()
    assert type(merged) is MLP and torch.equal(merged(x), tuned)


def test_many_targets_in_few_blocks_stay_in_those_blocks(tmp_path: Path) -> None:
    """PEFT condenses 20 and more target_modules to suffixes, which name modules of other blocks too."""
    vit = TOYS["vit"]
    names = [
        f"vit.layers.{index}.{part}" for index in range(10) for part in ("mlp.fc1", "mlp.fc2", "attention.q_proj")
    ]
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=["0:2"], target_modules=names))
    model.save_pretrained(tmp_path)
    for wrapped in (model, PeftModel.from_pretrained(vit.model(), tmp_path, is_trainable=True)):
        assert sum(parameter.requires_grad for parameter in wrapped.parameters()) == 2 * 3 * 2


def tuned(model: nn.Module) -> dict[str, set[str]]:
    """Ends of the trainable names, for each wrapped module."""
    found: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            path = next(path for path in model.peft_config["default"].tuned_modules if name.startswith(path + "."))
            found.setdefault(path, set()).add(name.removeprefix(path + "."))
    return found


def layers(model: nn.Module) -> list[SurgicalLayer]:
    return [module for module in model.modules() if isinstance(module, SurgicalLayer)]


def step(model: nn.Module, toy: Toy) -> nn.Module:
    model(**toy.batch()).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model.eval()


KINDS = {
    "all-norm": lambda name: "norm" in name.lower(),
    "all-bias": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("keep_base", ["device", "cpu", "none"])
def test_only_norms_or_biases_of_a_block(name: str, kind: str, keep_base: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    config = SurgicalConfig(blocks=[toy.first, toy.last], target_modules=kind, keep_base=keep_base)
    model = get_peft_model(toy.model(), config)
    names = {n for names in tuned(model).values() for n in names}
    assert len(tuned(model)) == 2 and names and all(KINDS[kind](n) for n in names)
    base = sum(parameter.numel() for parameter in toy.model().parameters())
    own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 0 if keep_base == "none" else own
    storages = {t.untyped_storage().data_ptr(): t.numel() for t in model.state_dict(keep_vars=True).values()}
    assert sum(storages.values()) == base + copies  # what is not tuned is shared, not copied
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, toy)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    paths = [f"base_model.model.{path}." for path in tuned(model)]
    trained = {key.removeprefix(path) for key in changed for path in paths if key.startswith(path)}
    # a key's bias moves all of a row's attention alike: its gradient is 0 but for rounding
    assert (
        trained <= names and {name for name in names - trained if "key" not in name and "k_proj" not in name} == set()
    )
    expected = model(**toy.batch()).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == own
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path).eval()
    assert torch.equal(loaded(**toy.batch()).logits, expected)
    merged = model.merge_and_unload()
    assert torch.equal(merged(**toy.batch()).logits, expected)


def test_statistics_are_saved_with_the_norm_they_belong_to(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = get_peft_model(Net(), SurgicalConfig(blocks=[1], target_modules="all-norm")).train()
    model(torch.randn(8, 4))
    model.save_pretrained(tmp_path)
    keys = {key.rpartition("layers.1.1.")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    x = torch.randn(3, 4)
    expected = model.eval()(x)
    base = model.unload().eval()
    assert not torch.equal(base(x), expected)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), expected)


def test_a_choice_for_each_block(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    config = SurgicalConfig(target_modules={"0": "all", 5: "all-bias", "-1": ["mlp"], "head": "all-bias"})
    model = get_peft_model(toy.model(), config)
    found = tuned(model)
    assert list(found) == ["vit.layers.0", "vit.layers.5", "vit.layers.11.mlp", "classifier"]
    assert len(found["vit.layers.0"]) == len(list(toy.model().vit.layers[0].parameters()))
    assert found["classifier"] == {"bias"} and all(name.endswith("bias") for name in found["vit.layers.5"])
    assert model.peft_config["default"].blocks == ["0", "5", "11", "head"]
    expected = step(model, toy)(**toy.batch()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path).eval()
    assert torch.equal(loaded(**toy.batch()).logits, expected)
    assert tuned(PeftModel.from_pretrained(toy.model(), tmp_path, is_trainable=True)) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": {"0": "all", "0:2": ["mlp"]}}, "'0'.*twice"),
        ({"blocks": [0], "target_modules": {"0": "all", "1": "all"}}, "'1'.*blocks="),
        ({"blocks": [0, 1], "target_modules": {"0": "all"}}, "block '1'"),
        ({"target_modules": {"0": ["nothing"]}}, r"target_modules=\['nothing'\]"),
        ({"target_modules": "all-bias"}, "say which; blocks='all' is everywhere"),
        ({"blocks": {"0": "all"}}, "each block.*target_modules"),
        ({"target_modules": {}}, "selects nothing"),
        ({"target_modules": {"12": "all"}}, "'12'"),
    ],
)
def test_choices_that_contradict_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = TOYS["vit"].model()
    with pytest.raises(SurgicalError, match=message):
        get_peft_model(model, SurgicalConfig(**arguments))
    assert not any("Surgical" in type(module).__name__ for module in model.modules())


def test_a_model_without_biases_has_none_to_tune() -> None:
    with pytest.raises(SurgicalError, match="target_modules='all-bias'"):
        targets(TOYS["llama"].model(), blocks=[0], target_modules="all-bias")


def _mamba() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=24, intermediate_size=32)
    )


class AttentionNet(nn.Module):
    """Torch's own attention, which reads `out_proj.weight` and `in_proj_weight` directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(16, 24)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits.transpose(1, 2), labels))


READ_DIRECTLY = {
    "mamba block": (_mamba, {"blocks": [0]}),
    "mamba conv1d": (_mamba, {"blocks": [0], "target_modules": ["conv1d"]}),
    "mamba mixer": (_mamba, {"blocks": [1], "target_modules": ["mixer"]}),
    "attention block": (AttentionNet, {"blocks": [0]}),
    "attention": (AttentionNet, {"blocks": [0], "target_modules": ["self_attn"]}),
    "attention out_proj": (AttentionNet, {"blocks": [0], "target_modules": ["out_proj"]}),
    "attention biases": (AttentionNet, {"blocks": [0], "target_modules": "all-bias"}),
    "experts": (TOYS["qwen3_moe"].model, {"blocks": [1], "target_modules": ["experts"]}),
    "router": (TOYS["qwen3_moe"].model, {"blocks": [1], "target_modules": ["gate"]}),
    "t5 wo": (TOYS["t5"].model, {"blocks": ["encoder.0"], "target_modules": ["wo"]}),
}


@pytest.mark.parametrize("what", list(READ_DIRECTLY))
def test_weights_that_a_module_reads_directly_are_trained(what: str) -> None:
    build, arguments = READ_DIRECTLY[what]
    torch.manual_seed(0)
    model = get_peft_model(build(), SurgicalConfig(**arguments)).eval()
    toy = TOYS["llama"]
    # a token chooses two experts of four: enough tokens that each expert is chosen
    batch = {key: value.repeat(8, 1) for key, value in toy.batch(size=8).items()}
    if what == "experts":
        generator = torch.Generator().manual_seed(1)
        batch["input_ids"] = torch.randint(3, 24, (64, 6), generator=generator)
    before = model(**batch).logits.detach()
    model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    zero = {"bias"} if what == "attention biases" else set()
    assert gradients
    assert [n for n, g in gradients.items() if g is None] == []
    assert [n for n, g in gradients.items() if not g.any() and n.rpartition(".")[2] not in zero] == []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert not torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("keep_base", ["device", "cpu", "none"])
def test_blocks_that_accelerate_offloads_are_refused(keep_base: str, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = toy.model()
    places = {f"model.layers.{number}": "disk" if number == 2 else "cpu" for number in range(3)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    before = [type(module) for module in model.modules()]
    with pytest.raises(SurgicalError, match=r"model\.layers\.2.*offloaded"):
        get_peft_model(model, SurgicalConfig(blocks=[1, 2], keep_base=keep_base))
    assert [type(module) for module in model.modules()] == before
    tuned = get_peft_model(model, SurgicalConfig(blocks=[1], keep_base=keep_base)).train()  # others may be
    tuned(**toy.batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)


def test_transformers_own_switching_is_all_or_nothing() -> None:
    toy = TOYS["vit"]
    base = toy.model()
    base.add_adapter(SurgicalConfig(blocks=[0, 1]), "a")
    base.add_adapter(SurgicalConfig(blocks=[1]), "b")
    step(base, toy)
    expected = answer(base, toy)
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\]"):
        base.set_adapter(["a", "b"])
    assert base.active_adapters() == ["b"] and torch.equal(answer(base, toy), expected)


def test_a_tuned_module_that_was_replaced_is_not_left_out_of_the_file(tmp_path: Path) -> None:
    model = get_peft_model(TOYS["llama"].model(), SurgicalConfig(blocks=[-1]))
    model.get_base_model().model.layers[2].mlp.down_proj = nn.Linear(32, 16, bias=False)
    with pytest.raises(SurgicalError, match=r"layers\.2\.mlp\.down_proj\.weight"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_container_is_no_model() -> None:
    model = TOYS["vit"].model()
    with pytest.raises(SurgicalError, match="DataParallel"):
        get_peft_model(nn.DataParallel(model), SurgicalConfig(blocks=[0]))  # type: ignore[arg-type]
    assert not any("surgical_" in name for name, _ in model.named_modules())
