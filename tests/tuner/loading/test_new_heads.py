"""What a task model has beside its pretrained body is new in every process, so the adapter holds all of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.blocks.unwrap import bare_parameter_name
from surgical_peft.tuner.loading.saved_adapter import LoadedBase, read_adapter
from tests.support.wrapping import no_warnings, nudge

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT_LIKE = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 20}
IDS = torch.randint(3, 32, (3, 7), generator=torch.Generator().manual_seed(0))
TASK = "SEQ_CLS"
FILE = "adapter_model.safetensors"
BODIES: dict[str, Callable[[], Any]] = {
    "DebertaV2": lambda: T.DebertaV2Model(T.DebertaV2Config(**BERT_LIKE, pooler_hidden_size=16)),
    "XLNet": lambda: T.XLNetModel(T.XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=32)),
    "Electra": lambda: T.ElectraModel(T.ElectraConfig(**BERT_LIKE, embedding_size=8)),
    "Bert": lambda: T.BertModel(T.BertConfig(**BERT_LIKE)),
    "Roberta": lambda: T.RobertaModel(T.RobertaConfig(**BERT_LIKE), add_pooling_layer=False),
    "DistilBert": lambda: T.DistilBertModel(
        T.DistilBertConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=20)
    ),
    "Llama": lambda: T.LlamaModel(T.LlamaConfig(**SMALL, intermediate_size=32, pad_token_id=0)),
}
SUFFIX = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
CASES = [(name, "SEQ_CLS") for name in BODIES]
CASES += [(name, "TOKEN_CLS") for name in ("DebertaV2", "Electra", "XLNet")]
CASES += [(name, "QUESTION_ANS") for name in ("Bert", "DistilBert")]
CASES += [("XLNet", "QUESTION_ANS_SIMPLE")]  # whose own class for questions searches for spans by beams


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pretrained bodies without a head, on disk."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BODIES}
    for name, build in BODIES.items():
        torch.manual_seed(0)
        build().save_pretrained(folders[name])
    return folders


def load(folder: Path, name: str, task: str, seed: int) -> Any:
    """The body with a new head, which is another one for every seed."""
    ending = "QuestionAnsweringSimple" if task == "QUESTION_ANS_SIMPLE" else SUFFIX[task]
    more = {} if task.startswith("QUESTION_ANS") else {"num_labels": 3}
    torch.manual_seed(seed)
    return getattr(T, f"{name}For{ending}").from_pretrained(folder, **more).eval()


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS)
    return torch.stack([output.start_logits, output.end_logits]) if "start_logits" in output else output.logits


def new_names(model: Any, other: Any) -> set[str]:
    """The weights that differ between two loads: all that is new, but for biases of 0 and norms of 1."""
    theirs = dict(other.named_parameters())
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, theirs[name])}


@pytest.mark.parametrize("blocks", [[-1], ["0", "head"]])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_adapter_answers_alike_on_any_new_head(
    name: str, task: str, blocks: list[Any], bodies: dict[str, Path], tmp_path: Path
) -> None:
    one, two = (load(bodies[name], name, task, seed) for seed in (1, 2))
    new = new_names(one, two)
    assert new and not any(key.startswith(one.base_model_prefix) for key in new)
    kind = "QUESTION_ANS" if task.startswith("QUESTION_ANS") else task
    model = get_peft_model(one, SurgicalConfig(blocks=blocks, task_type=kind))
    untrained = answer(model)
    nudge(model).eval()
    expected = answer(model)
    assert not torch.equal(expected, untrained)
    model.save_pretrained(tmp_path)
    saved = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / FILE)}
    assert new <= saved
    before = answer(two)
    assert not torch.allclose(before, untrained)  # the heads are others
    loaded = PeftModel.from_pretrained(two, tmp_path, strict_base=True).eval()
    assert torch.equal(answer(loaded), expected)
    merged = loaded.merge_and_unload()
    assert torch.equal(answer(merged), expected)
    native = load(bodies[name], name, task, seed=3)
    native.load_adapter(str(tmp_path))
    assert torch.equal(answer(native.eval()), expected)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_all_of_the_new_head_is_trained_and_unloading_gives_it_back(
    name: str, task: str, bodies: dict[str, Path]
) -> None:
    base = load(bodies[name], name, task, seed=1)
    expected = answer(base)
    kind = "QUESTION_ANS" if task.startswith("QUESTION_ANS") else task
    model = get_peft_model(base, SurgicalConfig(blocks=["0"], task_type=kind))
    named = {n.removeprefix("base_model.model."): parameter for n, parameter in model.named_parameters()}
    head = [n for n in named if not n.startswith(f"{base.base_model_prefix}.") and "original_module" not in n]
    assert head and all(named[n].requires_grad for n in head)
    tuned = answer(nudge(model).eval())
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
    assert torch.equal(answer(model), tuned)
    assert torch.equal(answer(model.unload()), expected)


def test_two_adapters_have_a_head_each(bodies: dict[str, Path], tmp_path: Path) -> None:
    expected = {}
    for name in ("DebertaV2", "XLNet"):
        model = get_peft_model(
            load(bodies[name], name, "SEQ_CLS", seed=1), SurgicalConfig(blocks=[-1], task_type="SEQ_CLS"), "one"
        )
        model.add_adapter("two", SurgicalConfig(blocks=[0], task_type="SEQ_CLS"))
        for seed, adapter in enumerate(("one", "two")):
            model.set_adapter(adapter)
            expected[adapter] = answer(nudge(model, seed).eval())
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(load(bodies[name], name, "SEQ_CLS", seed=2), tmp_path / name / "one", "one")
        loaded.load_adapter(tmp_path / name / "two", "two")
        for adapter in ("two", "one"):
            loaded.set_adapter(adapter)
            assert torch.equal(answer(loaded.eval()), expected[adapter])


# Poolers inside the body, which a checkpoint with a head for masked words lacks


POOLERS: dict[str, Callable[[], Any]] = {
    "Bert": lambda: T.BertForMaskedLM(T.BertConfig(**BERT_LIKE)),
    "Albert": lambda: T.AlbertForMaskedLM(T.AlbertConfig(**BERT_LIKE, embedding_size=8)),
    "Ernie": lambda: T.ErnieForMaskedLM(T.ErnieConfig(**BERT_LIKE)),
}


@pytest.fixture(scope="module", params=POOLERS)
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    POOLERS[request.param]().save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("choice", [{"blocks": [-1]}, {"blocks": ["0", "head"]}, {"target_modules": "all-bias"}])
def test_a_new_pooler_in_the_body_is_tuned_and_saved(
    choice: dict[str, Any], masked: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = masked
    one, two = (load(folder, name, "SEQ_CLS", seed) for seed in (1, 2))
    new = new_names(one, two)
    assert any("pooler" in key for key in new)
    config = SurgicalConfig(**{"blocks": ["0"], **choice}, task_type="SEQ_CLS")
    with no_warnings():
        model = get_peft_model(one, config)
    assert new <= {bare_parameter_name(n) for n, parameter in model.named_parameters() if parameter.requires_grad}
    expected = answer(nudge(model).eval())
    model.save_pretrained(tmp_path)
    assert new <= read_adapter(tmp_path).new_to(LoadedBase(two, frozenset()))  # a delta holds it whole
    whole = tmp_path / "whole"
    load(folder, name, "SEQ_CLS", seed=3).save_pretrained(whole)
    for base in (two, load(whole, name, "SEQ_CLS", seed=4), copy.deepcopy(load(folder, name, "SEQ_CLS", seed=5))):
        with no_warnings():
            loaded = PeftModel.from_pretrained(base, tmp_path, strict_base=True).eval()
        assert torch.equal(answer(loaded), expected)
    native = load(folder, name, "SEQ_CLS", seed=6)
    native.load_adapter(str(tmp_path))
    assert torch.equal(answer(native.eval()), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(load(folder, name, "SEQ_CLS", seed=7), tmp_path / "again", strict_base=True)
    assert torch.equal(answer(again.eval()), expected)


def test_a_pooler_that_the_base_had_is_missed_where_it_is_new(bodies: dict[str, Path], tmp_path: Path) -> None:
    """The adapter does not hold it: it is no new one to its base."""
    with no_warnings():
        model = get_peft_model(load(bodies["Bert"], "Bert", "SEQ_CLS", 1), SurgicalConfig(blocks=[0], task_type=TASK))
    model.save_pretrained(tmp_path / "adapter")
    base = load(bodies["Bert"], "Bert", "SEQ_CLS", seed=1)
    lacking = {key: value for key, value in base.state_dict().items() if "pooler" not in key}
    base.save_pretrained(tmp_path / "base", state_dict=lacking)
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense\.bias.*checkpoint"):
        PeftModel.from_pretrained(load(tmp_path / "base", "Bert", "SEQ_CLS", 1), tmp_path / "adapter")
    with pytest.raises(SurgicalError, match="fingerprint"):
        PeftModel.from_pretrained(
            load(tmp_path / "base", "Bert", "SEQ_CLS", 1), tmp_path / "adapter", strict_base=True
        )


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_without_such_a_task_nothing_is_added(task: str | None, bodies: dict[str, Path]) -> None:
    """The user says by `blocks` what is tuned; a head is not new to every base."""
    for name in ("DebertaV2", "XLNet"):
        base = load(bodies[name], name, "SEQ_CLS", seed=1)
        model: Any = base if task is None else base.base_model
        model = get_peft_model(model, SurgicalConfig(blocks=[-1], task_type=task))
        names = [n for n, parameter in model.named_parameters() if parameter.requires_grad]
        assert names and all(".layer.1." in n for n in names)


@pytest.mark.parametrize(("name", "rest"), [("DebertaV2", "pooler"), ("XLNet", "sequence_summary")])
def test_a_file_of_an_earlier_version_loads(name: str, rest: str, bodies: dict[str, Path], tmp_path: Path) -> None:
    """It lacks what that version did not save; that stays as the base model has it."""
    config = SurgicalConfig(blocks=[-1], task_type="SEQ_CLS")
    model: Any = get_peft_model(load(bodies[name], name, "SEQ_CLS", seed=1), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and f".{rest}." not in key:
                parameter.add_(0.1)
    expected = answer(model.eval())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    old = {key: value for key, value in weights.items() if f".{rest}." not in key}
    assert len(old) < len(weights)
    save_file(old, tmp_path / FILE, metadata={"format": "pt"})
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    named = {path for path in settings["tuned_modules"] if rest in path}
    assert named
    settings["tuned_modules"] = {path: n for path, n in settings["tuned_modules"].items() if path not in named}
    file.write_text(json.dumps(settings))
    loaded: Any = PeftModel.from_pretrained(load(bodies[name], name, "SEQ_CLS", seed=1), tmp_path).eval()
    assert torch.equal(answer(loaded), expected)
    native = load(bodies[name], name, "SEQ_CLS", seed=1)
    native.load_adapter(str(tmp_path))
    assert torch.equal(answer(native.eval()), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == old.keys()
    trainable = PeftModel.from_pretrained(load(bodies[name], name, "SEQ_CLS", 1), tmp_path, is_trainable=True)
    assert not [n for n, p in trainable.named_parameters() if p.requires_grad and f".{rest}." in n]
