"""The block map of every architecture that transformers can build from its default config, on the meta device.

    python benchmarks/architectures/run.py [--only vit,t5] [--update]

For each model type the base class and one class with a head. The map must be a partition without empty blocks, and its
stacks as long as the config says: that is read here by a rule of its own, from keys such as `num_hidden_layers` and
`depths` of the config and of those of its sub-configs whose model was built. What the config does not say is marked
so; what was checked by hand instead is in `BY_HAND`, with the reason.
Compares with `architectures.json` and exits with 1 if a class that was understood no longer is, or has other stacks.
`work/scan.jsonl` has a line for each finished type, by which the command goes on where it stopped; lines of other code
or of another transformers are ignored. Ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

import surgical_peft
from surgical_peft import BlockMap, SurgicalError

HERE = Path(__file__).parent
PACKAGE = Path(surgical_peft.__file__).parent
SECONDS = 90  # for one class
UNDERSTOOD = ("right", "unstated", "by hand")

HEADS = [
    *("CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"),
    *("MULTIMODAL_LM", "CTC", "SPEECH_SEQ_2_SEQ"),
]
NEEDED = {  # what the default config leaves open and the model needs
    "autoformer": {"prediction_length": 24},
    "informer": {"prediction_length": 24},
    "time_series_transformer": {"prediction_length": 24},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
}
LISTS = ("stage_num_blocks", "depths", "depth", "block_sizes", "blocks_per_stage")
PAIRS = (("encoder_layers", "decoder_layers"), ("num_encoder_layers", "num_decoder_layers"))
NUMBERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "encoder_layers", "depth", "num_blocks")
BY_HAND = {
    "albert": "its 12 layers share the weights of num_hidden_groups x inner_group_num = 1",
    "canine": "one layer each before and after the 12, on characters; the config does not count them",
    "clap": "the config's own 16 adds up parts of its towers",
    "efficientloftr": "of the backbone's stages 1+2+4+14 the first has a single block on one channel: no layer",
    "efficientnet": "num_block_repeats times depth_coefficient, rounded up; the config's 64 is another sum",
    "encodec": "its lists mix convolutions, LSTMs and small residual nets: none of them is evidently a layer",
    "fastspeech2_conformer_with_hifigan": "the vocoder has 3 residual nets for each of 4 upsamplings",
    "glm_image_vqmodel": "single convolutions around a codebook: nothing is repeated",
    "hrm_text": "two stacks of num_layers_per_stack, run again and again; num_hidden_layers counts the runs",
    "janus": "the image tokeniser has 5 levels of num_res_blocks, one more in its decoder",
    "levit": "each of the 4 layers of a stage is two entries, attention and feed-forward; two more between stages",
    "lightglue": "the keypoint detector has 4 convolution blocks, which the config does not count",
    "longcat_flash": "28 layers of two attentions each; num_hidden_layers counts those",
    "mask2former": "the decoder has decoder_layers - 1, as in the paper's code",
    "oneformer": "the decoder has decoder_layers - 1, as in the paper's code",
    "perceiver": "num_self_attends_per_block; its num_blocks repeats the same weights",
    "pp_ocrv5_mobile_rec": "depth counts the layers of the head, which the base class is without",
    "pp_ocrv5_server_rec": "depth counts the layers of the head, which the base class is without",
    "pp_ocrv6_small_rec": "depth counts the layers of the head, which the base class is without",
    "qwen2_5_omni": "the vocoder has 3 residual nets for each of 6 upsamplings",
    "seamless_m4t": "the vocoder has 3 residual nets for each of 5 upsamplings",
    "seamless_m4t_v2": "the vocoder has 3 residual nets for each of 5 upsamplings",
    "uvdoc": "the config counts the convolutions of each of the 6 bridges, not the stages of the ResNet",
    "uvdoc_backbone": "the config counts the convolutions of each of the 6 bridges, not the stages of the ResNet",
    "vibevoice": "of each tokeniser's 7 stages the first, of 32 channels, is a stem; the decoder's run in reverse",
    "vibevoice_acoustic_tokenizer": "of 7 stages the first, of 32 channels, is a stem; the decoder's run in reverse",
    "vibevoice_acoustic_tokenizer_decoder": "of 7 stages the first is a stem",
    "vibevoice_acoustic_tokenizer_encoder": "of 7 stages the first, of 32 channels, is a stem",
    "vibevoice_asr": "of each tokeniser's 7 stages the first, of 32 channels, is a stem",
}


def mapping(name: str, model_type: str) -> list[str]:
    """The classes that one of transformers' tables names for a model type."""
    found = getattr(modeling_auto, name).get(model_type, [])
    return [found] if isinstance(found, str) else list(found)


def tables() -> list[str]:
    """The tables of model classes, those of the common heads first."""
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS]
    rest = [name for name in names if name not in first and name != "MODEL_MAPPING_NAMES"]
    last = ("MODEL_FOR_PRETRAINING_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES")
    return [*first, *(name for name in rest if name not in last), *last]


def model_types() -> list[str]:
    """Every model type for which transformers has a model class."""
    return sorted({kind for name in [*tables(), "MODEL_MAPPING_NAMES"] for kind in getattr(modeling_auto, name)})


def classes(model_type: str) -> list[str]:
    """The base classes of a model type and the first class with a head."""
    base = mapping("MODEL_MAPPING_NAMES", model_type)
    heads = [name for table in tables() for name in mapping(table, model_type) if name not in base]
    return [*base, *heads[:1]]


def stated(config: PreTrainedConfig, model: nn.Module) -> tuple[list[tuple[int, ...]], set[int]]:
    """How many layers the config says: what must be there, stage by stage, and further numbers that may be."""
    built = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    must: list[tuple[int, ...]] = []
    may: set[int] = set()
    values = {**vars(config), **{key: getattr(config, key) for key in NUMBERS if hasattr(config, key)}}
    lists = [tuple(values[key]) for key in LISTS if isinstance(values.get(key), list | tuple)]
    pairs = [pair for pair in PAIRS if all(isinstance(values.get(key), int) for key in pair)]
    if lists:
        must.append(lists[0])
    elif pairs:
        encodes = any(path.rpartition(".")[2] == "encoder" for path, _ in model.named_modules())
        must += [(values[key],) for key in pairs[0] if encodes or "decoder" in key]
    else:
        must += [(values[key],) for key in NUMBERS if isinstance(values.get(key), int)][:1]
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            below, further = stated(value, model)
            may |= further | {number for stages in below for number in stages}
            must += below if value.model_type in built else []
        elif isinstance(value, int) and any(word in key for word in ("layer", "block", "depth")):
            may.add(value)
        elif isinstance(value, list | tuple) and all(isinstance(each, int) for each in value):
            may |= {sum(value), *value}
    return must, may


def verdict(blocks: BlockMap, model: nn.Module) -> tuple[str, str]:
    """Whether the stacks are as long as the config says, and what differs."""
    groups: dict[str, list[int]] = {}
    for label, names in blocks.stacks.items():
        tower, stage, _ = f".{label}".partition(".stages.")
        groups.setdefault(tower if stage else label, []).append(len(names))
    found = Counter(tuple(sizes) for sizes in groups.values())
    must, may = stated(model.config, model)
    missing = []
    for stages in must:
        match = next((sizes for sizes in (stages, (sum(stages),)) if found[sizes]), None)
        if match:
            found[match] -= 1
        elif not any(sum(stages) == sum(sizes) for sizes in map(tuple, groups.values())):  # one number under two keys
            missing.append(stages)
    extra = [sizes for sizes in found.elements() if not set(sizes) <= may]
    if not must:
        return "unstated", ""
    if missing or extra:
        return "wrong", f"the config says {must}; missing {missing}, extra {extra}"
    return "right", ""


def examine(name: str, model_type: str) -> dict[str, Any]:
    """One row of the table."""
    cls = getattr(transformers, name, None)
    if cls is None:
        return {"verdict": "not built", "why": "transformers exports no such class"}
    try:
        with torch.device("meta"):
            model = cls(CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {})))
    except Exception as error:
        return {"verdict": "not built", "why": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
    try:
        blocks = BlockMap.find(model)
        grouped = blocks.parameters(model)
    except SurgicalError as error:
        return {"verdict": "wrong", "why": str(error)[:160]}
    repeated = {block: len(names) for block, names in blocks.stacks.items()}
    layers = {each for names in blocks.stacks.values() for each in names}
    row = {"stacks": repeated, "others": [block for block in blocks.names if block not in layers]}
    held = [id(parameter) for group in grouped.values() for parameter in group]
    if sorted(held) != sorted(id(parameter) for parameter in model.parameters()) or not all(grouped.values()):
        return row | {"verdict": "wrong", "why": "not a partition, or an empty block"}
    says, why = verdict(blocks, model)
    return row | {"verdict": says, "why": why}


def judged(model_type: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row, with the reason in place of what differs where that was checked by hand."""
    if row["verdict"] != "wrong" or model_type not in BY_HAND or "partition" in row["why"]:
        return row
    return row | {"verdict": "by hand" if "stacks" in row else "unknown", "why": BY_HAND[model_type]}


def fingerprint() -> str:
    """Changes with the code under test, with this script and with transformers."""
    files = [PACKAGE / f"{name}.py" for name in ("wrappers", "lists", "stacks", "partition", "blocks")]
    judges = "".join(map(inspect.getsource, (stated, verdict, examine, classes)))
    text = transformers.__version__ + judges + "".join(path.read_text() for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def scan(only: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of all types, or of some, those that an interrupted run left among them."""
    work = HERE / "work" / "scan.jsonl"
    work.parent.mkdir(exist_ok=True)
    version = fingerprint()
    lines = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    done = {line["type"]: line["rows"] for line in lines if line["version"] == version}
    for model_type in only or model_types():
        if model_type not in done:
            done[model_type] = {}
            for name in classes(model_type):
                signal.alarm(SECONDS)
                done[model_type][name] = examine(name, model_type)
                signal.alarm(0)
            with work.open("a") as file:
                file.write(json.dumps({"version": version, "type": model_type, "rows": done[model_type]}) + "\n")
    wanted = only or model_types()
    return {f"{kind}/{name}": judged(kind, row) for kind in wanted for name, row in done[kind].items()}


def shown(row: dict[str, Any]) -> tuple[str, str]:
    """The stacks and the other blocks as text; the stages of one net together."""
    groups: dict[str, list[str]] = {}
    for label, size in row.get("stacks", {}).items():
        tower, stage, _ = f".{label}".partition(".stages.")
        groups.setdefault(f"{tower}.stages"[1:] if stage else label, []).append(str(size))
    stacks = ", ".join(f"{label} {'+'.join(sizes)}".strip() for label, sizes in groups.items())
    return stacks, ", ".join(name for name in row.get("others", []) if "stages." not in name)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown, under the counts."""
    kinds = {key.partition("/")[0] for key in rows}
    built = {key.partition("/")[0] for key, row in rows.items() if row["verdict"] != "not built"}
    counts = Counter(row["verdict"] for row in rows.values())
    text = [
        "# Block maps of all architectures of transformers " + transformers.__version__,
        "",
        f"{len(kinds)} model types, {len(built)} of them built from the default config; {len(rows)} classes: "
        + ", ".join(f"{count} {name}" for name, count in counts.most_common())
        + ".",
        "",
        "right: as many layers as the config says. by hand: differs from the config for the reason given. unstated: "
        "the config has no such number. unknown: `BlockMap.find` raises, for the reason given. not built: "
        "transformers raises.",
        "",
        "| type | class | stacks | other blocks (without those of stages) | verdict | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, row in rows.items():
        kind, _, name = key.partition("/")
        cells = [kind, name, *shown(row), row["verdict"], row["why"].replace("|", "/")]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def regressions(rows: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong now, or was understood before and is not or differs now."""
    found = [f"{key}: {row['why']}" for key, row in rows.items() if row["verdict"] == "wrong"]
    for key, row in rows.items():
        old = before.get(key, {"verdict": "new"})
        comparable = old["verdict"] in UNDERSTOOD and row["verdict"] != "wrong"
        if comparable and old["stacks"] != row.get("stacks"):
            found.append(
                f"{key}: stacks were {old['stacks']}, are {row.get('stacks')} ({row['verdict']}) {row['why']}"
            )
    return found


def out_of_time(*_: object) -> None:
    """Give up on a class."""
    raise TimeoutError(f"not built within {SECONDS} seconds")


def main() -> int:
    """Print the table and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--update", action="store_true", help="write table.md and architectures.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, out_of_time)
    rows = scan([kind for kind in args.only.split(",") if kind])
    stored = HERE / "architectures.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    found = regressions(rows, {} if args.update else before)
    print(table(rows))
    if args.update:
        merged = before | rows if args.only else rows
        lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in merged.items()]
        stored.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        (HERE / "table.md").write_text(table(merged))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
