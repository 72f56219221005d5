"""Gradient checkpointing spares the frozen prefix, checkpoints the rest and changes no gradient.

How often a layer ran is counted at its first leaf: hooks on the layer itself stay out of the recomputation.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinForImageClassification, Trainer, TrainingArguments, set_seed

from surgical_peft import BlockMap, SurgicalConfig
from surgical_peft.tuner.eval_mode import reads_training
from surgical_peft.tuner.gradient_checkpointing import (
    _IN_EVAL,
    _ROUSED,
    CheckpointWhereNeeded,
    restore_checkpointing,
    skip_frozen_prefix,
)
from tests.support.toys import TOYS, Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # v5's name, read by PEFT too

FAMILIES = ("llama", "gpt2", "bert", "vit", "t5")  # bert, gpt2 and t5 with dropout
CHOICES = {
    name: {
        "first": [TOYS[name].first],
        "middle": ["decoder.0" if name == "t5" else "5" if name == "vit" else "1"],
        "last": [TOYS[name].last],
        "apart": ["encoder.1", "decoder.1"] if name == "t5" else ["3", "7"] if name == "vit" else ["0", "2"],
    }
    for name in FAMILIES
}
LLAMA = TOYS["llama"]
BERT = TOYS["bert"]


def switch_on(model: nn.Module, reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def wrapped(
    toy: Toy, blocks: list[str], when: str | None = None, reentrant: bool = False, frozen_eval: bool = True
) -> PeftModel:
    base = toy.model()
    if when in ("before", "both"):
        switch_on(base, reentrant)
    model = get_peft_model(base, SurgicalConfig(blocks=blocks, frozen_eval=frozen_eval))
    if when in ("after", "both"):
        switch_on(model, reentrant)
    if when == "base":
        switch_on(model.get_base_model(), reentrant)
    return model.train()


def gradients(model: nn.Module, toy: Toy, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**toy.batch()).loss.backward()
    return collect(model)


def collect(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return found


@functools.cache
def plain_gradients(name: str, choice: str, frozen_eval: bool = True) -> dict[str, Tensor]:
    return gradients(wrapped(TOYS[name], CHOICES[name][choice], frozen_eval=frozen_eval), TOYS[name])


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def layers(model: nn.Module, toy: Toy) -> dict[str, nn.Module]:
    """The repeated layers in use, by block name, in the order of execution."""
    bare = toy.model()
    paths = BlockMap.find(bare).modules
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {block: base.get_submodule(paths[block][0]) for block in toy.blocks if block[-1].isdigit()}


@contextmanager
def runs(model: nn.Module, toy: Toy) -> Iterator[Counter[str]]:
    """How often each layer runs."""
    counted: Counter[str] = Counter()

    def count(block: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counted[block] += 1

    handles = []
    for block, layer in layers(model, toy).items():
        leaf = next(module for module in layer.modules() if isinstance(module, nn.Linear | nn.LayerNorm))
        handles.append(leaf.register_forward_pre_hook(partial(count, block)))
    yield counted
    for handle in handles:
        handle.remove()


def spared(toy: Toy, first_tuned: str) -> dict[str, int]:
    """Once each before the first tuned block, twice from there on."""
    names = [block for block in toy.blocks if block[-1].isdigit()]
    return {name: 1 if index < names.index(first_tuned) else 2 for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("choice", "when", "reentrant"),
    [
        *((choice, when, when == "after") for choice in ("first", "last") for when in ("before", "after")),
        *((choice, when, when == "before") for choice in ("middle", "apart") for when in ("before", "after")),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_as_without_and_the_prefix_runs_once(name: str, choice: str, when: str, reentrant: bool) -> None:
    toy, blocks = TOYS[name], CHOICES[name][choice]
    model = wrapped(toy, blocks, when, reentrant)

    with runs(model, toy) as counted:
        found = gradients(model, toy)

    # T5's layers share the position bias and the encoder's output: their gradients are summed in another order
    (assert_near if name == "t5" else assert_equal)(found, plain_gradients(name, choice))
    assert counted == spared(toy, blocks[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["both", "base"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_switched_on_twice_or_on_the_base_model(name: str, when: str, reentrant: bool) -> None:
    toy, blocks = TOYS[name], CHOICES[name]["middle"]
    model = wrapped(toy, blocks, when, reentrant)

    with runs(model, toy) as counted:
        assert_equal(gradients(model, toy), plain_gradients(name, "middle"))
    assert counted == spared(toy, blocks[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_the_same_in_the_recomputation(reentrant: bool) -> None:
    expected = plain_gradients("bert", "middle", frozen_eval=False)
    assert not torch.equal(*(next(iter(g.values())) for g in (expected, plain_gradients("bert", "middle"))))

    model = wrapped(BERT, CHOICES["bert"]["middle"], "after", reentrant, frozen_eval=False)

    with runs(model, BERT) as counted:
        assert_equal(gradients(model, BERT), expected)
    assert counted == spared(BERT, "1")


def test_nothing_before_the_first_tuned_block_is_differentiated() -> None:
    model = wrapped(LLAMA, ["1"], "both")
    outputs = {}
    for block, layer in layers(model, LLAMA).items():
        layer.register_forward_hook(lambda module, args, output, block=block: outputs.update({block: output}))
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: outputs.update(embeddings=output))

    gradients(model, LLAMA)

    assert {block: output.requires_grad for block, output in outputs.items()} == {
        "embeddings": False,
        "0": False,
        "1": True,
        "2": True,
    }
    assert outputs["0"].grad_fn is None


def test_a_tuned_first_block_leaves_the_embeddings_alone_under_reentrant_checkpointing() -> None:
    model = wrapped(LLAMA, ["0", "embeddings"], "after", reentrant=True)

    assert_equal(gradients(model, LLAMA), gradients(wrapped(LLAMA, ["0", "embeddings"]), LLAMA))


def test_frozen_layers_run_in_eval_mode_both_times_and_stay_in_it() -> None:
    model = wrapped(LLAMA, ["0"], "after")
    above = layers(model, LLAMA)["2"]
    modes = []
    next(above.children()).register_forward_pre_hook(lambda module, args: modes.append(above.training))

    gradients(model, LLAMA)

    assert modes == [False, False]
    assert not any(module.training for module in above.modules() if reads_training(module))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_pass_leaves_nothing_behind(error: type[BaseException]) -> None:
    model = wrapped(LLAMA, ["0"], "after")
    above = layers(model, LLAMA)["2"]

    def interrupt(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise error

    handle = above.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        gradients(model, LLAMA)
    handle.remove()
    if error is RuntimeError:  # torch calls no hook after the other one: the next forward pass puts it right
        assert not above.training

    assert_equal(gradients(model, LLAMA), plain_gradients("llama", "first"))
    assert not above.training
    assert not any(name in module.__dict__ for module in model.modules() for name in (_IN_EVAL, _ROUSED))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_trainer_trains_the_same_weights(reentrant: bool | None, tmp_path: Path) -> None:
    def train(**kwargs: object) -> tuple[dict[str, Tensor], Counter[str]]:
        set_seed(0)
        model = wrapped(BERT, ["1"])
        batch = BERT.batch(size=8)
        data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
        args = TrainingArguments(
            tmp_path,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            **kwargs,
        )
        with runs(model, BERT) as counted:
            Trainer(model=model, args=args, train_dataset=data).train()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, counted

    keywords = None if reentrant is None else {"use_reentrant": reentrant}
    expected, once = train()
    found, counted = train(gradient_checkpointing=True, gradient_checkpointing_kwargs=keywords)

    assert_equal(found, expected)
    assert once == {"0": 3, "1": 3, "2": 3}
    assert counted == {"0": 3, "1": 6, "2": 6}


def through_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_is_spared_too(copied: object) -> None:
    model = wrapped(BERT, ["1"], "after")
    gradients(model, BERT)  # a model as transformers ships it could not be pickled

    twin = copied(model)  # type: ignore[operator]

    with runs(model, BERT) as original, runs(twin, BERT) as counted:
        assert_equal(gradients(twin, BERT), plain_gradients("bert", "middle"))
    assert counted == spared(BERT, "1")
    assert not original


def test_switched_off_again_all_is_as_before() -> None:
    model = wrapped(BERT, ["1"], "both")
    gradients(model, BERT)
    model.gradient_checkpointing_disable()

    with runs(model, BERT) as counted:
        assert_equal(gradients(model, BERT), plain_gradients("bert", "middle"))
    assert set(counted.values()) == {1}

    switch_on(model)
    with runs(model, BERT) as counted:
        assert_equal(gradients(model, BERT), plain_gradients("bert", "middle"))
    assert counted == spared(BERT, "1")


def test_asked_for_without_checkpointing_the_embeddings_keep_their_gradient() -> None:
    model = wrapped(LLAMA, ["1"])
    model.enable_input_require_grads()
    inputs = []
    layers(model, LLAMA)["0"].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    gradients(model, LLAMA)

    assert inputs[0].requires_grad


def test_a_model_that_checkpoints_in_its_own_way_is_left_alone() -> None:
    model = wrapped(LLAMA, ["1"], "after")
    layers(model, LLAMA)["0"].mlp.gradient_checkpointing = True  # as code from before transformers 4.35 sets it
    inputs = []
    layers(model, LLAMA)["0"].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    assert_equal(gradients(model, LLAMA), plain_gradients("llama", "middle"))

    assert inputs[0].requires_grad


def test_evaluation_and_generation_are_as_before() -> None:
    plain, model = wrapped(LLAMA, ["1"]), wrapped(LLAMA, ["1"], "after")
    gradients(model, LLAMA)
    prompt = LLAMA.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**LLAMA.batch()).logits, plain(**LLAMA.batch()).logits)
    plain.eval()
    model.eval()

    with torch.no_grad():
        assert torch.equal(model(**LLAMA.batch()).logits, plain(**LLAMA.batch()).logits)
    tokens = [one.generate(input_ids=prompt, max_new_tokens=4, do_sample=False) for one in (model, plain)]
    assert torch.equal(*tokens)


def hooks(model: nn.Module) -> tuple[int, int]:
    assert len(model._forward_hooks_always_called) <= len(model._forward_hooks)
    return len(model._forward_pre_hooks), len(model._forward_hooks)


def test_no_hook_makes_a_pass_in_eval_mode_slower() -> None:
    model = wrapped(BERT, ["1"], "after")
    base, bare = model.get_base_model(), hooks(BERT.model())
    gradients(model, BERT)
    trained = hooks(base)

    for _ in range(2):
        model.eval()
        assert hooks(base) == bare
        model.train()
        assert hooks(base) == (bare[0] + 1, bare[1])
        assert_equal(gradients(model, BERT), plain_gradients("bert", "middle"))
        assert hooks(base) == trained == (bare[0] + 1, bare[1] + 1)


def attributes_back(model: nn.Module, modes: dict[str, bool]) -> None:
    """As Lightning ends a validation: it calls no `train()`."""
    for name, module in model.named_modules():
        module.training = modes[name]


@pytest.mark.parametrize(("back", "reentrant"), [("train", False), ("attributes", True), ("attributes", False)])
@pytest.mark.parametrize(
    ("when", "copied"),
    [*((when, None) for when in ("before", "eval", "last")), ("last", copy.deepcopy), ("last", through_pickle)],
)
def test_after_eval_mode_the_prefix_is_spared_again(
    when: str, back: str, copied: Callable[[PeftModel], PeftModel] | None, reentrant: bool
) -> None:
    model = wrapped(BERT, ["1"], "before" if when == "before" else None, reentrant)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    if when == "eval":
        switch_on(model, reentrant)
    with torch.no_grad():
        model(**BERT.batch())
    if copied is not None:
        model = copied(model)
    if back == "train":
        model.train()
    else:
        attributes_back(model, modes)
    if when == "last":
        switch_on(model, reentrant)

    with runs(model, BERT) as counted:
        assert_equal(gradients(model, BERT), plain_gradients("bert", "middle"))
    assert counted == spared(BERT, "1")


@pytest.mark.parametrize("inject", ["peft", "transformers"])
def test_without_a_peft_model_the_prefix_is_spared_too(inject: str) -> None:
    model = BERT.model()
    if inject == "peft":
        inject_adapter_in_model(SurgicalConfig(blocks=["1"]), model)
    else:
        model.add_adapter(SurgicalConfig(blocks=["1"]))
    switch_on(model.train())

    with runs(model, BERT) as counted:
        gradients(model, BERT)

    assert counted == spared(BERT, "1")


@pytest.mark.parametrize("merge", [False, True])
def test_an_unwrapped_model_has_transformers_own_checkpointing(merge: bool) -> None:
    model = wrapped(BERT, ["1"], "after")
    gradients(model, BERT)

    base = model.merge_and_unload() if merge else model.unload()

    functions = [module.__dict__.get("_gradient_checkpointing_func") for module in base.modules()]
    assert {type(function) for function in functions} == {type(None), partial}
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


def test_two_forward_passes_before_one_backward_pass() -> None:
    def step(model: PeftModel) -> dict[str, Tensor]:
        torch.manual_seed(0)
        chosen = model(**BERT.batch(seed=1)).loss
        with torch.no_grad(), model.disable_adapter():
            reference = model(**BERT.batch(seed=1)).loss
        rejected = model(**BERT.batch(seed=2)).loss
        torch.nn.functional.softplus(chosen - rejected + reference).backward()
        return collect(model)

    assert_equal(step(wrapped(BERT, ["1"], "after")), step(wrapped(BERT, ["1"])))


def test_another_active_adapter_is_another_prefix() -> None:
    model = wrapped(BERT, ["0"], "after")
    model.add_adapter("late", SurgicalConfig(blocks=["2"]))

    for adapter, first in (("late", "2"), ("default", "0"), ("late", "2")):
        model.set_adapter(adapter)
        model.train()
        with runs(model, BERT) as counted:
            gradients(model, BERT)
        assert counted == spared(BERT, first)


def test_only_part_of_a_block_is_tuned() -> None:
    config = SurgicalConfig(blocks=["1"], target_modules=["output.dense"])
    plain, model = (get_peft_model(BERT.model(), config).train() for _ in range(2))
    switch_on(model, reentrant=True)

    with runs(model, BERT) as counted:
        assert_equal(gradients(model, BERT), gradients(plain, BERT))
    assert counted == spared(BERT, "1")


@pytest.mark.parametrize("reentrant", [False, True])
def test_stages_leave_it_to_the_layers_within(reentrant: bool) -> None:
    def build() -> SwinForImageClassification:
        torch.manual_seed(0)
        config = SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 3], num_heads=[1, 2], window_size=2, num_labels=3
        )
        model = SwinForImageClassification(config).requires_grad_(False)
        model.swin.encoder.layers[1].blocks[1].requires_grad_(True)
        model.swin.eval()
        return model

    def step(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model(pixel_values=torch.ones(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
        return collect(model)

    model = build()
    skip_frozen_prefix(model)
    switch_on(model, reentrant)
    counted: Counter[int] = Counter()
    for index, layer in enumerate([*model.swin.encoder.layers[0].blocks, *model.swin.encoder.layers[1].blocks]):
        layer.layernorm_before.register_forward_pre_hook(lambda module, args, i=index: counted.update([i]))

    assert_equal(step(model), step(build()))
    assert counted == {0: 1, 1: 1, 2: 2, 3: 2}


class Scaled(nn.Module):
    """A layer that takes what it needs in any form."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor] | None = None, shift: Tensor | None = None) -> Tensor:
        x = x * self.scale * x
        x = x if pair is None else x * pair[0]
        return x if shift is None else x + shift * shift


REENTRANT = CheckpointWhereNeeded(partial(checkpoint, use_reentrant=True))


def plainly(function: Callable[..., Tensor], *args: object) -> Tensor:
    return function(*args)


@pytest.mark.parametrize("form", ["none", "pair", "keyword", "method"])
def test_reentrant_checkpointing_loses_no_gradient(form: str) -> None:
    def found(run: Callable[..., Tensor]) -> list[Tensor | None]:
        first, second = Scaled(), Scaled()
        source = torch.tensor(5.0, requires_grad=True)
        shared = source * source  # what two layers share must not be differentiated by each of them in turn
        x = torch.tensor(3.0, requires_grad=form in ("pair", "keyword"))
        for layer in (first, second):
            if form == "method":  # as encoders written for transformers 4 call it
                x = run(layer.__call__, x)
            elif form == "pair":
                x = run(partial(Scaled.forward, layer), x, (shared, shared))
            else:
                x = run(partial(Scaled.forward, layer, shift=shared if form == "keyword" else None), x)
        x.backward()
        return [first.scale.grad, second.scale.grad, source.grad]

    assert found(REENTRANT) == found(plainly)


def test_a_layer_that_no_gradient_passes_runs_plainly() -> None:
    calls: list[object] = []
    layer = Scaled().requires_grad_(False)

    assert CheckpointWhereNeeded(calls.append)(partial(Scaled.forward, layer), torch.tensor(3.0)) == 18
    assert not calls


def test_a_function_that_is_no_layer_is_checkpointed_as_before() -> None:
    calls = []
    x = torch.tensor(3.0, requires_grad=True)

    REENTRANT(lambda value: calls.append(value) or value * value, x).backward()

    assert x.grad == 6
    assert len(calls) == 2


def test_mending_twice_and_restoring_once() -> None:
    """The hook after the forward pass, which makes every call slower, comes with the first one that checkpoints."""
    model = LLAMA.model()
    before = hooks(model)
    skip_frozen_prefix(model)
    skip_frozen_prefix(model)
    gradients(model.train(), LLAMA)
    assert hooks(model) == (before[0] + 1, before[1])

    model.gradient_checkpointing_enable()
    for _ in range(2):
        gradients(model, LLAMA)
        assert hooks(model) == (before[0] + 1, before[1] + 1)

    restore_checkpointing(model)

    assert hooks(model) == before


def test_compiled_it_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    model = wrapped(LLAMA, ["1"], "after")

    found = gradients(torch.compile(model, backend="eager"), LLAMA)

    assert_near({name.removeprefix("_orig_mod."): g for name, g in found.items()}, plain_gradients("llama", "middle"))
