"""The README and the pages of docs/: links lead somewhere, code runs, tables and numbers are the measured ones."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import surgical_peft
from surgical_peft import BlockMap, SurgicalCallback, score_blocks, surgical_optimizer
from surgical_peft.diagnosis.diagnosis import FAULTS
from surgical_peft.experiments.quickstart.tables import comparison_markdown
from tests.support.toys import TOYS, Toy
from tests.support.trainers import tokenizer

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [README, ROOT / "CONTRIBUTING.md", *DOCS]}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def told(name: str) -> str:
    """The text of a page on one line."""
    return " ".join(read(name).split())


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Form


def test_the_readme_is_one_page() -> None:
    text = README.read_bytes()
    assert len(text.splitlines()) <= 150 and len(text) <= 8000


def test_citation_and_changelog_are_of_this_version() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == surgical_peft.__version__
    assert re.findall(r"^## ([\d.]+)", read("CHANGELOG.md"), re.MULTILINE)[0] == surgical_peft.__version__


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    path = PAGES[name]
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    assert links or name == "docs/reference.md"
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), link  # a folder is no page of the site
        assert not anchor or anchor in anchors(target), link
    for mentioned in re.findall(r"`((?:tests|benchmarks|recipes|docs|model_cards)/[\w./]*)`", text):
        assert (ROOT / mentioned).exists(), mentioned


def test_every_page_is_in_the_menu() -> None:
    menu = read("mkdocs.yml")
    assert all(path.name in menu and path.name in read("docs/index.md") for path in DOCS if path.name != "index.md")


def test_the_reference_holds_the_public_interface() -> None:
    reference = read("docs/reference.md")
    for name in surgical_peft.__all__:
        assert f"::: surgical_peft.{name}\n" in reference, name


@pytest.mark.parametrize(
    ("page", "package"), [("scoring", "criteria"), ("policies", "policies"), ("search", "procedures")]
)
def test_tables_name_every_strategy(page: str, package: str) -> None:
    table, papers = read(f"docs/{page}.md"), read("docs/related_work.md")
    for name in getattr(surgical_peft, package).__all__:
        assert re.search(rf"`{name}\b", table), name
        ours = name in ("static", "stages", "random_subsets")
        assert ours or f"`{name}`" in papers, name


# Code


def code_of(name: str, language: str = "python") -> list[str]:
    return [code for kind, code in FENCED.findall(read(name)) if kind == language]


TOY_OF = {"docs/how_do_i.md": "bert", "docs/search.md": "bert"}
WHOLE = ("README.md", "docs/index.md")  # trained as long as they say, since they say what it gives
ALONE = [f"docs/{page}.md" for page in ("folder_of_images", "csv_of_reviews", "jsonl_of_chats")]  # test_first_hour.py
WITH_CODE = [name for name in PAGES if code_of(name) and name not in ALONE]


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Runs the Python blocks of a page in turn, in an empty folder with the shipped recipes.

    Each block has its own imports, so that it can be copied, and finds model, data and arguments anew; files stay. One
    that starts with `# needs` is not run. Returns what each block left behind.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    TOYS["bert"].model().bert.save_pretrained("encoder")  # type: ignore[union-attr,operator]
    load = AutoModelForSequenceClassification.from_pretrained  # makes a new head
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda _, **how: load("encoder", **how))

    def run(name: str) -> list[dict[str, Any]]:
        left: list[dict[str, Any]] = []
        for code in code_of(name):
            compile(code, name, "exec")
            if code.startswith("# needs "):
                continue
            if name not in WHOLE:
                code = re.sub(r"num_train_epochs=\d+", "max_steps=2, use_cpu=True", code)
            toy = TOYS["llama" if "q_proj" in code else TOY_OF.get(name, "vit")]
            left.append(at_hand(toy))
            exec(code, left[-1])
        return left

    return run


def at_hand(toy: Toy) -> dict[str, Any]:
    """What the pages take for given."""
    batch = toy.batch(size=16)
    train = [{name: tensor[i] for name, tensor in batch.items()} for i in range(16)]
    return {
        "__name__": "__main__",  # as in a script
        "model": toy.model(),
        "base_model": toy.model(),
        "train": train,
        "validation": train,
        "tokenizer": tokenizer(),
        "dataloader": DataLoader(train, batch_size=4, collate_fn=default_data_collator),  # type: ignore[arg-type]
        "args": TrainingArguments("run", max_steps=2, report_to="none", use_cpu=True),
        "train_and_validate": lambda config: {("2",): 0.8, ("1", "2"): 0.9}.get(tuple(config.blocks), 0.1),
    }


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_runs(name: str, run_page: Callable[[str], list[dict[str, Any]]]) -> None:
    left = run_page(name)
    assert left
    if name in RESULTS:
        RESULTS[name](left)


def of_first_run(left: list[dict[str, Any]]) -> None:
    """What the page says: accuracy before and after, which blocks, a picture."""
    run = left[0]
    assert run["model"].peft_config["default"].blocks == ["0", "1"]
    assert run["before"] == pytest.approx(0.46, abs=0.04)
    assert run["after"] == pytest.approx(0.72, abs=0.06)
    assert Path("scores.png").stat().st_size > 5000


def of_readme(left: list[dict[str, Any]]) -> None:
    of_first_run(left)
    tuned, again = (each["model"].merge_and_unload().state_dict() for each in left)
    assert all(torch.equal(tuned[key], again[key]) for key in tuned)


def of_how_do_i(left: list[dict[str, Any]]) -> None:
    measured, stopped, resumed, piped, weighted, number, several, chosen, looked_at = left
    assert measured["after"] < measured["before"]
    assert stopped["trainer"].state.best_global_step
    assert resumed["trainer"].state.global_step == 2
    assert piped["predict"]("w1 w2")[0]["label"] in ("bad", "fair", "good")
    assert weighted["trainer"].state.global_step == 2
    assert number["model"].config.num_labels == 1
    assert several["model"].config.id2label[2] == "off topic"
    assert len(chosen["model"].peft_config["default"].selection["scores"]) > 2
    assert any(tensor.moved for tensor in looked_at["diagnosis"].tensors)
    assert all(f"| `{fault}` |" in read("docs/how_do_i.md") for fault in FAULTS)


def of_search(left: list[dict[str, Any]]) -> None:
    assert left[0]["config"].blocks == ["1", "2"] and Path("study.db").exists()


def of_extending(left: list[dict[str, Any]]) -> None:
    largest, agreement, policy, procedure, *lab = left
    assert all(0 < value < 1 for value in agreement["scores"].values.values())
    assert largest["scores"].values.keys() == agreement["scores"].values.keys()
    torch.nn.init.zeros_(agreement["model"].classifier.weight)  # then no gradient reaches the blocks below
    still = score_blocks(agreement["model"], agreement["dataloader"], criterion=agreement["agreement"]).values
    assert {value for block, value in still.items() if block != "head"} <= {0.0}
    seen: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append(any(p.requires_grad for n, p in model.named_parameters() if "layers.11.mlp" in n))

    args = TrainingArguments("run", max_steps=3, report_to="none", use_cpu=True)
    optimizer = surgical_optimizer(args, policy=policy["Alternating"]())
    Trainer(
        model=policy["model"],
        args=args,
        train_dataset=policy["train"],
        callbacks=[SurgicalCallback(), Watch()],
        optimizer_cls_and_kwargs=optimizer,
    ).train()
    assert seen == [True, False, True]
    assert len(procedure["result"].best.blocks) == 1
    for each in lab:
        if "ends" in each:
            context = SimpleNamespace(blocks=BlockMap.find(each["model"]))
            assert each["ends"]().choose(context).blocks == ("0", "head")
        if "MyNet" in each:
            assert each["blocks"].names == ("embeddings", "0", "1", "2", "head")
            assert BlockMap.find(each["model"]) == each["blocks"]
        if "plain_images" in each:
            recipe = SimpleNamespace(model="recipes/fashion_mnist/vit", data="recipes/fashion_mnist/target-0")
            task = each["plain_images"](recipe, ("validation",))
            assert task.measure(task.load_model(), task.splits["validation"]) > 0.8


RESULTS = {
    "README.md": of_readme,
    "docs/index.md": of_first_run,
    "docs/how_do_i.md": of_how_do_i,
    "docs/search.md": of_search,
    "docs/extending.md": of_extending,
}


def test_whatever_is_added_takes_less_than_15_lines() -> None:
    for code in code_of("docs/extending.md"):
        for node in ast.parse(code).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                lines = [line for line in ast.get_source_segment(code, node).splitlines() if line.strip()]  # type: ignore[union-attr]
                assert len(lines) - docstring < 15, node.name


def test_commands_can_be_copied() -> None:
    """Shell blocks parse, and name commands, recipes and targets that exist."""
    commands = [line for name in PAGES for code in code_of(name, "bash") for line in code.splitlines()]
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands), capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    targets = re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE)
    for line in commands:
        assert all((ROOT / path).exists() for path in re.findall(r"recipes/\S+", line)), line
        assert all(target in targets for target in re.findall(r"^make ([a-z]+)", line)), line


# Tables and numbers


@pytest.fixture(scope="module")
def results() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_benchmarks(results: Any) -> None:
    """`python docs/results.py` changes nothing; it does where a page or a benchmark differs."""
    assert len(results.PAGES) == len(DOCS) + 1
    for path in results.PAGES:
        text = path.read_text(encoding="utf-8")
        assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(results.MARKED.findall(text))
        assert results.written(text) == text, f"{path.name}: run `python docs/results.py`"
    text = read("docs/search.md")
    assert results.written(text.replace("**74.9 ± 0.5**", "**99.9 ± 0.5**")) == text


def test_every_benchmark_is_shown(results: Any) -> None:
    """What a command of benchmarks/ has measured stands on a page, or is linked from one."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS)
    shown = set(re.findall(r"<!-- table: (\S+\.md)", text)) | set(re.findall(r"\]\(\.\./benchmarks/(\S+?)\)", text))
    shown |= {f"sweeps/{shift}/search/table.md" for shift in ("noise", "label_map")}
    measured = {path.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.rglob("*.md")}
    assert measured <= shown


@pytest.mark.parametrize("folder", ["quickstart", "quickstart-8-epochs"])
def test_the_tables_of_the_quickstart_are_those_of_its_reports(folder: str) -> None:
    report = load(BENCHMARKS / folder / "report.json")
    assert (BENCHMARKS / folder / "table.md").read_text(encoding="utf-8") == comparison_markdown(report)


def test_the_architectures_are_the_counted_ones() -> None:
    text = read("benchmarks/architectures/table.md")
    known, built = re.search(r"(\d+) model types, (\d+) of them built", text).groups()  # type: ignore[union-attr]
    assert f"of {known} types {built} can be built" in told("docs/blocks.md")
    assert text.count("| unknown |") == 2


def quickstart() -> dict[tuple[str, str], float]:
    """Mean test accuracy in %, by the first word of the method and the shift."""
    report = load(BENCHMARKS / "quickstart" / "report.json")
    return {
        (row["method"].split(" ")[0], shift): 100 * statistics.fmean(runs["test"])
        for row in report["methods"]
        for shift, runs in row["shifts"].items()
    }


def test_the_quickstart_shows_the_reversal() -> None:
    """The committed report is a run of `make quickstart`."""
    mean = quickstart()
    assert max(mean["last", "label map"], mean["head", "label map"]) >= mean["full", "label map"] + 3
    assert mean["first", "noise"] >= mean["last", "noise"] + 3
    assert mean["first", "noise"] >= mean["full", "noise"] - 1.5
    assert load(BENCHMARKS / "quickstart" / "report.json")["seconds"] <= 180


def test_what_is_said_of_the_quickstart_is_that_of_its_report() -> None:
    mean = quickstart()

    def gap(high: str, low: str, shift: str) -> str:
        return f"{mean[high, shift] - mean[low, shift]:.0f}"

    text = told("docs/results.md")
    first, last = gap("first", "last", "noise"), gap("last", "first", "label map")
    assert (
        f"the first blocks beat the last by {first} points; on the label map the last beat the first by {last}."
        in text
    )
    head, late = gap("head", "full", "label map"), gap("last", "full", "label map")
    assert f"is {head} points above full fine-tuning, the last two blocks {late}." in text
    assert f"loses {gap('full', 'Auto-RGN,', 'label map')} points to full fine-tuning on the label map" in text
    assert f"up to {gap('head', 'first', 'label map')} points in the quickstart" in told("README.md")
    assert f"up to {gap('head', 'first', 'label map')} points in the" in told("docs/index.md")


def test_what_is_said_of_the_headline_is_that_of_its_tables(results: Any) -> None:
    noise, label_map = (results.rows(f"compare/headline_{shift}/table.md") for shift in ("noise", "label_map"))

    def lost(method: str, table: Any) -> str:
        return table[method]["to full"].split()[0].removeprefix("-")

    wrong = f"loses, by {lost('last third', noise)} and {lost('first third', label_map)} points"
    assert wrong in told("README.md")
    share = int(label_map["auto"]["tuned"]) / int(label_map["full fine-tuning"]["tuned"].replace(",", ""))
    assert label_map["auto"]["accuracy, %"] == label_map["head"]["accuracy, %"]
    better = label_map["head"]["to full"].split()[0].removeprefix("+")
    claim = f"is {better} points better than full fine-tuning, with {100 * share:.1f} % of the parameters"
    assert claim in told("README.md")
    early, late = (float(noise[f"{part} third"]["accuracy, %"].split()[0]) for part in ("first", "last"))
    assert f"early blocks beat late ones by {early - late:.1f} points" in told("docs/results.md")
    assert f"the first layer alone, is {lost('auto', noise)} behind" in told("docs/results.md")


def test_what_is_said_of_the_probe_at_its_worst_is_that_of_the_scores() -> None:
    regrets = load(BENCHMARKS / "criteria" / "criteria.json")["probe"].values()
    worst = max(shift["regret"] for shift in regrets)
    assert f"at most {worst:.1f} points behind the best block on {len(regrets)} shifts" in told("docs/index.md")


def test_what_is_said_of_choosing_is_that_of_its_table() -> None:
    """Regrets of `blocks='auto'` at real sizes, within its budget."""
    lines = read("benchmarks/choosing.md").splitlines()
    regret = {line.split(" | ")[0].strip("| "): line.split(" | ")[-2] for line in reversed(lines) if line[:1] == "|"}
    points, loss = float(regret["ViT-S/14, 12 layers"].split()[0]), float(regret["SmolLM2, 30 layers"])
    text = told("docs/index.md")
    assert f"it fell {points:.0f} points behind the best of eight candidates on a ViT-S" in text
    assert f"and {loss:.2f} of the loss behind full fine-tuning on SmolLM2-135M" in text


def test_what_is_said_of_the_policies_is_that_of_their_table(results: Any) -> None:
    table = (BENCHMARKS / "policies" / "table.md").read_text(encoding="utf-8").splitlines()
    to_full = {
        line.split("|")[1].strip(" `"): re.findall(r"\| ([+-]\d+\.\d) ±", line) for line in table if "|" in line
    }
    on_label_map = {name: differences[1] for name, differences in to_full.items() if len(differences) == 3}
    paper, now, probe = (on_label_map[f"auto_rgn{rest}"] for rest in ("_paper()", "()", "(every='epoch')"))
    text = told("docs/policies.md")
    assert f"every epoch, {paper}) and in ours (kept, {now} from the gradients at hand, {probe} from a probe)" in text
    first, second, third = to_full["lisa(every=8)"]
    assert f"policy `lisa()`: {first}, {second} and {third} points to full" in told("docs/related_work.md")


def test_what_a_sweep_saves_is_that_of_the_table() -> None:
    ratio = re.search(r"\*\*the sweep\*\*.*\*\*(0\.\d\d)\*\*", read("benchmarks/sharing.md"))
    assert ratio is not None and f"takes {ratio[1]} of the time" in told("docs/search.md")
    assert float(ratio[1]) <= 0.6


def test_what_is_said_of_the_criteria_is_that_of_the_scores() -> None:
    """Mean regrets where one thing changed, and where two did; the table gives the mean of both."""
    found = load(BENCHMARKS / "criteria" / "criteria.json")
    truth = load(BENCHMARKS / "criteria" / "truth.json")["shifts"]
    seen = [shift for shift, each in truth.items() if each["group"] == "design"]
    unseen = [shift for shift in truth if shift not in seen]
    double = [shift for shift in truth if " and " in shift and shift != "sandals and sneakers"]
    assert (len(seen), len(unseen), len(set(double) & set(seen))) == (40, 10, 15)

    def mean(criterion: str, shifts: list[str], what: str = "regret", digits: int = 1) -> str:
        return f"{statistics.fmean(found[criterion][shift][what] for shift in shifts):.{digits}f}"

    one, two = ([shift for shift in unseen if (shift in double) is is_double] for is_double in (False, True))
    each = sorted(found["probe"][shift]["regret"] for shift in two)
    text = told("docs/scoring.md")
    assert f"a sweep of {mean('a sweep', [*truth], 'trainings', 0)} trainings, for" in text
    assert f"trainings, for {mean('probe', [*truth], 'trainings', 2)}.**" in text
    assert f"kept back it is {mean('probe', unseen)} points behind the best block, {mean('probe', one)} where" in text
    assert f"of mails) and {mean('probe', two)}, from {each[0]:.1f} to {each[-1]:.1f}, where two did" in text
    assert f"The sweep is {mean('a sweep', one)} and {mean('a sweep', two)} behind." in text
    assert f"it is {mean('probe', seen)} behind, and a sweep {mean('a sweep', seen)}." in text
    cheap = f"{mean('depth_gain', seen)} points behind on the seen shifts, {mean('depth_gain', unseen)} on the unseen."
    assert cheap in text
    mails = [shift for shift, of_shift in truth.items() if of_shift["kind"] == "mail"]
    assert f"On mail the probe takes {mean('probe', mails, 'trainings', 2)} of a training." in text
    constant = statistics.fmean(found["the last layer"][shift]["regret"] for shift in truth)
    for published in ("rgn", "grad_norm", "fisher", "snr", "bvr", "eb"):
        assert statistics.fmean(found[published][shift]["regret"] for shift in truth) > constant


COMPARED = {
    "label_map": "Label map",
    "noise": "Noise",
    "contrast": "Contrast",
    "subclass": "Subclass",
    "spam_char_noise": "Mistyped mail",
    "spam_hard_ham": "Hard ham and later spam",
}


@pytest.mark.parametrize("shift", COMPARED)
def test_what_is_said_of_the_comparisons_is_that_of_their_tables(shift: str) -> None:
    """Every share that is told of a comparison is a mean of its committed table."""
    table = (BENCHMARKS / "compare" / shift / "table.md").read_text(encoding="utf-8")
    means = set(re.findall(r"^\| [^|]*\| \**(\d+\.\d) ±", table, re.MULTILINE))
    assert len(means) > 10
    section = read("docs/results.md").split(f"### {COMPARED[shift]}\n")[1]
    shares = re.findall(r"(?<![+\d.])\d\d\.\d", section.split("<!--")[0])
    assert len(shares) >= 6 and set(shares) <= means
