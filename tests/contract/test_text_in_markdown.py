"""Text from files stays text: whatever it is, Markdown, YAML and Python around it keep their structure."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from surgical_peft.experiments.advise.advice import Advice
from surgical_peft.experiments.advise.report import markdown as advice_markdown
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.compare.tables import markdown as comparison_markdown
from surgical_peft.experiments.search.search import search_markdown
from surgical_peft.experiments.training.card import make_card
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.export.card_text import AdapterInfo, describe, describe_export
from surgical_peft.search.result import SearchResult

ROOT = Path(__file__).parents[2]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PLAIN = " plain"  # with a space, so that it is no name of a class and none on the Hub
INSIDE = (
    "a|b \\| \\ `c` ``d`` <script>e</script> <!-- f [g](javascript:h) ![i](j) [k]: l {{ 7 * 7 }} {% raw %} **m** "
    "__n__ _o_ ~~p~~ &lt; &#60; <https://q> $r$\n\n---\n\n# s\n\n| t | u |\n| --- | --- |\n\n```\n\n~~~\n\n- v\r\n* w"
    '\x1b[1m\u2028x\x00"\'"""'
)
BEGINNINGS = [
    *("# ", "- ", "+ ", "* ", "1. ", "1) ", "> ", "---", "===", "    ", "\t", "```", "~~~", "| ", "<div>", "[x]: y"),
    *("`", "\\", "***", "{{ x }}", "%YAML", "!!int ", "&a ", "*a", "? ", ": ", "\n---\n", "[", "<!--", "-", "_"),
]
HOSTILE = [INSIDE, *(f"{beginning}y" for beginning in BEGINNINGS), *BEGINNINGS[:13]]
Write = Callable[[Callable[[str], str]], str]


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: with_texts(part, change) for key, part in value.items()}
    return [with_texts(part, change) for part in value] if isinstance(value, list) else value


def with_names(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    return {change(key): value for key, value in values.items()}


def card(change: Callable[[str], str], on_hub: bool = False) -> str:
    report = json.loads((ROOT / "model_cards" / "auto" / "report.json").read_text())
    policy = {"policy": "auto_rgn", "policy_options": {"every": "epoch"}}
    report["recipe"] |= policy
    report["rates"] |= policy
    kept = {"plot": report["plot"], "task": report["task"]}
    changed = with_texts({**report, "recipe": {**report["recipe"], "blocks": None}}, change) | kept
    changed["recipe"]["blocks"] = "auto"
    changed["dataset"]["on_hub"] = changed["base_model"]["on_hub"] = on_hub
    changed["dataset"]["summary"] = [change("columns: a = b"), change("")]
    for key in ("scores", "joint_loss"):
        changed["selection"][key] = with_names(changed["selection"][key], change)
    for part in ("before", "after"):
        changed[part] = {change(split): value for split, value in changed[part].items()}
    examples = changed["dataset"]["examples"]
    changed["dataset"]["examples"] = {"train": examples.pop("train"), **with_names(examples, change)}
    for holder in (changed["recipe"], changed["rates"]):
        holder["policy_options"] = with_names(holder["policy_options"], change)
    return f"{make_card(TrainingReport.from_json(changed))}\n"


def adapter(change: Callable[[str], str], export: str | None = None) -> str:
    texts = {name: change(name) for name in ("fingerprint", "base", "commit", "subfolder")}
    lists = {name: [change(name), change("")] for name in ("blocks", "modules", "modules_to_save")}
    selection = {change("a"): change("b"), "scores": {change("c"): 1.0}, "joint_loss": {change("d"): 1.0}}
    info = AdapterInfo(
        **texts,
        **lists,
        target_modules={change("e"): [change("f")]},
        lora=None,
        selection={**selection, "cost": {"steps": 1, "budget": change("g")}},
        base_class="BertModel",
        on_hub=True,
        head={"num_labels": 1, "id2label": {0: change("h")}},
        tied=[[change("i"), change("j")]],
        pipeline="text-classification",
        in_pipeline=True,
    )
    return describe_export(info, export) if export else describe([info, replace(info, on_hub=False, subfolder=None)])


def comparison(change: Callable[[str], str]) -> str:
    path = ROOT / "benchmarks" / "compare" / "headline_noise" / "report.json"
    return comparison_markdown(ComparisonReport.from_json(with_texts(json.loads(path.read_text()), change)))


def advice(change: Callable[[str], str]) -> str:
    candidate: dict[str, Any] = {"surgery": True, "same_as": None, "blocks": [change("0")], "tuned_parameters": 1}
    candidate |= {"probes": [], "rate": 1e-3, "at_edge": False, "validation": 0.5, "to_best": None}
    values = {
        **{key: change(key) for key in ("date", "machine", "metric")},
        "versions": {"torch": change("2")},
        "recipe": {},
        "validation_examples": 10,
        "share": 0.5,
        "surgery": True,
        "recommended": {
            "method": change("last"),
            "title": change("last"),
            "blocks": [change("0")],
            "lines": {"a": change("b")},
            "tuned_parameters": 1,
            "all_parameters": 2,
        },
        "tied": [],
        "all_tied": False,
        "unfit": {change("head"): change("none")},
        "methods": [
            {**candidate, "method": change("last"), "title": change("last")},
            {**candidate, "method": change("first"), "title": change("first"), "same_as": change("last")},
        ],
        "scores": {"criterion": change("probe"), "values": {change("0"): 1.0}},
        "signature": {
            "gradients": {change("0"): 1.0},
            "moved": {change("0"): 1.0},
            "floor": {change("0"): 1.0},
            "loss": 1.0,
            "source_loss": 1.0,
            "moving": [change("0")],
            "kind": "input",
        },
        "cost": {"trainings": 1, "planned": 1.0, "full_trainings": 1.0, "seconds_each": 1.0, "seconds": 1.0},
        "sentences": [change("Tune it."), change("That is it.")],
        "constant": {"answer": change("a"), "metric": 0.5},
    }
    return advice_markdown(Advice.from_json(values))


def searched(change: Callable[[str], str]) -> str:
    path = next(iter(sorted((ROOT / "benchmarks").rglob("search.json"))))
    result = SearchResult.load(path)
    trials = tuple(replace(trial, blocks=tuple(map(change, trial.blocks))) for trial in result.trials)
    return search_markdown(replace(result, procedure=change(result.procedure), trials=trials), change("accuracy"))


WRITTEN: dict[str, Write] = {
    "card": card,
    "card of what is on the Hub": lambda change: card(change, on_hub=True),
    "adapter": adapter,
    "peft": lambda change: adapter(change, "peft"),
    "merged": lambda change: adapter(change, "merged"),
    "comparison": comparison,
    "advice": advice,
    "search": searched,
}


def structure(text: str) -> Any:
    """All but the text: tokens of Markdown with their links, keys of YAML, and Python without its constants."""
    made = ModelCard(text) if text.startswith("---\n") else None
    head = with_texts(yaml.safe_load(yaml.safe_dump(made.data.to_dict())), lambda _: "") if made else None
    return head, list(outline(PARSER.parse(made.text if made else text)))


def outline(tokens: list[Token]) -> Iterator[Any]:
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            tree = ast.parse(token.content)
            yield [(type(node).__name__, getattr(node, "id", getattr(node, "attr", None))) for node in ast.walk(tree)]
        if token.type == "fence" and token.info == "yaml":
            yield with_texts(list(yaml.safe_load(token.content)), lambda _: "")
        if token.type not in ("text", "text_special"):
            yield token.type, token.tag, token.info, token.attrGet("href"), token.attrGet("src")
        yield from outline(token.children or [])


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_text_from_files_is_no_structure(write: Write) -> None:
    expected = structure(write(lambda text: f"{text}{PLAIN}"))
    assert len(expected[1]) > 10
    for hostile in HOSTILE:
        assert structure(write(lambda text, hostile=hostile: f"{hostile}{text}{PLAIN}")) == expected, repr(hostile)


def test_the_outline_tells_structure_apart() -> None:
    """Else nothing here could fail."""
    outlines = {repr(structure(f"a {hostile}")) for hostile in (PLAIN, INSIDE, "`b`", "[c](d)", "<b>", "**e**")}
    assert len(outlines) == 6
