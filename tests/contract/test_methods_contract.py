"""What every method of a comparison must do; a new function in `methods/` is picked up by itself."""

from __future__ import annotations

import copy
import inspect
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from surgical_peft import BlockMap, Selection, SurgicalError, policies
from surgical_peft.experiments.compare import methods
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.comparison import Comparison, Job
from surgical_peft.experiments.compare.jobs import JobRunner, measure_test, train_method
from surgical_peft.experiments.compare.methods import Method, make_method
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.policies.stages import Stages
from surgical_peft.search.result import SearchResult, SearchTrial
from tests.support.tiny import write_recipe

LAYERS = {"0", "1"}
# What a method cannot be called without, or should not be here.
OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"names": ["embeddings", "-1"]},
    "modules_to_save": {"names": ["0", "head"]},
    "top_k": {"criterion": "weight_snr", "k": 2},
    "auto": {"criterion": "rgn", "num_blocks": 1},
    "searched": {"procedure": "random_subsets", "options": {"num_blocks": 1, "num_trials": 1}},
    "policy": {"name": "lisa", "options": {"num_blocks": 1, "every": 1}},
}
# The blocks that a method trains, where it neither chooses them by the data nor trains them all.
CLAIMED = {
    "nothing": set(),
    "head": {"head"},
    "blocks": {"embeddings", "1"},
    "modules_to_save": {"0", "head"},
    "first": {"embeddings", "0"},
    "middle": {"0"},
    "last": {"1"},
}
OWN = ("lora", "norms")  # train parts of blocks; they have tests of their own below


def entry(name: str) -> Any:
    return {name: OPTIONS[name]} if name in OPTIONS else name


@pytest.fixture(scope="module")
def job_runner(tmp_path_factory: pytest.TempPathFactory) -> JobRunner:
    folder = tmp_path_factory.mktemp("methods")
    keys = {"methods": [entry(name) for name in methods.__all__], "rates": [1e-2], "num_train_epochs": 2}
    return JobRunner(Comparison(load_recipe(write_recipe(folder, **keys))), folder / "run")


def job_of(job_runner: JobRunner, name: str) -> Job:
    title = make_method(entry(name)).title
    grid = job_runner.comparison.grid(title)
    job = Job("training", 0, 0, title, grid[0] if grid else None)
    choice = Job("choice", 0, 0, title)
    if job_runner.comparison.methods[title].choose and not job_runner.findings.is_done(choice):
        job_runner.do(choice)
    return job


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def trained(job_runner: JobRunner, name: str, steps: int = 2) -> tuple[nn.Module, set[str]]:
    """A model after so many steps, without any wrapper, and the names of the weights that are other than before."""
    job = job_of(job_runner, name)
    runner = job_runner.data.runner(job)
    before = weights_of(runner.model)
    wrapped = runner.model
    if job_runner.comparison.methods[job.method].is_trained:
        wrapped = job_runner.train(job, max_steps=steps)
    after = weights_of(runner.model)
    assert all(torch.equal(after[key], before[key]) for key in before), "the source model was changed"
    merged = wrapped.merge_and_unload() if isinstance(wrapped, PeftModel) else wrapped
    found = weights_of(merged)
    assert found.keys() == before.keys()
    return merged, {key for key in before if not torch.equal(found[key], before[key])}


def test_every_public_function_is_a_method_and_is_tried_here() -> None:
    package = Path(inspect.getfile(methods)).parent
    made = {
        name
        for path in package.glob("*.py")
        for name, each in vars(
            __import__(f"surgical_peft.experiments.compare.methods.{path.stem}", fromlist=["x"])
        ).items()
        if inspect.isfunction(each)
        and each.__module__.startswith("surgical_peft.experiments.compare.methods.")
        and inspect.signature(each).return_annotation in (Method, "Method")
    } - {"make_method", "of_known_blocks"}  # make any
    assert made == set(methods.__all__)
    assert made >= {*CLAIMED, *OWN}


@pytest.mark.parametrize("name", methods.__all__)
def test_it_documents_what_one_has_to_know(name: str) -> None:
    text = inspect.getdoc(getattr(methods, name)) or ""
    assert "Costs: " in text and "Example:\n    methods: [" in text


def test_titles_tell_methods_apart(job_runner: JobRunner) -> None:
    assert len(job_runner.comparison.methods) == len(methods.__all__)


@pytest.mark.parametrize("name", [name for name in methods.__all__ if name not in OWN])
def test_it_trains_what_it_says_and_nothing_else(name: str, job_runner: JobRunner) -> None:
    steps = 8 if name in ("policy", "lp_ft", "bvg_ls") else 2  # every block has its turn, but not in each step
    model, changed = trained(job_runner, name, steps)
    blocks = BlockMap.find(model)
    claimed = CLAIMED.get(name, set(blocks.names))
    if name not in CLAIMED and make_method(entry(name)).choose:
        chosen = job_runner.findings.load(Job("choice", 0, 0, make_method(entry(name)).title))
        claimed = set(chosen["blocks"])
        assert claimed and chosen["seconds"] >= 0
    found = {blocks.block_of(weight) for weight in changed}
    assert found == claimed if name != "bvg_ls" else found <= claimed and found
    if name != "bvg_ls":
        named = blocks.named_parameters(model)
        wanted = {weight for block in claimed for weight in named[block]}
        assert {weight for weight in wanted - changed if not weight.endswith("key.bias")} == set()  # has no gradient


def test_norms_are_trained_and_the_head(job_runner: JobRunner) -> None:
    model, changed = trained(job_runner, "norms")
    wanted = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) or name == "classifier"
        for weight in ("weight", "bias")
    }
    assert changed == wanted


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_language_model_may_be_its_embeddings(tied: bool, head: bool) -> None:
    """It was called norms and head, and the head stayed as it was."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=12, tie_word_embeddings=tied))
    method = make_method({"norms": {"head": head}})
    wrapped = method.wrap(model, Selection(()), Recipe(model="m", data="d", task="causal_lm"))
    tuned = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    heads = {"model.embed_tokens.weight" if tied else "lm_head.weight"} if head else set()
    assert {name for name in tuned if "norm" not in name} == heads and len(tuned) == 3 + len(heads)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("head" in method.title) == head


def test_lora_reaches_every_linear_layer(job_runner: JobRunner) -> None:
    model, changed = trained(job_runner, "lora")
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert changed == linear | {"classifier.bias"}


@pytest.mark.parametrize("name", methods.__all__)
def test_what_is_saved_is_what_was_trained(name: str, job_runner: JobRunner) -> None:
    job = job_of(job_runner, name)
    found = train_method(job_runner, job)
    runner = job_runner.data.runner(job)
    if found["bytes"] is None:
        assert name == "nothing" and found["tuned_parameters"] == 0
        return
    weights = sum(p.numel() for p in runner.model.parameters())
    assert 0 < found["tuned_parameters"] <= weights
    assert 4 * found["tuned_parameters"] <= found["bytes"] <= 4 * found["tuned_parameters"] + 8000
    loaded = measure_test(job_runner, Job("test", job.source, job.seed, job.method, job.rate))
    assert 0 <= loaded["test"] <= 1
    # Measured again on validation data from the files, it is what the trained model had.
    folder = job_runner.findings.weights(job)
    model = copy.deepcopy(runner.model)
    if (folder / "adapter_config.json").exists():
        again: nn.Module = PeftModel.from_pretrained(model, folder)
    else:
        again = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
    assert runner.task.measure(again, runner.part("validation")) == found["validation"]


def test_random_layers_depend_on_the_seed_alone(job_runner: JobRunner) -> None:
    model = job_runner.data.runner(job_of(job_runner, "random_k")).model
    choose = make_method({"random_k": {"k": 1}}).choose
    assert choose is not None
    blocks = BlockMap.find(model)

    def drawn(seed: int) -> tuple[str, ...]:
        context = methods.MethodContext(job_runner.comparison.recipe, model, blocks, list, seed, Path())
        return choose(context).blocks

    assert drawn(0) == drawn(0)
    assert {drawn(seed)[0] for seed in range(20)} == LAYERS


@pytest.mark.parametrize(
    ("length", "begins"),
    [({"num_train_epochs": 8}, (4, 0)), ({"max_steps": 2}, (0, 1)), ({"max_steps": 101}, (0, 50))],
)
def test_lp_ft_gives_the_head_half_of_the_training(length: dict[str, int], begins: tuple[int, int]) -> None:
    policy = make_method("lp_ft").policy(TrainingArguments("run", **length))  # type: ignore[arg-type]
    assert isinstance(policy, Stages)
    assert policy.last_turn() == begins


def test_bvg_ls_has_its_own_recipe() -> None:
    made = make_method("bvg_ls")
    assert made.training["optim"] == "sgd" and made.training["weight_decay"] == 5e-4
    assert made.rates == (3e-3, 1e-2, 3e-2)


# What a policy cannot be called without.
POLICIES: dict[str, dict[str, Any]] = {
    "lp_ft": {"epochs": 1},
    "misa": {"share": 0.1},
    "stages": {"plan": [{"blocks": "head", "steps": 2}, {}]},
    "two_stage": {"counts": [16, 16, 16], "epochs": 1},
}


@pytest.mark.parametrize("name", policies.__all__)
def test_every_policy_is_a_method(name: str, job_runner: JobRunner, tmp_path: Path) -> None:
    given = {"policy": {"name": name, "options": POLICIES.get(name, {})}}
    recipe = replace(job_runner.comparison.recipe, methods=["full", given])
    (title,) = set(Comparison(recipe).methods) - {"full fine-tuning"}
    assert title.startswith(f"{name}(")
    own = JobRunner(Comparison(recipe), tmp_path)
    own.do(job := Job("training", 0, 0, title, 1e-2))
    runner = job_runner.data.runner(job)
    assert own.findings.load(job)["tuned_parameters"] == sum(weight.numel() for weight in runner.model.parameters())


def test_a_policy_tunes_the_blocks_that_are_named(job_runner: JobRunner, tmp_path: Path) -> None:
    given = {"policy": {"name": "layer_decay", "options": {"decay": 0.5}, "blocks": [0, "head"], "rates": [1e-2]}}
    comparison = Comparison(replace(job_runner.comparison.recipe, methods=["full", given]))
    title = "layer_decay(decay=0.5), blocks 0, head"
    assert title in comparison.methods and comparison.grid(title) == [1e-2]
    own, job = JobRunner(comparison, tmp_path), Job("training", 0, 0, title, 1e-2)
    own.do(replace(job, kind="choice", rate=None))
    tuned = own.train(job, max_steps=2)
    trained = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert {BlockMap.find(tuned).block_of(name) for name in trained} == {"0", "head"}
    # Its training is not that of the same blocks at one rate.
    plain = make_method({"blocks": {"names": [0, "head"]}})
    assert plain.is_its_blocks and not comparison.methods[title].is_its_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lisa", "options": {"num_blocks": 9}}, r"lisa\(num_blocks=9\) does not fit ViT.*: num_blocks=9"),
        ({"name": "static", "options": {"multipliers": {"7": 2}}}, "static.* does not fit ViT.*7"),
        ({"name": "lp_ft", "options": {"epochs": 9}}, r"lp_ft\(epochs=9\) does not fit"),
        ({"name": "lisa", "blocks": ["haed"]}, "lisa.* does not fit ViT.*haed"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_or_the_training_is_refused_by_the_check(
    options: dict[str, Any], message: str, job_runner: JobRunner, tmp_path: Path
) -> None:
    recipe = replace(job_runner.comparison.recipe, methods=["full", {"policy": options}])
    with pytest.raises(SurgicalError, match=message):
        compare(recipe, tmp_path, console=Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_a_searchs_file_is_a_method(tmp_path: Path, job_runner: JobRunner) -> None:
    trial = SearchTrial(("1", "head"), 0.9, 1.0)
    result = SearchResult(Selection(("1", "head")), 0.9, (trial,), ("0", "1", "head"), "sweep()")
    path = tmp_path / "run" / "search" / "search.json"
    path.parent.mkdir(parents=True)
    result.save(path)
    made = make_method({"searched": {"result": str(path)}})
    assert made.title == "winner of run" and made.choose is not None
    model = job_runner.data.runner(job_of(job_runner, "full")).model
    context = methods.MethodContext(job_runner.comparison.recipe, model, BlockMap.find(model), list, 0, tmp_path)
    assert made.choose(context).blocks == ("1", "head")
    with pytest.raises(SurgicalError, match="are for a search"):
        make_method({"searched": {"result": str(path), "options": {"candidates": "all"}}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": {"rank": 4, "alpha": "big"}}, "alpha='big'.*lora"),
        ({"lora": {"alpha": -3}}, "alpha=-3.*lora"),
        ({"lora": {"alpha": True}}, "alpha=True.*lora"),
        ({"lora": {"head": 3}}, "lora: head=3"),
        ({"top_k": {"criterion": 3}}, "top_k: criterion=3.*rgn"),
        ({"top_k": {"criterion": None}}, "top_k: criterion=None"),
        ({"top_k": {"criterion": "rgn", "num_batches": "x"}}, "num_batches='x'.*top_k"),
        ({"auto": {"criterion": 3}}, "auto: criterion=3"),
        ({"auto": {"criterion": "rgm"}}, "'rgn'"),
        ({"auto": {"num_batches": 0}}, "num_batches=0.*auto"),
        ({"layer_decay": {"decay": "x"}}, "decay='x'"),
        ({"searched": {"result": 3}}, r"\{'result': 3\}.*not int"),
        ({"searched": {"options": [1]}}, r"\{'options': \[1\]\}.*searched"),
        ({"policy": {"name": "lsia"}}, "'lisa'"),
        ({"policy": {"name": 3}}, "name=3"),
        ({"policy": {"name": "lisa", "options": [2]}}, r"options=\[2\]"),
        ({"policy": {"name": "lisa", "num_blocks": 2}}, "num_blocks.*name, options, blocks, rates"),
        ({"policy": {"name": "lisa", "options": {"num_block": 2}}}, r"'num_block': 2.*'num_blocks'"),
        ({"policy": {"name": "lisa", "options": {3: 2}}}, r"\{3: 2\}.*lisa"),
        ({"policy": {"name": "lisa", "options": {"num_blocks": 0}}}, "num_blocks=0"),
        ({"policy": {"name": "stages"}}, "stages.*plan"),
        ({"policy": {"name": "tests.contract.test_methods_contract:no_method"}}, "makes a str"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(given: dict[str, Any], message: str) -> None:
    """They were tracebacks, or taken as they are."""
    with pytest.raises(SurgicalError, match=message):
        make_method(given)


def test_a_users_own_method() -> None:
    assert make_method("tests.experiments.compare.test_compare:broken").title == "broken"
    with pytest.raises(SurgicalError, match="str, not a Method"):
        make_method("tests.contract.test_methods_contract:no_method")


def no_method() -> str:
    return "full"
