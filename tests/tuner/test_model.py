from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgical_peft import (
    BlockScores,
    SurgicalConfig,
    SurgicalError,
    SurgicalModel,
    get_surgical_model,
    score_blocks,
    top_k,
)
from surgical_peft.criteria.budget import Budget
from surgical_peft.tuner.eval_mode import reads_training
from tests.support.toys import TOYS, Toy
from tests.support.wrapping import layers, logits, nudge

# frozen_eval


class ConvNet(nn.Module):
    """Blocks with BatchNorm and dropout; every number of its forward depends on their modes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)) for _ in range(3)
        )
        self.dropout = nn.Dropout(0.5)
        self.dropped = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropped(self.dropout(x.mean((2, 3)))))


def in_train_mode(model: nn.Module) -> set[str]:
    """Leaf modules in train mode that behave otherwise in it, as the forward pass meets them."""
    met: set[str] = set()
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: met.add(names[module]) if module.training else None)
        for module in model.modules()
        if reads_training(module)
    ]
    model(torch.ones(2, 1, 4, 4))
    for hook in hooks:
        hook.remove()
    return {name.removeprefix("base_model.model.") for name in met}


TUNED_ONE = {"layers.1.1", "layers.1.2"}


@pytest.mark.parametrize("mode_before", [True, False])
def test_in_train_mode_only_tuned_modules_train(mode_before: bool) -> None:
    model = get_peft_model(ConvNet().train(mode_before), SurgicalConfig(blocks=[1]))
    model.train()
    assert in_train_mode(model) == TUNED_ONE
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_model_wrapped_in_train_mode_needs_no_further_call() -> None:
    assert in_train_mode(get_peft_model(ConvNet().train(), SurgicalConfig(blocks=[1]))) == TUNED_ONE
    assert in_train_mode(get_peft_model(ConvNet().eval(), SurgicalConfig(blocks=[1]))) == set()


def test_frozen_eval_can_be_turned_off() -> None:
    model = get_peft_model(ConvNet(), SurgicalConfig(blocks=[1], frozen_eval=False))
    model.train()
    assert {"stem.1", "layers.0.1", "layers.0.2", "dropout", "dropped.0", *TUNED_ONE} < in_train_mode(model)


def test_what_is_alike_in_both_modes_stays_in_train_mode() -> None:
    """NEFTune's hook asks the embeddings, for one."""
    model = get_peft_model(ConvNet(), SurgicalConfig(blocks=[1])).train().get_base_model()
    still = {name for name, module in model.named_modules() if not module.training and "surgical_" not in name}
    assert still == {"stem.1", *(f"layers.{i}.{j}" for i in (0, 2) for j in (1, 2)), "dropout", "dropped.0"}
    bert = get_peft_model(TOYS["bert"].model(), SurgicalConfig(blocks=[-1])).train().get_base_model()
    assert all(module.training for module in bert.bert.embeddings.modules() if isinstance(module, nn.Embedding))
    assert not bert.bert.embeddings.dropout.training and not bert.bert.encoder.layer[0].attention.self.training
    assert all(module.training for module in bert.bert.encoder.layer[2].modules())


def test_switching_adapters_switches_modes() -> None:
    """The blocks of the adapter before stayed in train mode, those of the new one in eval mode."""
    model = get_peft_model(ConvNet(), SurgicalConfig(blocks=[1]))
    model.add_adapter("second", SurgicalConfig(blocks=[2]))
    model.train()
    assert in_train_mode(model) == TUNED_ONE
    model.set_adapter("second")
    assert in_train_mode(model) == {"layers.2.1", "layers.2.2"}
    model.eval()
    model.set_adapter("default")
    assert in_train_mode(model) == set()


def test_a_new_head_trains_too() -> None:
    model = get_peft_model(ConvNet(), SurgicalConfig(blocks=[1], modules_to_save=["dropped"])).train()
    assert in_train_mode(model) == TUNED_ONE | {"dropped.modules_to_save.default.0"}


@pytest.mark.parametrize("frozen_eval", [True, False])
def test_batchnorm_statistics_of_frozen_blocks_stand_still(frozen_eval: bool) -> None:
    model = get_peft_model(ConvNet(), SurgicalConfig(blocks=[1], frozen_eval=frozen_eval))
    before = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    model(torch.randn(4, 1, 4, 4)).sum().backward()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    tuned = {name for name in before if ".layers.1." in name}
    assert tuned <= moved
    assert (moved == tuned) is frozen_eval


def test_statistics_that_move_in_frozen_blocks_are_the_adapters(tmp_path: Path) -> None:
    """With frozen_eval=False: they were lost when the adapter was saved, and stayed moved without it."""
    source, x = ConvNet().eval(), torch.randn(4, 1, 4, 4)
    before = source(x)
    model = get_peft_model(copy.deepcopy(source), SurgicalConfig(blocks=[1], frozen_eval=False)).train()
    model(x)
    tuned = model.eval()(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(source), tmp_path)(x), tuned)
    assert torch.equal(model.unload()(x), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = load_file(tmp_path / "adapter_model.safetensors")
    for field in ("tuned_modules", "new_weights", "frozen_fingerprint"):  # as an earlier version saved it
        del config[field]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: t for k, t in keys.items() if ".layers.1." in k}, tmp_path / "adapter_model.safetensors")
    PeftModel.from_pretrained(source, tmp_path)


def test_tuned_batchnorm_statistics_are_saved(tmp_path: Path) -> None:
    source = ConvNet().eval()
    model = get_peft_model(copy.deepcopy(source), SurgicalConfig(blocks=[1])).train()
    x = torch.randn(4, 1, 4, 4)
    model(x)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(source, tmp_path)(x), model(x))


def test_one_config_serves_two_models(vit: Toy) -> None:
    """PEFT puts a set of names in the place of "all-linear", which was no choice of ours at the second model."""
    config = SurgicalConfig(target_modules="all-linear")
    first = {layer for layer, _ in get_peft_model(vit.model(), config).named_parameters()}
    assert {layer for layer, _ in get_peft_model(vit.model(), config).named_parameters()} == first


# merging and deleting


def test_a_refused_merge_merges_nothing() -> None:
    """Layers before the one that refused were merged, or even unwrapped."""
    model = nudge(get_peft_model(TOYS["vit"].model(), SurgicalConfig(blocks=["0:3"])))
    model.add_adapter("second", SurgicalConfig(blocks=["2:4"]))
    expected = logits(model, TOYS["vit"].batch())
    weight = model.base_model.model.vit.layers[2].mlp.fc1.weight
    weight.data[0, 0] = float("nan")
    count = len(layers(model))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"safe_merge": True}, r"adapter default seems to be broken: weight of a Linear has NaN"),
        ({"adapter_names": ["default", "second"]}, "merge one"),
        ({"adapter_names": ["nope"]}, "adapter 'nope' does not exist. Adapters: default, second"),
    ]
    for kwargs, message in refused:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(SurgicalError, match=message):
                merge(**kwargs)
            assert len(layers(model)) == count
            assert not any(layer.merged for layer in layers(model))
            assert model.base_model.model.vit.layers[2].mlp.fc1.weight is weight
    weight.data[0, 0] = 0.0
    assert logits(model, TOYS["vit"].batch()).shape == expected.shape


def test_a_named_adapter_is_merged_whatever_is_active(vit: Toy) -> None:
    model = nudge(get_peft_model(vit.model(), SurgicalConfig(blocks=[0])))
    tuned = logits(model, vit.batch())
    model.add_adapter("second", SurgicalConfig(blocks=[0]))
    model.set_adapter("second")
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["default"]), vit.batch()), tuned)


def test_whole_weights_are_not_added_up(vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0]))
    model.add_adapter("second", SurgicalConfig(blocks=[0]))
    with pytest.raises(SurgicalError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert list(model.peft_config) == ["default", "second"]


def test_of_three_adapters_the_next_is_active_everywhere(vit: Toy) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=["0:3"]))
    model.add_adapter("b", SurgicalConfig(blocks=[0]))
    model.add_adapter("c", SurgicalConfig(blocks=["0:2"]))
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert all(layer.active_adapters == ["b"] for layer in layers(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".layers.0." in name for name in trained)


def test_setting_an_adapter_while_merged_unmerges(vit: Toy) -> None:
    model = nudge(get_peft_model(vit.model(), SurgicalConfig(blocks=[0])))
    model.add_adapter("second", SurgicalConfig(blocks=[1]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("second")
    assert torch.equal(logits(model, vit.batch()), logits(vit.model(), vit.batch()))


# get_surgical_model


def loader(toy: Toy) -> DataLoader:
    batch = toy.batch(size=8)
    examples = [{key: value[index] for key, value in batch.items()} for index in range(8)]
    return DataLoader(examples, batch_size=4)


def test_explicit_blocks_need_no_data(vit: Toy) -> None:
    config = SurgicalConfig(blocks=[-1])
    model = get_surgical_model(vit.model(), config, adapter_name="mine")
    assert isinstance(model.base_model, SurgicalModel)
    assert model.peft_config["mine"].blocks == ["11"]
    assert config.blocks == [-1]  # so that it can be used for a model of another depth


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "t5", "qwen3_moe"])
def test_auto_takes_the_blocks_that_score_highest(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    scores = score_blocks(toy.model(), loader(toy), criterion="rgn")
    chosen = top_k(scores, 2)
    config = SurgicalConfig(blocks="auto", num_blocks=2, criterion="rgn", frozen_eval=False)
    before = copy.deepcopy(config)

    model = get_surgical_model(toy.model(), config, loader(toy))

    assert config == before
    final = model.peft_config["default"]
    assert final.blocks == list(chosen.blocks)
    assert final.criterion is final.num_blocks is None
    assert not final.frozen_eval
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["blocks"] == list(chosen.blocks)
    written["selection"].pop("refused", None)  # tied embeddings, which score low
    assert written["selection"] == json.loads(json.dumps(chosen.record))
    assert written["selection"]["scores"] == pytest.approx(scores.values)
    assert PeftModel.from_pretrained(toy.model(), tmp_path).peft_config["default"].blocks == list(chosen.blocks)


def test_auto_takes_any_function(vit: Toy) -> None:
    def deepest(weights: list[Tensor], grads: list[Tensor]) -> float:
        deepest.calls += 1
        return float(deepest.calls)

    deepest.calls = 0
    config = SurgicalConfig(blocks="auto", criterion=deepest, num_blocks=2)
    model = get_surgical_model(vit.model(), config, loader(vit), num_batches=1)
    assert model.peft_config["default"].blocks == ["embeddings", "0"]  # last to come in the backward pass
    assert model.peft_config["default"].selection["criterion"].endswith("deepest")


def test_auto_passes_loss_and_batches_on(vit: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(model: nn.Module, dataloader: DataLoader, criterion: str, budget: Budget, **kwargs: Any) -> BlockScores:
        seen.update(kwargs, criterion=criterion, budget=budget.steps)
        return BlockScores({"3": 1.0}, {"3": 1}, {"3": "3"}, (), "rgn", "block", 7, "ViT")

    monkeypatch.setattr("surgical_peft.auto.score_blocks", fake)
    config = SurgicalConfig(blocks="auto", num_blocks=1)
    model = get_surgical_model(vit.model(), config, loader(vit), num_batches=7, loss_fn=max, steps=90)
    assert seen == {"criterion": "probe", "num_batches": 7, "loss_fn": max, "budget": 45.0}
    assert model.peft_config["default"].blocks == ["3"]


def test_auto_without_data_is_refused(vit: Toy) -> None:
    config = SurgicalConfig(blocks="auto")
    with pytest.raises(SurgicalError, match="data"):
        get_surgical_model(vit.model(), config)
    with pytest.raises(SurgicalError, match="call get_surgical_model"):
        get_peft_model(vit.model(), config)


# the cost of a forward pass


@pytest.mark.parametrize("name", TOYS)
def test_a_forward_pass_runs_the_same_functions(name: str) -> None:
    """Unlike time, what is called is the same at every run."""
    toy = TOYS[name]
    blocks = [block for block in toy.blocks if block[-1].isdigit()]

    def called(model: nn.Module) -> list[str]:
        seen: list[str] = []
        logits(model, toy.batch())  # what is made once is made now
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_qualname) if event == "call" else None)
        try:
            logits(model, toy.batch())
        finally:
            sys.setprofile(before)
        return seen

    model = get_peft_model(toy.model(), SurgicalConfig(blocks=blocks)).eval()
    assert called(model.get_base_model()) == called(toy.model())
