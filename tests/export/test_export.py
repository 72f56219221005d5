"""An exported adapter loads without this package, and gives the same numbers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from surgical_peft import SurgicalConfig, SurgicalError, export_to_peft
from surgical_peft.export import delta
from surgical_peft.export import low_rank as lowrank
from surgical_peft.export.export import export
from surgical_peft.tuner.loading.fingerprint import fingerprint
from tests.support.families import FAMILIES
from tests.support.saved_adapters import logits, saved, toy_adapter
from tests.support.toys import TOYS

WEIGHTS = "adapter_model.safetensors"
ALONE = ("vit", "bert", "llama", "t5")


class Plain(nn.Module):
    """No transformers model: a list of blocks, and a second tower whose paths end as the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.tower = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.tower["layers"]]:
            x = layer(x).relu()
        return x


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


_CHILD = """
import sys
sys.modules["surgical_peft"] = None  # any import of it raises ImportError
from pathlib import Path
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

torch.set_num_threads(1)
try:
    import surgical_peft
    raise SystemExit("not blocked")
except ImportError:
    pass
for folder in sorted(Path(sys.argv[1]).iterdir()):
    # cloned, for where a tensor begins in memory decides how it is multiplied
    batch = {name: tensor.clone() for name, tensor in load_file(folder / "batch.safetensors").items()}
    expected = load_file(folder / "expected.safetensors")["out"]
    if folder.name == "plain":
        base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        base.load_state_dict(load_file(folder / "base.safetensors"))
    else:
        config = transformers.AutoConfig.from_pretrained(folder / "base")
        base = getattr(transformers, config.architectures[0]).from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "out").eval()
    with torch.no_grad():
        out = model(batch["x"]) if folder.name == "plain" else model(**batch).logits
    print(folder.name, torch.equal(out, expected))
"""


def test_a_process_without_this_package_loads_it(tmp_path: Path) -> None:
    for name in ALONE:
        toy = TOYS[name]
        _, tuned = toy_adapter(toy, tmp_path / name)
        save_file(toy.batch(), tmp_path / name / "batch.safetensors")
        save_file({"out": logits(tuned, toy)}, tmp_path / name / "expected.safetensors")
    folder = tmp_path / "plain"
    folder.mkdir()
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    save_file(base.state_dict(), folder / "base.safetensors")
    x = torch.randn(3, 4)
    with torch.no_grad():
        tuned = saved(base, SurgicalConfig(target_modules=["2"]), folder / "adapter")
        save_file({"out": tuned(x)}, folder / "expected.safetensors")
    save_file({"x": x}, folder / "batch.safetensors")
    for folder in tmp_path.iterdir():
        export_to_peft(folder / "adapter", folder / "out")
        assert (folder / "out" / WEIGHTS).read_bytes() == (folder / "adapter" / WEIGHTS).read_bytes()
    done = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    assert lines == [f"{name} True" for name in sorted([*ALONE, "plain"])], done.stderr[-2000:]


def test_a_new_head_comes_along(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    base, tuned = toy_adapter(toy, tmp_path, blocks=[0], modules_to_save=["classifier"])
    export_to_peft(tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "vit.layers.0"] and config["peft_type"] == "LORA"
    assert torch.equal(logits(loaded(base, tmp_path / "out"), toy), logits(tuned, toy))


def test_a_task_type_comes_along(tmp_path: Path) -> None:
    """With SEQ_CLS, PEFT adds the head by itself: its checkpoint here is of another class and has none."""
    toy = TOYS["bert"]
    toy.model().bert.save_pretrained(tmp_path / "base")  # type: ignore[union-attr]
    torch.manual_seed(1)
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    config = SurgicalConfig(blocks=[1], task_type="SEQ_CLS")
    tuned = saved(copy.deepcopy(base), config, tmp_path / "adapter")
    for name in ("peft", "delta"):
        export(tmp_path / "adapter", tmp_path / name, name)
    assert torch.equal(logits(loaded(base, tmp_path / "peft"), toy), logits(tuned, toy))
    entries = _entries(tmp_path / "delta")  # nothing says what the head was
    assert all(("base" in entry) == ("classifier" not in name) for name, entry in entries.items())
    merged = export(tmp_path / "adapter", tmp_path / "merged", "merged")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged["format"] == "merged" and torch.equal(logits(again, toy), logits(tuned, toy))


def test_whole_norms_in_a_block_are_whole_modules(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    base, tuned = toy_adapter(toy, tmp_path, blocks=[1], target_modules="all-norm")
    export_to_peft(tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention")]
    assert torch.equal(logits(loaded(base, tmp_path / "out"), toy), logits(tuned, toy))


def test_lora_beside_the_blocks_comes_along(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base, tuned = toy_adapter(toy, tmp_path, blocks=[-1], lora=lora)
    export_to_peft(tmp_path / "adapter", tmp_path / "out")
    assert any("lora_A" in key for key in load_file(tmp_path / "out" / WEIGHTS))
    assert torch.equal(logits(loaded(base, tmp_path / "out"), toy), logits(tuned, toy))
    assert not torch.equal(logits(base, toy), logits(tuned, toy))


@pytest.mark.parametrize("keep_base", ["device", "none"])
def test_lora_beside_the_blocks_is_merged_and_in_the_delta(keep_base: str, tmp_path: Path) -> None:
    toy = TOYS["llama"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base, tuned = toy_adapter(toy, tmp_path, blocks=[-1], lora=lora, keep_base=keep_base)
    export(tmp_path / "adapter", tmp_path / "merged", "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(again, toy), logits(tuned, toy), atol=1e-5, rtol=1e-5)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    export(tmp_path / "delta", tmp_path / "back", "adapter")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(SurgicalError, match="LoRA"):
        export(tmp_path / "adapter", tmp_path / "lora", "lora", rank=2)


def test_a_new_head_is_kept_whole_whatever_the_base_has_there(tmp_path: Path) -> None:
    """What a new head was before tuning is chance: a difference from it would be of no use elsewhere."""
    toy = TOYS["vit"]
    base, tuned = toy_adapter(toy, tmp_path, blocks=[0], modules_to_save=["classifier"])
    for name, rank in (("delta", None), ("lora", 64)):
        export(tmp_path / "adapter", tmp_path / name, name, base_model=base, rank=rank)
    nn.init.normal_(base.classifier.weight)  # type: ignore[union-attr,arg-type]
    export(tmp_path / "delta", tmp_path / "back", "adapter", base_model=base)
    assert torch.equal(logits(loaded(base, tmp_path / "back"), toy), logits(tuned, toy))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "lora"), toy), logits(tuned, toy), atol=1e-5, rtol=1e-5)


def test_a_head_of_several_layers_is_one_module(tmp_path: Path) -> None:
    """PEFT saves RoBERTa's `classifier`; to name `classifier.dense` beside it would wrap the one inside the other."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(**small, vocab_size=24, num_labels=3)).eval()
    tuned = saved(copy.deepcopy(base), SurgicalConfig(blocks=[1], task_type="SEQ_CLS"), tmp_path / "adapter")
    toy = TOYS["bert"]
    for name, rank in (("peft", None), ("lora", 64)):
        report = export(tmp_path / "adapter", tmp_path / name, name, base_model=base, rank=rank)
        other = logits(loaded(base, tmp_path / name), toy)
        torch.testing.assert_close(other, logits(tuned, toy), atol=1e-5, rtol=1e-5)
    assert [path for path in report["whole_modules"] if "classifier" in path] == ["classifier"]


def test_biases_alone_as_lora(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    base, tuned = toy_adapter(toy, tmp_path, torch.bfloat16, 0.2, blocks=[0], target_modules="all-bias")
    report = export(tmp_path / "adapter", tmp_path / "out", "lora", rank=1)
    assert report["lora_modules"] == 6 and len(report["whole_modules"]) == 2
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), toy), logits(tuned, toy), atol=2e-2, rtol=2e-2)
    assert (logits(base, toy) - logits(tuned, toy)).abs().max() > 0.05


def test_biases_alone_are_refused(tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path, blocks=[0], target_modules="all-bias")
    before = tree(tmp_path)
    with pytest.raises(SurgicalError, match=r"without its weight.*--format"):
        export_to_peft(tmp_path / "adapter", tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_path_that_ends_another_is_refused(tmp_path: Path) -> None:
    """PEFT matches by `endswith`, without a dot: `layers.1` would take `tower.layers.1` too."""
    saved(plain(), SurgicalConfig(target_modules=r"layers\.1"), tmp_path / "adapter")
    with pytest.raises(SurgicalError, match=r"layers.1.*tower.layers.1"):
        export_to_peft(tmp_path / "adapter", tmp_path / "out", base_model=plain())
    assert not (tmp_path / "out").exists()
    saved(plain(), SurgicalConfig(target_modules=r"tower\.layers\.1"), tmp_path / "other")
    export_to_peft(tmp_path / "other", tmp_path / "out", base_model=plain())
    with pytest.raises(SurgicalError, match="no module"):
        export_to_peft(tmp_path / "other", tmp_path / "out", base_model=nn.Linear(4, 4))


def test_two_towers_are_kept_apart(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = CLIPConfig(
        text_config={**small, "vocab_size": 24, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(values).save_pretrained(tmp_path / "base")
    base = CLIPModel.from_pretrained(tmp_path / "base").eval()
    config = SurgicalConfig(target_modules=r"vision_model\.encoder\.layers\.1")
    tuned = saved(copy.deepcopy(base), config, tmp_path / "adapter")
    export_to_peft(tmp_path / "adapter", tmp_path / "out")
    batch = {"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with torch.no_grad():
        one, other = tuned(**batch), loaded(base, tmp_path / "out")(**batch)
        assert torch.equal(one.image_embeds, other.image_embeds)
        assert torch.equal(other.text_embeds, copy.deepcopy(base)(**batch).text_embeds)


@pytest.mark.parametrize("name", ["vit", "gpt2", "t5", "qwen3_moe"])
def test_merged_loads_with_transformers_alone(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    base, tuned = toy_adapter(toy, tmp_path)
    export(tmp_path / "adapter", tmp_path / "out", "merged")
    again = type(base).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(again, toy), logits(tuned, toy))
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out")]
    assert files[0].keys() == files[1].keys()


def test_the_users_own_model_is_left_as_it_was(tmp_path: Path) -> None:
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for name, rank in (("peft", None), ("merged", None), ("delta", None), ("lora", 1)):
        export(tmp_path / "adapter", tmp_path / name, name, base_model=base, rank=rank)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def _entries(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "delta.safetensors", "pt") as file:
        return json.loads(file.metadata()["tensors"])


@pytest.mark.parametrize(
    ("name", "dtype"), [("vit", torch.float32), ("t5", torch.bfloat16), ("qwen3_moe", torch.float32)]
)
def test_a_delta_gives_back_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    toy_adapter(TOYS[name], tmp_path, dtype)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    export(tmp_path / "delta", tmp_path / "back", "adapter", base_model=tmp_path / "base")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_delta_goes_into_every_format(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    base, tuned = toy_adapter(toy, tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    export(tmp_path / "delta", tmp_path / "peft", "peft")
    export(tmp_path / "delta", tmp_path / "merged", "merged")
    assert torch.equal(logits(loaded(base, tmp_path / "peft"), toy), logits(tuned, toy))
    assert torch.equal(logits(type(base).from_pretrained(tmp_path / "merged").eval(), toy), logits(tuned, toy))  # type: ignore[attr-defined]


def test_a_delta_of_any_numbers(tmp_path: Path) -> None:
    """What floating-point subtraction would lose: other signs, other magnitudes, infinities, NaN, minus zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    tuned = get_peft_model(copy.deepcopy(base), SurgicalConfig(target_modules=["0", "1"]))
    layer, norm = (tuned.base_model.model[index] for index in (0, 1))
    layer.weight.data = torch.randint(-(2**31), 2**31, (64, 64), dtype=torch.int64).int().view(torch.float32)
    layer.bias.data[:4] = torch.tensor([float("inf"), float("nan"), -0.0, 1e-42])
    norm.num_batches_tracked += 7
    tuned.save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "delta", "delta", base_model=base)
    export(tmp_path / "delta", tmp_path / "back", "adapter", base_model=base)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    assert report["delta_bytes"] <= report["adapter_bytes"]  # random bits do not compress
    entries = _entries(tmp_path / "delta")
    assert entries["1.weight"]["of"] == "nothing" and entries["0.weight"]["planes"] == [["plain", 4096]] * 4


@pytest.mark.parametrize(("size", "smaller"), [(1e-6, 2.0), (1e-3, 1.2)])
def test_small_changes_make_a_small_delta(size: float, smaller: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(128, 128))
    saved(copy.deepcopy(base), SurgicalConfig(target_modules=["0"]), tmp_path / "adapter", size)
    report = export(tmp_path / "adapter", tmp_path / "delta", "delta", base_model=base)
    assert report["ratio"] > smaller and report["ratio"] > report["planes_ratio"]
    assert report["ratio"] == round(report["adapter_bytes"] / report["delta_bytes"], 3)


def test_differences_fold_to_small_numbers() -> None:
    steps = np.arange(-(2**15), 2**15).astype(np.int16)
    reference = np.array([2 * int(each) if each >= 0 else -2 * int(each) - 1 for each in steps])
    folded = delta._fold(steps.view(np.uint16))
    assert np.array_equal(folded, reference) and np.array_equal(delta._unfold(folded), steps.view(np.uint16))


def test_a_delta_on_another_base_is_refused(tmp_path: Path) -> None:
    toy = TOYS["vit"]
    base, _ = toy_adapter(toy, tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    other = toy.model(seed=5)
    name = "vit.layers.0.attention.k_proj.bias"
    here, there = (fingerprint([model.state_dict()[name]]) for model in (other, base))
    with pytest.raises(SurgicalError, match="base model") as error:
        export(tmp_path / "delta", tmp_path / "back", "adapter", base_model=other)
    assert name not in str(error.value) or (str(here) in str(error.value) and str(there) in str(error.value))
    with pytest.raises(SurgicalError, match="no weight"):
        export(tmp_path / "delta", tmp_path / "back", "adapter", base_model=nn.Linear(2, 2))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("at", [0.2, 0.9])
def test_a_truncated_delta_is_refused(at: float, tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(at * len(whole))])
    with pytest.raises(SurgicalError, match="missing or corrupt"):
        export(tmp_path / "delta", tmp_path / "back", "adapter")


def test_a_delta_with_altered_bytes_is_refused_or_seen(tmp_path: Path) -> None:
    """A plane that no longer unpacks, or unpacks to too much, is an error and not other weights."""
    toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    metadata, arrays = _written(file)
    entries = json.loads(metadata["tensors"])
    name = next(name for name, entry in entries.items() if entry["planes"] and entry["planes"][-1][0] == "zlib")
    for altered in (bytes(len(arrays[name])), b"x"):
        changed = {**arrays, name: torch.frombuffer(bytearray(altered), dtype=torch.uint8)}
        save_file(changed, file, metadata=metadata)
        with pytest.raises(SurgicalError, match="corrupt"):
            export(tmp_path / "delta", tmp_path / "back", "adapter")


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda tensor: tensor.fill_(torch.nan),
    "infinity": lambda tensor: tensor.fill_(torch.inf),
    "int64": lambda tensor: tensor.to(torch.int64),
    "bool": lambda tensor: tensor.to(torch.bool),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "shape": lambda tensor: torch.cat([tensor, tensor]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_cannot_be_right_go_into_no_format(kind: str, tmp_path: Path) -> None:
    """`merged` wrote NaN, and whole numbers and booleans became floats."""
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    first = next(key for key, value in weights.items() if value.dim() == 2)
    save_file({**weights, first: DAMAGE[kind](weights[first])}, tmp_path / "adapter" / WEIGHTS)
    whole = kind not in ("NaN", "infinity")  # a delta holds any numbers, to the bit
    for name in ("merged", "lora", *(("peft", "delta") if whole else ())):
        with pytest.raises(SurgicalError):
            export(tmp_path / "adapter", tmp_path / name, name, base_model=base, rank=2 if name == "lora" else None)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_named_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    (tmp_path / "adapter" / name).unlink()
    os.mkfifo(tmp_path / "adapter" / name)
    with pytest.raises(SurgicalError):
        export(tmp_path / "adapter", tmp_path / "out", "peft", base_model=base)
    with pytest.raises(ValueError, match=name.partition(".")[0]):
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))


def _written(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_delta_with_one_bit_flipped_never_gives_other_weights(tmp_path: Path) -> None:
    """Nine of ten such flips did, silently."""
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")  # of the tensors, behind the header
    for at in np.random.default_rng(0).integers(8 * start, 8 * len(whole), 40):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        with pytest.raises(SurgicalError, match="corrupt"):
            delta.read_delta(tmp_path / "delta", base)


def test_entries_of_a_delta_that_are_missing_or_unknown_are_refused(tmp_path: Path) -> None:
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    metadata, arrays = _written(tmp_path / "delta" / "delta.safetensors")
    entries = json.loads(metadata["tensors"])
    first, *others = entries
    unknown = {**entries, first: {**entries[first], "of": "x"}}
    for altered in ({}, {name: entries[name] for name in others}, unknown):
        changed = {**metadata, "tensors": json.dumps(altered)}
        save_file(arrays, tmp_path / "delta" / "delta.safetensors", metadata=changed)
        with pytest.raises(SurgicalError, match="corrupt"):
            delta.read_delta(tmp_path / "delta", base)


def test_a_delta_of_the_first_version_which_has_no_digest_loads(tmp_path: Path) -> None:
    base, _ = toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    metadata, arrays = _written(tmp_path / "delta" / "delta.safetensors")
    del metadata["digest"]
    save_file(arrays, tmp_path / "delta" / "delta.safetensors", metadata=metadata)
    adapter, _ = delta.read_delta(tmp_path / "delta", base)
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(torch.equal(saved[f"base_model.model.{name}"], tensor) for name, tensor in adapter.tensors.items())


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [-1], [-1, -1], ["x"]])
def test_a_delta_of_another_shape_than_its_data_is_refused(tmp_path: Path, shape: list[Any]) -> None:
    """Also one that would take all memory there is."""
    toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    metadata, arrays = _written(file)
    for of in ("weights", "difference", "nothing"):
        entries = json.loads(metadata["tensors"])
        entry = next(entry for entry in entries.values() if entry["of"] != "nothing")
        entry |= {"shape": shape, "of": of}
        save_file(arrays, file, metadata={**metadata, "tensors": json.dumps(entries)})
        with pytest.raises(SurgicalError, match="corrupt"):
            export(tmp_path / "delta", tmp_path / "back", "adapter")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out of memory"), OSError("no space left")])
@pytest.mark.parametrize("name", ["load_base", "_unpack"])
def test_what_a_delta_is_not_to_blame_for_is_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(delta, name, fail)
    with pytest.raises(type(error)) as raised:
        export(tmp_path / "delta", tmp_path / "back", "adapter")
    assert raised.value is error


def test_a_layer_whose_class_has_no_source_is_kept_whole(tmp_path: Path) -> None:
    """Such as one that was typed at a prompt: it may read the weight of its child without calling it."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight  # type: ignore[operator]

    kind = type("Typed", (nn.Module,), {"__module__": "__main__", "forward": forward})
    model = kind()
    model.inner = nn.Linear(2, 2)
    assert not lowrank.can_be_low_rank({"": nn.Module(), "typed": model, "typed.inner": model.inner}, "typed.inner")


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "t5", "qwen3_moe"])
def test_full_rank_lora_is_the_tuned_model(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    base, tuned = toy_adapter(toy, tmp_path)
    report = export(tmp_path / "adapter", tmp_path / "out", "lora", rank=64)
    assert report["total_error"] < 1e-5 and report["lora_modules"] >= 8
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), toy), logits(tuned, toy), atol=1e-5, rtol=1e-5)
    merged = loaded(base, tmp_path / "out").merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(logits(merged, toy), logits(tuned, toy), atol=1e-5, rtol=1e-5)


def test_the_stated_error_is_what_is_lost(tmp_path: Path) -> None:
    """Against the definition, from the weights of the LoRA that stock PEFT loads and merges."""
    toy = TOYS["vit"]
    base, _ = toy_adapter(toy, tmp_path)
    tuned = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(tmp_path / "adapter" / WEIGHTS).items()
    }
    before = base.state_dict()
    errors = []
    for rank in (1, 4, 15):
        report = export(tmp_path / "adapter", tmp_path / "out", "lora", rank=rank)
        merged = loaded(base, tmp_path / "out").merge_and_unload().state_dict()  # type: ignore[operator]
        for home, error in report["error"].items():
            names = [name for name in tuned if name.startswith(home) and tuned[name].ndim == 2]
            lost = sum(float((tuned[name] - merged[name]).square().sum()) for name in names) ** 0.5
            change = sum(float((tuned[name] - before[name]).square().sum()) for name in names) ** 0.5
            assert error == pytest.approx(lost / change, rel=1e-3)
        others = [name for name in tuned if tuned[name].ndim == 1]
        for name in others:
            torch.testing.assert_close(merged[name], tuned[name])
        errors.append(report["total_error"])
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["error"] == report["error"]


def test_low_rank_is_the_best_of_its_rank() -> None:
    """Eckart-Young: what is lost has the norm of the singular values left out."""
    torch.manual_seed(0)
    matrix = torch.randn(9, 5, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, 6):
        down, up = lowrank.low_rank(matrix, rank)
        assert down.shape == (rank, 5) and up.shape == (9, rank)
        torch.testing.assert_close((matrix - up @ down).norm(), values[rank:].norm(), atol=1e-12, rtol=1e-9)


def test_a_weight_that_is_read_directly_is_kept_whole(tmp_path: Path) -> None:
    """Mamba computes with `dt_proj.weight` and never calls dt_proj: a LoRA there would be skipped without a word."""
    values = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=24, state_size=4, time_step_rank=4)
    torch.manual_seed(0)
    MambaForCausalLM(values).save_pretrained(tmp_path / "base")
    base = MambaForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = SurgicalConfig(blocks=[1], target_modules=["dt_proj", "in_proj"])
    tuned = saved(copy.deepcopy(base), config, tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "out", "lora", rank=64)
    assert report["whole_modules"] == ["backbone.layers.1.mixer.dt_proj"] and report["lora_modules"] == 1
    tokens = torch.randint(0, 24, (2, 6))
    with torch.no_grad():
        one, other = tuned(tokens).logits, loaded(base, tmp_path / "out")(tokens).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_read_directly_is_seen_in_the_source() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=24))
    modules = dict(model.named_modules())
    assert not lowrank.can_be_low_rank(modules, "backbone.layers.0.mixer.dt_proj")
    assert lowrank.can_be_low_rank(modules, "backbone.layers.0.mixer.in_proj")
    t5 = dict(TOYS["t5"].model().named_modules())
    assert lowrank.can_be_low_rank(t5, "encoder.block.0.layer.1.DenseReluDense.wo")  # asks for its dtype only


def test_what_lora_cannot_hold_alone_is_refused(tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path, blocks=["final_norm"])
    with pytest.raises(SurgicalError, match=r"Linear.*LoRA"):
        export(tmp_path / "adapter", tmp_path / "out", "lora", rank=2)
    assert not (tmp_path / "out").exists()


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _edit(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(iter(tensors))]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "format", "message"),
    [
        (_remove("adapter_config.json"), "peft", "no adapter's folder"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "peft", "JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "peft", "not a dictionary"),
        (_edit(peft_type="LORA"), "peft", "'LORA'"),
        (_edit(tuned_modules=None), "peft", "tuned modules"),
        (_remove(WEIGHTS), "peft", "no weights"),
        (_pickled, "peft", "pickled"),
        (_truncate, "peft", "corrupt"),
        (_without_a_weight, "peft", "without its"),
        (_edit(base_model_name_or_path=None), "merged", "base model"),
        (_edit(base_model_name_or_path="no/where"), "delta", "cannot be loaded"),
        (_edit(auto_mapping={"base_model_class": "Evil", "parent_library": "os"}), "merged", "model class"),
        (_edit(auto_mapping={"base_model_class": "Trainer", "parent_library": "x"}), "merged", "model class"),
        (lambda folder: None, "zip", "'zip'"),
    ],
)
def test_bad_adapters(damage: Callable[[Path], Any], format: str, message: str, tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path, blocks=[0])
    damage(tmp_path / "adapter")
    before = tree(tmp_path)
    with pytest.raises(SurgicalError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", format)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("format", "rank"), [("lora", None), ("lora", 0), ("lora", -1), ("peft", 4)])
def test_bad_ranks(format: str, rank: int | None, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="at least 1"):
        export(tmp_path / "adapter", tmp_path / "out", format, rank=rank)


def test_nothing_is_overwritten_but_an_earlier_export(tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path, blocks=[0])
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in tree(tmp_path)}
    for out in ("base", "adapter", "."):
        with pytest.raises(SurgicalError, match=r"export reads|earlier result"):
            export(tmp_path / "adapter", tmp_path / out, "merged")
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in tree(tmp_path)} == before
    export(tmp_path / "adapter", tmp_path / "out", "merged")
    export(tmp_path / "adapter", tmp_path / "out", "peft")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("format", ["merged", "delta", "lora"])
def test_another_architecture_as_base(format: str, tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path, blocks=[0])
    rank = 2 if format == "lora" else None
    for other, message in ((TOYS["bert"].model(), "no weight of that name"), (wider_vit(), "in the base model")):
        with pytest.raises(SurgicalError, match=message):
            export(tmp_path / "adapter", tmp_path / "out", format, base_model=other, rank=rank)
    assert not (tmp_path / "out").exists()


def wider_vit() -> nn.Module:
    config = copy.deepcopy(TOYS["vit"].build().config)
    config.intermediate_size = 48  # type: ignore[union-attr]
    return type(TOYS["vit"].build())(config)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5"])
def test_a_tied_weight_is_merged_and_in_the_delta_and_stock_peft_cannot_hold_it(name: str, tmp_path: Path) -> None:
    toy = FAMILIES[name]
    base, tuned = toy_adapter(toy, tmp_path, blocks=["embeddings"])
    expected = logits(tuned, toy)
    export(tmp_path / "adapter", tmp_path / "merged", format="merged")
    assert torch.equal(logits(type(base).from_pretrained(tmp_path / "merged").eval(), toy), expected)
    export(tmp_path / "adapter", tmp_path / "delta", format="delta")
    export(tmp_path / "delta", tmp_path / "back", format="adapter")
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "back").eval()
    assert torch.equal(logits(again, toy), expected)
    for kwargs in ({"format": "peft"}, {"format": "lora", "rank": 2}):
        with pytest.raises(SurgicalError, match=r"lm_head\.weight.*merged"):
            export(tmp_path / "adapter", tmp_path / "stock", **kwargs)
    assert not (tmp_path / "stock").exists()


def test_what_is_no_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    class Lone(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(4))
            self.norm = nn.BatchNorm1d(4)

    for config, name in (
        (SurgicalConfig(blocks=["embeddings"]), "token"),
        (SurgicalConfig(target_modules=["layers.0"], frozen_eval=False), "norm"),
    ):
        saved(Lone(), config, tmp_path / name)
        with pytest.raises(SurgicalError, match=name):
            export_to_peft(tmp_path / name, tmp_path / "stock", base_model=Lone())


def test_a_named_pipe_in_the_place_of_a_delta_is_not_waited_for(tmp_path: Path) -> None:
    toy_adapter(TOYS["vit"], tmp_path)
    export(tmp_path / "adapter", tmp_path / "delta", "delta")
    (tmp_path / "delta" / "delta.safetensors").unlink()
    os.mkfifo(tmp_path / "delta" / "delta.safetensors")
    with pytest.raises(SurgicalError, match=r"no delta\.safetensors"):
        export(tmp_path / "delta", tmp_path / "back", "adapter")


@pytest.mark.parametrize(("source", "out"), [("a\0b", "out"), ("adapter", "a\0b")])
def test_a_folder_that_no_system_can_name(source: str, out: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="zero byte"):
        export(tmp_path / source, tmp_path / out)
