"""A dense patch makes of a base model's checkpoint what `merged` would be, and its undo makes it what it was."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.export.export import export
from surgical_peft.export.patch import apply_patch
from tests.support.families import FAMILIES
from tests.support.saved_adapters import logits, saved, toy_adapter
from tests.support.toys import TOYS

NAME = "model.safetensors"


def plain(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, by safetensors alone."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in `base/` in three files, its adapter, and the `patch/` and `undo/` of that."""
    folder = tmp_path_factory.mktemp("made")
    toy = TOYS["llama"]
    toy.model().save_pretrained(folder / "base", max_shard_size="8KB")  # type: ignore[operator]
    base = type(toy.build()).from_pretrained(folder / "base").eval()  # type: ignore[attr-defined]
    saved(base, SurgicalConfig(blocks=[0, -1]), folder / "adapter")
    export(folder / "adapter", folder / "merged", "merged")
    export(folder / "adapter", folder / "out", "patch")
    return folder


@pytest.fixture
def served(made: Path, tmp_path: Path) -> Path:
    """A copy of the base model's checkpoint, which a patch may change."""
    return Path(shutil.copytree(made / "base", tmp_path / "served"))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("qwen3_moe", [1]), ("gpt2", [0]), ("llama_tied", ["embeddings"])],
)
def test_the_patched_checkpoint_is_the_merged_one_and_the_undone_one_the_base(
    name: str, blocks: list[Any], tmp_path: Path
) -> None:
    toy = FAMILIES.get(name) or TOYS[name]
    base, tuned = toy_adapter(toy, tmp_path, blocks=blocks)
    export(tmp_path / "adapter", tmp_path / "merged", "merged")
    layers = export(tmp_path / "adapter", tmp_path / "out", "patch")["layers"]
    before = contents(tmp_path / "base")
    assert apply_patch(tmp_path / "out" / "patch", tmp_path / "base").layers == tuple(layers)
    assert same(plain(tmp_path / "base"), plain(tmp_path / "merged"))
    again = type(base).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(again, toy), logits(tuned, toy))
    apply_patch(tmp_path / "out" / "undo", tmp_path / "base")
    assert contents(tmp_path / "base") == before


def test_in_several_files_only_those_change_that_hold_a_tuned_layer(made: Path, served: Path) -> None:
    before = contents(served)
    report = apply_patch(made / "out" / "patch", served)
    assert same(plain(served), plain(made / "merged"))
    after = contents(served)
    assert set(report.files) == {name for name in before if before[name] != after[name]} < before.keys()
    assert report.layers == ("model.layers.0", "model.layers.2")
    apply_patch(made / "out" / "undo", served)
    assert contents(served) == before


def test_a_patch_holds_layers_whole_for_a_server_packs_their_weights(tmp_path: Path) -> None:
    toy_adapter(TOYS["llama"], tmp_path, target_modules={"1": ["self_attn.q_proj"]}, blocks=[1])
    report = export(tmp_path / "adapter", tmp_path / "out", "patch")
    layer = {name for name in plain(tmp_path / "base") if name.startswith("model.layers.1.")}
    old, new = plain(tmp_path / "out" / "undo"), plain(tmp_path / "out" / "patch")
    assert old.keys() == new.keys() == layer
    assert [name for name in layer if not torch.equal(old[name], new[name])] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    assert report["layers"] == ["model.layers.1"] and report["rounded"] == 0


def test_it_is_read_as_vllm_reads_it(made: Path) -> None:
    """The checks of vLLM's `load_checkpoint_weight_patches` for dense patches, by its documented rule."""
    base = plain(made / "base")
    for folder in ("patch", "undo"):
        with safe_open(made / "out" / folder / NAME, "pt") as file:
            patches = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
        assert len(patches) > 9
        for name, tensor in patches:
            values = tensor.reshape(-1)
            assert name and values.ndim == 1
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(base[name].shape), base[name].dtype)


def test_a_checkpoint_that_holds_both_ends_of_a_tied_weight_gets_both(tmp_path: Path) -> None:
    toy = FAMILIES["llama_tied"]
    toy_adapter(toy, tmp_path, blocks=["embeddings"])
    weights = load_file(tmp_path / "base" / NAME)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / NAME, metadata={"format": "pt"})
    export(tmp_path / "adapter", tmp_path / "out", "patch")
    apply_patch(tmp_path / "out" / "patch", tmp_path / "base")
    patched = plain(tmp_path / "base")
    assert torch.equal(patched["lm_head.weight"], patched["model.embed_tokens.weight"])
    assert not torch.equal(patched["lm_head.weight"], weights["lm_head.weight"])


def test_a_wider_adapter_is_rounded_to_the_checkpoint_and_the_report_says_so(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    toy.model().to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = type(toy.build()).from_pretrained(tmp_path / "base", dtype=torch.float32)  # type: ignore[attr-defined]
    saved(base, SurgicalConfig(blocks=[1]), tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", "merged")
    report = export(tmp_path / "adapter", tmp_path / "out", "patch")
    assert report["rounded"] == report["tensors"] > 5
    apply_patch(tmp_path / "out" / "patch", tmp_path / "base")
    merged = plain(tmp_path / "merged")
    assert same(plain(tmp_path / "base"), {name: tensor.to(torch.bfloat16) for name, tensor in merged.items()})


def test_lora_beside_the_blocks_is_in_the_patch(tmp_path: Path) -> None:
    toy_adapter(TOYS["llama"], tmp_path, blocks=[1], lora={"r": 2, "target_modules": ["down_proj"]})
    export(tmp_path / "adapter", tmp_path / "merged", "merged")
    export(tmp_path / "adapter", tmp_path / "out", "patch")
    apply_patch(tmp_path / "out" / "patch", tmp_path / "base")
    assert same(plain(tmp_path / "base"), plain(tmp_path / "merged"))


def test_what_is_in_place_is_not_put_there_again(made: Path, served: Path) -> None:
    with pytest.raises(SurgicalError, match="already"):
        apply_patch(made / "out" / "undo", served)  # before the patch
    apply_patch(made / "out" / "patch", served)
    before = contents(served)
    with pytest.raises(SurgicalError, match="already"):
        apply_patch(made / "out" / "patch", served)
    assert contents(served) == before


def _other_dtype(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})


def _other_values(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def _other_model(folder: Path) -> None:
    shutil.rmtree(folder)
    TOYS["gpt2"].model().save_pretrained(folder)  # type: ignore[operator]


def _link(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        shutil.move(path, folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)


def _cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-4])


def _outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../{part}" for name, part in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_dtype, "bfloat16"),
        (_other_values, "another patch"),
        (_other_model, "another model"),
        (_link, "link"),
        (_cut, "corrupt"),
        (_outside, "index"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "lacks"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no checkpoint"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_left_as_it_is(damage: Any, message: str, made: Path, served: Path) -> None:
    damage(served)
    before = contents(served) if served.is_dir() else {}
    with pytest.raises(SurgicalError, match=message):
        apply_patch(made / "out" / "patch", served)
    assert (contents(served) if served.is_dir() else {}) == before


@pytest.mark.parametrize("change", [lambda weight: weight[1:], lambda weight: weight.to(torch.bfloat16)])
def test_a_patch_of_other_shapes_than_the_checkpoint_is_refused(
    change: Any, made: Path, served: Path, tmp_path: Path
) -> None:
    weights = plain(made / "out" / "patch")
    with safe_open(made / "out" / "patch" / NAME, "pt") as file:
        metadata = file.metadata()
    name = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "changed").mkdir()
    save_file({**weights, name: change(weights[name]).clone()}, tmp_path / "changed" / NAME, metadata=metadata)
    with pytest.raises(SurgicalError, match=name):
        apply_patch(tmp_path / "changed", served)
    assert contents(served) == contents(made / "base")


def test_what_is_no_patch(made: Path, served: Path, tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    weights = plain(made / "out" / "patch")
    for metadata in ({"format": "pt"}, {"patch": "surgical_peft.patch.1", "base": json.dumps({"x": "y"})}):
        save_file(weights, tmp_path / "older" / NAME, metadata=metadata)
        with pytest.raises(SurgicalError, match=r"no patch of|damaged"):
            apply_patch(tmp_path / "older", served)
    with pytest.raises(SurgicalError, match="patch or undo"):
        apply_patch(made / "out", served)
    with pytest.raises(SurgicalError, match="no patch"):
        apply_patch(made / "adapter", served)
    assert contents(served) == contents(made / "base")


@pytest.mark.parametrize("folder", ["patch", "undo"])
def test_an_interrupted_patch_goes_on_or_back(
    folder: str, made: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, renamed = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if renamed:
            raise OSError("no space left")
        renamed.append(target)
        return rename(self, target)

    before = contents(served)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="space"):
        apply_patch(made / "out" / "patch", served)
    monkeypatch.undo()
    assert contents(served).keys() == before.keys()  # no temporary is left
    assert not same(plain(served), plain(made / "base")) and not same(plain(served), plain(made / "merged"))
    apply_patch(made / "out" / folder, served)
    assert same(plain(served), plain(made / ("merged" if folder == "patch" else "base")))


def test_a_folder_that_cannot_be_written_to(made: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(served))

    before = contents(served)
    monkeypatch.setattr("surgical_peft.atomic_files.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError):
        apply_patch(made / "out" / "patch", served)
    assert contents(served) == before


class _Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_what_no_patch_can_hold(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    base, _ = toy_adapter(toy, tmp_path)
    in_memory = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "base"))
    in_memory.load_state_dict(base.state_dict())
    in_memory.config._name_or_path = in_memory.name_or_path = ""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(1)  # type: ignore[union-attr, operator]
    saved(_Alone(), SurgicalConfig(blocks=[0]), tmp_path / "alone")
    for adapter, model, message in (
        ("adapter", in_memory, "has none"),
        ("adapter", changed, "is not what"),
        ("alone", _Alone(), "transformers"),
    ):
        with pytest.raises(SurgicalError, match=message):
            export(tmp_path / adapter, tmp_path / "out", "patch", base_model=model)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_model_without_its_head_has_other_names(tmp_path: Path) -> None:
    toy = TOYS["gpt2"]
    toy.model().base_model.save_pretrained(tmp_path / "base")  # type: ignore[operator, union-attr]
    base = type(toy.build()).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    tuned = saved(base, SurgicalConfig(blocks=[1]), tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "out", "patch")
    assert report["layers"] == ["h.1"]
    apply_patch(tmp_path / "out" / "patch", tmp_path / "base")
    again = type(toy.build()).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(again, toy), logits(tuned, toy))


def test_an_adapter_that_was_not_trained_is_no_patch(tmp_path: Path) -> None:
    toy_adapter(TOYS["llama"], tmp_path, size=0.0)
    with pytest.raises(SurgicalError, match="nothing"):
        export(tmp_path / "adapter", tmp_path / "out", "patch")


def test_a_new_head_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    toy = TOYS["bert"]
    toy.model().base_model.save_pretrained(tmp_path / "base")  # type: ignore[operator, union-attr]
    base = type(toy.build()).from_pretrained(tmp_path / "base", num_labels=3)  # type: ignore[attr-defined]
    saved(base, SurgicalConfig(blocks=[0], modules_to_save=["classifier"]), tmp_path / "adapter")
    with pytest.raises(SurgicalError, match=r"classifier.*merged"):
        export(tmp_path / "adapter", tmp_path / "out", "patch")
