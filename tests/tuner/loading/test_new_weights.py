"""What `from_pretrained` has not read from the checkpoint is known, and never lost without a word."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.blocks.unwrap import bare_parameter_name
from surgical_peft.tuner.loading import new_weights
from surgical_peft.tuner.loading.new_weights import newly_initialized
from tests.support.families import FAMILIES
from tests.support.wrapping import no_warnings, nudge

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
BERT = {**SMALL, "max_position_embeddings": 20}
IDS = torch.arange(3, 10)[None]


def bert_model() -> Any:
    return T.BertModel(T.BertConfig(**BERT))


def llama(**more: Any) -> Any:
    return T.LlamaForCausalLM(T.LlamaConfig(**SMALL, **more))


def other_labels(folder: Path) -> Any:
    return T.BertForSequenceClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)


def longer(folder: Path) -> Any:
    return T.BertModel.from_pretrained(folder, max_position_embeddings=30, ignore_mismatched_sizes=True)


def with_decoder(folder: Path) -> Any:
    return T.EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)


def with_another_head(folder: Path) -> Any:
    model = T.BertForSequenceClassification.from_pretrained(folder)
    model.classifier = nn.Linear(16, 5)
    return model


# what is saved, how it is loaded, and a part of what is new then
LOADED: dict[str, tuple[Callable[[], Any], Callable[[Path], Any], str, int]] = {
    "pooler": (lambda: T.BertForMaskedLM(T.BertConfig(**BERT)), T.BertModel.from_pretrained, "pooler.dense", 2),
    "head of another size": (lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)), other_labels, "class", 2),
    "longer positions": (bert_model, longer, "position_embeddings.weight", 1),
    "one layer more": (llama, lambda f: T.LlamaForCausalLM.from_pretrained(f, num_hidden_layers=3), "layers.2.", 9),
    "head for words": (lambda: llama().model, T.LlamaForCausalLM.from_pretrained, "lm_head.weight", 1),
    "cross-attention": (bert_model, with_decoder, "decoder.", 25),
    "put in by hand": (lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)), with_another_head, "class", 2),
    "none": (llama, T.LlamaForCausalLM.from_pretrained, "", 0),
}


@pytest.mark.parametrize("kind", LOADED)
def test_all_kinds_are_known(kind: str, tmp_path: Path) -> None:
    build, load, part, number = LOADED[kind]
    build().save_pretrained(tmp_path)
    model = load(tmp_path)
    found = newly_initialized(model)
    assert len(found) == number and all(part in name for name in found)
    assert newly_initialized(pickle.loads(pickle.dumps(model.double()))) == found


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_new_of_what_was_built_or_loaded_whole(name: str, tmp_path: Path) -> None:
    base: Any = FAMILIES[name].model()
    assert newly_initialized(base) == set()
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path)
    assert newly_initialized(loaded) == newly_initialized(nn.Sequential(loaded)) == set()
    with no_warnings():
        model = get_peft_model(loaded, SurgicalConfig(blocks=[FAMILIES[name].first]))
    assert newly_initialized(nudge(model)) == newly_initialized(model.merge_and_unload()) == set()


def test_in_a_wrapped_model_it_is_the_base_that_counts(tmp_path: Path) -> None:
    T.BertForMaskedLM(T.BertConfig(**BERT)).save_pretrained(tmp_path)
    model = T.BertForSequenceClassification.from_pretrained(tmp_path)
    found = newly_initialized(model)
    wrapped = get_peft_model(model, SurgicalConfig(blocks=["0", "head"], modules_to_save=["classifier"]), "one")
    wrapped.add_adapter("two", SurgicalConfig(blocks=["head"]))
    assert newly_initialized(wrapped.get_base_model()) == found
    assert newly_initialized(copy.deepcopy(model)) == set()  # of which nothing is told


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"blocks": [0]}, {"classifier.weight", "bert.pooler.dense.weight"}),
        ({"blocks": [0], "modules_to_save": ["classifier"]}, {"bert.pooler.dense.weight"}),
        ({"target_modules": ["classifier"]}, {"bert.pooler.dense.weight"}),
        ({"blocks": [0], "modules_to_save": ["pooler.dense", "classifier"]}, set()),
        ({"blocks": [0, "head"]}, set()),
        ({"blocks": [0], "task_type": "SEQ_CLS"}, set()),
    ],
)
def test_what_is_neither_tuned_nor_saved_is_named(choice: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    T.BertForMaskedLM(T.BertConfig(**BERT)).save_pretrained(tmp_path / "base")

    def load(seed: int) -> Any:
        torch.manual_seed(seed)
        return T.BertForSequenceClassification.from_pretrained(tmp_path / "base")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = get_peft_model(load(1), SurgicalConfig(**choice))
    told = [str(each.message) for each in caught if "not in the checkpoint" in str(each.message)]
    assert len(told) == bool(names)
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert (name in "".join(told)) == (name in names)
    nudge(model).eval().save_pretrained(tmp_path / "adapter")
    if names:
        with pytest.raises(SurgicalError, match="fingerprint"):
            PeftModel.from_pretrained(load(2), tmp_path / "adapter", strict_base=True)
        with pytest.warns(UserWarning, match="checkpoint"):
            PeftModel.from_pretrained(load(2), tmp_path / "adapter")
    else:
        with no_warnings():
            loaded = PeftModel.from_pretrained(load(2), tmp_path / "adapter", strict_base=True).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("blocks", [["0"], ["embeddings"]])
def test_added_tokens_are_saved_by_peft(blocks: list[str], tied: bool, tmp_path: Path) -> None:
    """Their rows are random; with strict_base=True the adapter was refused, though its file has them."""
    torch.manual_seed(0)
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def load(seed: int) -> Any:
        base: Any = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(36)
        return base

    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(36)[None]).logits

    with no_warnings():
        model = get_peft_model(load(1), SurgicalConfig(blocks=blocks))
    expected = answer(nudge(model))
    model.save_pretrained(tmp_path / "adapter")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    other = load(2)
    assert not torch.equal(other.get_input_embeddings().weight, load(1).get_input_embeddings().weight)
    with no_warnings():
        loaded = PeftModel.from_pretrained(other, tmp_path / "adapter", strict_base=True)
    assert torch.equal(answer(loaded), expected)


def test_processes_that_read_no_weights_ask_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under FSDP, transformers lets one process read; in the others all weights are on the meta device, and marked."""
    T.BertForMaskedLM(T.BertConfig(**BERT)).save_pretrained(tmp_path)
    found = newly_initialized(T.BertForSequenceClassification.from_pretrained(tmp_path))
    with torch.device("meta"):
        other = T.BertForSequenceClassification(T.BertConfig(**BERT))
    monkeypatch.setattr(new_weights, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(new_weights, "broadcast_from_first", lambda mine: found | mine)
    assert newly_initialized(other) == found
    model = get_peft_model(other, SurgicalConfig(blocks=[0], task_type="SEQ_CLS"))
    assert found <= {
        bare_parameter_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
