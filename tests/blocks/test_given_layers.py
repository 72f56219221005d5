"""Block maps of models whose layers the user names."""

from __future__ import annotations

import copy
import pickle

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError
from tests.blocks.test_blocks import CONTAINERS, assert_partition
from tests.support.toys import TOYS
from tests.support.unusual import UNUSUAL, Unusual


@pytest.fixture(params=UNUSUAL, name="unusual")
def _unusual(request: pytest.FixtureRequest) -> Unusual:
    return UNUSUAL[request.param]


def test_what_cannot_be_guessed_is_refused_with_the_way_to_name_it(unusual: Unusual) -> None:
    with pytest.raises(SurgicalError, match=r"layers=.*from_layers"):
        BlockMap.find(unusual.model())


def test_named_layers_make_a_map(unusual: Unusual) -> None:
    model = unusual.model()
    blocks = BlockMap.from_layers(model, unusual.layers)
    assert blocks.names == unusual.blocks
    assert_partition(blocks, model)
    assert blocks.layers == tuple(name for name in blocks.names if name[-1].isdigit())


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "t5"])
def test_the_map_of_a_known_family_is_the_one_that_is_found(name: str) -> None:
    model = TOYS[name].model()
    found = BlockMap.find(model)
    lists = {found.modules[layer][0].rpartition(".")[0]: None for layer in found.layers}
    named = BlockMap.from_layers(model, list(lists))
    assert (named.names, named.modules, named.stacks) == (found.names, found.modules, found.stacks)


def test_lists_and_stars_are_two_ways_to_say_the_same() -> None:
    model = UNUSUAL["lists"].model()
    one = BlockMap.from_layers(model, "reader.parts")
    assert one.modules == BlockMap.from_layers(model, ["reader.parts.*"]).modules
    assert one.names == ("embeddings", "0", "1", "head")
    both = BlockMap.from_layers(model, "*.parts.*")
    assert both.layers == ("0", "1", "2", "3")
    assert both.modules["2"] == ("writer.parts.0",)


def test_stages_are_named_by_their_list() -> None:
    model = nn.Module()
    model.stages = nn.ModuleList()
    for _ in range(2):
        stage = nn.Module()
        stage.down, stage.parts = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)])
        model.stages.append(stage)
    blocks = BlockMap.from_layers(model, ["stages.0.parts", "stages.1.parts"])
    assert blocks.names == (
        *("stages.0.embeddings", "stages.0.0", "stages.0.1"),
        *("stages.1.embeddings", "stages.1.0", "stages.1.1"),
    )
    assert blocks.parse("stages.1[0]") == ("stages.1.0",)


def test_what_holds_no_parameter_is_no_layer() -> None:
    blocks = BlockMap.from_layers(UNUSUAL["named"].model(), "body.*")
    assert [blocks.modules[name] for name in blocks.layers] == [("body.read",), ("body.gate",), ("body.mix",)]


def test_a_module_with_two_names_is_one_layer() -> None:
    model = nn.Module()
    model.step1 = nn.Linear(2, 2)
    model.step2, model.step3 = model.step1, nn.Linear(2, 2)
    assert BlockMap.from_layers(model, "step*").names == ("0", "1")


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_change_nothing(container: str, unusual: Unusual) -> None:
    bare = BlockMap.from_layers(unusual.model(), unusual.layers)
    model = CONTAINERS[container](unusual.model())
    assert BlockMap.from_layers(model, unusual.layers) == bare
    assert_partition(bare, model)


@pytest.mark.parametrize("container", ["data_parallel", "compiled", "fsdp"])
def test_the_map_of_a_wrapped_model_is_of_the_layers_in_its_config(container: str, unusual: Unusual) -> None:
    bare = BlockMap.from_layers(unusual.model(), unusual.layers)
    config = SurgicalConfig(blocks=[unusual.first], layers=unusual.layers)
    models = [CONTAINERS[container](get_peft_model(unusual.model(), copy.deepcopy(config)))]
    if container != "data_parallel":  # PEFT wraps what it is given
        models.append(get_peft_model(CONTAINERS[container](unusual.model()), copy.deepcopy(config)))
    for model in models:
        assert BlockMap.find(model) == BlockMap.find(copy.deepcopy(model)) == bare
        assert_partition(bare, model)


def test_unloading_forgets_the_layers(unusual: Unusual) -> None:
    model = get_peft_model(unusual.model(), SurgicalConfig(blocks=[unusual.first], layers=unusual.layers))
    with pytest.raises(SurgicalError, match="layers="):
        BlockMap.find(model.unload())


def test_another_method_in_the_model_brings_no_layers() -> None:
    model = get_peft_model(TOYS["vit"].model(), LoraConfig(target_modules="all-linear"))
    assert BlockMap.find(model).layer_paths == ()


def test_a_map_goes_through_pickle(unusual: Unusual) -> None:
    blocks = BlockMap.from_layers(unusual.model(), unusual.layers)
    assert blocks.depths[unusual.blocks[-1]] == len(blocks.layers) + 1
    assert pickle.loads(pickle.dumps(blocks)) == blocks


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.ModuleList()
        self.silent = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ("layer", "'layers'"),  # the nearest name
        ("layers.0.0", "Linear"),  # no list
        ("empty", "empty"),
        ("silent", "parameter"),
        ("silent.*", "parameter"),
        ("rungs*", "matches"),
        ("layers*0", "matches"),  # a star stands for part of one name
        (["layers", "layers"], "twice"),
        (["layers", "layers.*"], "twice"),
        (["layers", "layers.0"], "layers.0.0"),  # one lies in the other
        ("", "names no layers"),
        ([], "names no layers"),
        ([""], "names no layers"),
        (3, "names no layers"),
        ([["layers"]], "names no layers"),
    ],
)
def test_refused(layers: object, why: str) -> None:
    with pytest.raises(SurgicalError) as raised:
        BlockMap.from_layers(Bare(), layers)  # type: ignore[arg-type]
    assert why in str(raised.value)
    assert str(layers).strip("[]") in str(raised.value)


def test_a_layer_without_weights_of_its_own_cannot_be_chosen() -> None:
    """Its index chose nothing at all, without a word."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    for ours, theirs in zip(model.layers[1], model.layers[0], strict=True):
        ours.weight, ours.bias = theirs.weight, theirs.bias
    blocks = BlockMap.find(model)
    assert blocks.layers == ("0", "2")
    assert blocks.parse("0:2") == ("0",)
    for choice in (1, "1", -2, [1, 2], "1:2"):
        with pytest.raises(SurgicalError):
            blocks.parse(choice)


def test_masses_of_stars_match_in_no_time() -> None:
    model = nn.Module()
    model.add_module("a" * 200, nn.Linear(1, 1))
    with pytest.raises(SurgicalError, match="matches"):
        BlockMap.from_layers(model, "*a" * 60 + "b")
