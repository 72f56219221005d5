"""What PEFT promises for every method, shown for ours on every family: wrapping, training, heads, and with others."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import Trainer, TrainingArguments

from surgical_peft import BlockMap, SurgicalConfig
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, Batch, Toy
from tests.support.wrapping import (
    adapted,
    base_logits,
    layers,
    logits,
    module_paths,
    no_warnings,
    nudge,
    same,
    trainable,
    weights,
    wrap,
)

# wrapping and training


def test_there_are_many_families() -> None:
    assert len(FAMILIES) >= 12
    assert all(name == family.name for name, family in FAMILIES.items())


def test_the_block_map_has_the_familys_blocks(family: Toy) -> None:
    for model in (family.model(), wrap(family)):
        assert BlockMap.find(model).names == family.blocks


def test_attributes_are_those_of_peft_and_of_the_base_model(family: Toy) -> None:
    base = family.model()
    paths = module_paths(base, family.first, family.last)
    modules = [base.get_submodule(path) for path in paths]
    model = get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last]))

    for name in (
        "save_pretrained",
        "from_pretrained",
        "push_to_hub",
        "merge_and_unload",
        "print_trainable_parameters",
    ):
        assert callable(getattr(model, name))
    assert model.get_base_model() is base and model.config is base.config
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.peft_type == "SURGICAL" and model.get_model_status().peft_types == {"default": "SURGICAL"}
    assert [base.get_submodule(path) for path in paths] == modules


def test_repr_shows_the_tuned_tensors(family: Toy) -> None:
    model = wrap(family)
    plain = [layer for layer in layers(model) if type(layer.get_base_layer()).__repr__ is torch.nn.Module.__repr__]
    assert plain
    for layer in plain:
        assert f"(surgical_): SurgicalLayer(default: {', '.join(layer.slots)})" in repr(layer.get_base_layer())


def test_a_step_trains_the_chosen_blocks_and_nothing_else(family: Toy) -> None:
    model, batch = wrap(family), family.batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = logits(wrap(family), batch)  # not of this one: LeViT would keep what it made of its weights
    full = family.model()
    chosen = BlockMap.find(full).named_parameters(full)
    expected = {**chosen[family.first], **chosen[family.last]}
    assert set(adapted(model)) == set(expected)
    assert model.get_nb_trainable_parameters()[0] == sum(parameter.numel() for parameter in expected.values())
    full(**batch).loss.backward()
    took_part = {name for name, parameter in full.named_parameters() if parameter.grad is not None}

    model(**batch).loss.backward()
    for name, parameter in adapted(model).items():
        torch.testing.assert_close(parameter.grad, full.get_parameter(name).grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()

    assert not same(logits(model, batch), output)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        elif name.removeprefix("base_model.model.") in took_part:
            assert parameter.grad is not None


def test_hidden_states_are_as_many_as_before(family: Toy) -> None:
    seen = [model(**family.batch(), output_hidden_states=True) for model in (family.model(), wrap(family))]
    outputs = [output.vision_model_output if family.name == "clip" else output for output in seen]
    key = next(key for key in ("hidden_states", "encoder_hidden_states") if key in outputs[0])
    states = [output[key] for output in outputs]
    assert len(states[0]) == len(states[1]) > 1
    assert same(states[0][-1], states[1][-1])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("albert", "convnext", "resnet", "levit")])
def test_gradient_checkpointing_before_or_after_wrapping_gives_the_same_gradients(name: str) -> None:
    toy = FAMILIES[name]

    def grads(checkpointing: str | None) -> list[Tensor | None]:
        base = toy.model()
        if checkpointing == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(base, SurgicalConfig(blocks=[toy.first, toy.last]))
        if checkpointing == "after":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        model(**toy.batch()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for plain, *checkpointed in zip(grads(None), grads("before"), grads("after"), strict=True):
        for grad in checkpointed:
            torch.testing.assert_close(grad, plain)


def test_a_bfloat16_model_stays_bfloat16(family: Toy, tmp_path: Path) -> None:
    model = get_peft_model(family.model().bfloat16(), SurgicalConfig(blocks=[family.first, family.last]))
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in family.batch().items()}
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(family.model().bfloat16(), tmp_path)

    assert {tensor.dtype for tensor in weights(tmp_path).values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in [*model.parameters(), *loaded.parameters()]} == {torch.bfloat16}
    assert same(logits(loaded, batch), logits(model, batch))


def test_an_adapter_has_the_dtype_of_its_model(family: Toy) -> None:
    """Upcast as LoRA's small matrices are, a block could not take its neighbor's output."""
    model = get_peft_model(family.model().half(), SurgicalConfig(blocks=[family.first]), autocast_adapter_dtype=True)
    model.add_adapter("second", SurgicalConfig(blocks=[family.last]), autocast_adapter_dtype=True)
    model.set_adapter("second")
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float16}


def test_under_autocast_it_runs_and_trains_as_the_bare_model(family: Toy) -> None:
    model, bare = wrap(family), family.model()
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(name in adapted(model))  # torch multiplies by a frozen weight in another order
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = model(**family.batch()).loss, bare(**family.batch()).loss
    assert same(mine, theirs)
    mine.backward()
    theirs.backward()
    grads = {name: parameter.grad for name, parameter in bare.named_parameters()}
    for name, parameter in adapted(model).items():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grads[name])


# heads


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (SurgicalConfig(blocks=[0], modules_to_save=["classifier"]), ["0", "classifier"]),
        (SurgicalConfig(blocks=["head"]), ["head"]),
        (SurgicalConfig(blocks=["head"], task_type="SEQ_CLS"), ["head"]),
        (SurgicalConfig(blocks=[0], task_type="SEQ_CLS"), ["0", "classifier"]),
        (SurgicalConfig(target_modules=["classifier"], task_type="SEQ_CLS"), ["classifier"]),
    ],
    ids=["modules_to_save", "head", "head-seq_cls", "block-seq_cls", "target-seq_cls"],
)
def test_heads_are_trained_and_saved_once(
    name: str, config: SurgicalConfig, trained: list[str], tmp_path: Path
) -> None:
    toy = TOYS[name]
    modules = BlockMap.find(toy.model()).modules
    paths = [path for part in trained for path in modules.get(part, (part,))]
    expected = {key for key in toy.model().state_dict() if any(key.startswith(path + ".") for path in paths)}
    model = nudge(get_peft_model(toy.model(), copy.deepcopy(config)))
    tuned = logits(model, toy.batch())
    model.save_pretrained(tmp_path)

    assert {key.removeprefix("base_model.model.") for key in weights(tmp_path)} == expected
    assert len(trainable(model)) == len(expected)
    with no_warnings():
        loaded = PeftModel.from_pretrained(toy.model(), tmp_path, adapter_name="other")
    assert same(logits(loaded, toy.batch()), tuned)
    base = toy.model()
    assert not base.load_adapter(tmp_path).missing_keys
    assert same(logits(base, toy.batch()), tuned)
    merged = model.merge_and_unload()
    assert same(logits(merged, toy.batch()), tuned)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "head" in family.blocks])
def test_the_head_can_be_chosen_in_every_family_that_has_one(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    chosen = BlockMap.find(family.model()).named_parameters(family.model())["head"]
    model = nudge(wrap(family, blocks=["head"]))
    tuned = logits(model, family.batch())
    assert not same(tuned, base_logits(family))
    assert set(adapted(model)) == set(chosen)

    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(family.model(), tmp_path, adapter_name="other")
    assert same(logits(loaded, family.batch()), tuned)
    assert same(logits(loaded.merge_and_unload(), family.batch()), tuned)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", r".*embed_tokens"])
def test_a_named_embedding_is_saved_without_its_original(target: str, tmp_path: Path) -> None:
    """PEFT found the original under `base_layer` and saved it beside the tuned copy: twice the size, foreign keys."""
    llama = TOYS["llama"]
    names = target if target.startswith(".*") else [target]
    model = nudge(get_peft_model(llama.model(), SurgicalConfig(target_modules=names)))
    model.save_pretrained(tmp_path)
    assert list(weights(tmp_path)) == [
        f"base_model.model.{'model.' if 'embed' in target else ''}{target.removeprefix('.*')}.weight"
    ]
    loaded = PeftModel.from_pretrained(llama.model(), tmp_path)
    assert same(logits(loaded, llama.batch()), logits(model, llama.batch()))


# with others


def test_copies_of_a_wrapped_model_answer_alike(family: Toy) -> None:
    model, batch = nudge(wrap(family)), family.batch()
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(logits(twin, batch), expected)
        assert trainable(twin) == trainable(model)
        nudge(twin)
    assert same(logits(model, batch), expected)


def test_compiles() -> None:
    """Models of one stack are compiled in `tuner/test_composition.py`."""
    family = FAMILIES["t5"]
    model = nudge(wrap(family))
    compiled = torch.compile(model, backend="eager")
    assert same(logits(compiled, family.batch()), logits(model, family.batch()))


@torch.compiler.set_stance("force_eager")  # only the wrapper of torch.compile matters here
def test_a_compiled_model_is_wrapped_saved_and_loaded(tmp_path: Path) -> None:
    """PEFT's paths began with `_orig_mod.`, ours did not, so that nothing matched."""
    llama = TOYS["llama"]
    model = nudge(get_peft_model(torch.compile(llama.model()), SurgicalConfig(blocks=[-1])))
    expected = logits(model, llama.batch())
    assert not same(expected, logits(llama.model(), llama.batch()))
    model.save_pretrained(tmp_path)
    for base in (llama.model(), torch.compile(llama.model())):
        assert same(logits(PeftModel.from_pretrained(base, tmp_path), llama.batch()), expected)
    merged = model.merge_and_unload()
    assert same(logits(merged, llama.batch()), expected)
    assert not any(module._forward_pre_hooks for module in merged.modules())
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    beside = get_peft_model(torch.compile(llama.model()), SurgicalConfig(blocks=[-1], lora=lora))
    found = [name for name, _ in beside.named_parameters() if "lora_A" in name]
    assert len(found) == 2 and not any("layers.2" in name for name in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "qwen3_moe", "mamba", "whisper"])
def test_generates_what_the_merged_model_generates(name: str) -> None:
    family = FAMILIES[name]
    inputs = {key: value for key, value in family.batch().items() if key in ("input_ids", "input_features")}
    model = nudge(wrap(family))
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, max_new_tokens=4, do_sample=False), generated)


def test_a_model_with_accelerate_hooks_is_wrapped_trained_and_merged(family: Toy) -> None:
    base, batch = family.model(), family.batch()
    accelerate.dispatch_model(base, device_map={"": "cpu"}, force_hooks=True)
    model = get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last]))
    assert same(logits(model, batch), base_logits(family))
    model(**batch).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    nudge(model)
    expected = logits(nudge(wrap(family)), batch)
    assert same(logits(model, batch), expected)
    assert same(logits(model.merge_and_unload(), batch), expected)


def collate(examples: list[Batch]) -> Batch:
    """Rows to a batch; CLIP's `return_loss` is one for all rows."""
    first = examples[0]
    return {key: first[key] if key == "return_loss" else torch.stack([e[key] for e in examples]) for key in first}


class RatesTheFirstStep(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_rating": -float(self.state.global_step)}


# Of each kind of weights and batches one; the others differ in what Trainer does not see.
@pytest.mark.parametrize(
    "name", ["vit", "qwen3_moe", "t5", "llama_tied", "albert", "resnet", "levit", "mamba", "clip"]
)
def test_trainer_trains_saves_resumes_and_loads_the_best(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    batch = family.batch(size=8)
    rows = [{k: v if k == "return_loss" else v[i] for k, v in batch.items()} for i in range(8)]

    def trainer() -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="rating",
            greater_is_better=True,
            optim="sgd",  # as exact as the gradients; Adam would make much of Mamba's last bits
            optim_args="momentum=0.9",
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            label_names=["labels"] if "labels" in batch else [],
        )
        return RatesTheFirstStep(wrap(family), args, data_collator=collate, train_dataset=rows, eval_dataset=rows)

    whole = trainer()
    whole.train()
    first, last = (weights(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    assert not all(torch.equal(first[key], last[key]) for key in last)
    again = weights(tmp_path / "checkpoint-2")
    assert all(same(again[key], last[key]) for key in last)
    for each in (whole, resumed):
        assert Path(each.state.best_model_checkpoint).name == "checkpoint-1"
        best = get_peft_model_state_dict(each.model)
        assert all(same(best[key], first[key]) for key in first)
    loaded = PeftModel.from_pretrained(family.model(), tmp_path / "checkpoint-2")
    assert not same(logits(loaded, batch), logits(whole.model.eval(), batch))
    assert not same(logits(loaded, batch), logits(family.model(), batch))
