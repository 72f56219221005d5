"""Advice as a table, in words and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...rendering import markdown_row, new_figure

_CLEAR = 2.0  # standard errors
_COLUMNS = ("method", "{metric}", "to the best", "rate", "tuned", "")


def table(advice: dict[str, Any]) -> Table:
    """The candidates as a table of 80 columns; the recommended one is bold."""
    found = Table(title=_title(advice), box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(_header(advice)):
        found.add_column(name, justify="right" if 0 < number < 5 else "left", no_wrap=True)
    for row in _rows(advice, "[bold]{}[/bold]"):
        found.add_row(*row)
    return found


def markdown(advice: dict[str, Any]) -> str:
    """The advice as Markdown: what to do, what to write into the recipe, the table and the signature."""
    recommended = advice["recommended"]
    lines = [" ".join(advice["sentences"]), ""]
    if recommended["lines"]:
        lines += ["```yaml", *recipe_lines(advice), "```", ""]
    lines += [markdown_row(_header(advice)), markdown_row(["---", *["---:"] * 4, "---"])]
    lines += [markdown_row(row) for row in _rows(advice, "**{}**")]
    cost, signature = advice["cost"], advice["signature"]
    lines += [
        "",
        f"{_title(advice)}; ± one standard error of the paired difference. Of those within one of the best, the one "
        f"that tunes the fewest parameters is recommended. {cost['trainings']} short trainings, planned as "
        f"{cost['planned']:.1f} full fine-tunings at most; with choosing, measuring and the signature they took as "
        f"long as {cost['full_trainings']:.1f}.",
        "",
    ]
    lines += not_tried(advice)
    lines += [""] if advice["unfit"] else []
    scores, moved, floor = advice["scores"]["values"], signature["moved"] or {}, signature["floor"] or {}
    header = ["block", f"score ({advice['scores']['criterion']})", "gradient (rgn)"]
    lines += [markdown_row([*header, *(["features moved", "chance"] if moved else [])])]
    lines += [markdown_row(["---", *["---:"] * (2 + 2 * bool(moved))])]
    for name, gradient in signature["gradients"].items():
        values = [scores.get(name), gradient, *([moved.get(name), floor.get(name)] if moved else [])]
        lines.append(markdown_row([name, *("-" if value is None else f"{value:.3g}" for value in values)]))
    lines += ["", "![signature](signature.png)", ""]
    versions = ", ".join(f"{name} {number}" for name, number in advice["versions"].items())
    return "\n".join([*lines, f"{advice['date']}, {versions}; {advice['machine']}."]) + "\n"


def not_tried(advice: dict[str, Any]) -> list[str]:
    """Which candidates do not fit the model, and why."""
    return [f"Not tried: {name}. {why}" for name, why in advice["unfit"].items()]


def recipe_lines(advice: dict[str, Any]) -> list[str]:
    """What to write into the recipe, for `surgical-peft train`."""
    return [f"{key}: {json.dumps(value)}" for key, value in advice["recommended"]["lines"].items()]


def sentences(advice: dict[str, Any]) -> list[str]:
    """What to do, how sure that is, and what the signature says."""
    return [*_recommendation(advice), *_signature(advice)]


def _recommendation(advice: dict[str, Any]) -> list[str]:
    recommended = advice["recommended"]
    name, rows = recommended["method"], {row["method"]: row for row in advice["methods"]}
    own = rows[name]
    best = next(row for row in rows.values() if row["validation"] is not None and row["to_best"] is None)
    others = [row for row in rows.values() if row["validation"] is not None and row["method"] not in advice["tied"]]
    whole = not advice["surgery"] and name != "nothing"  # then what matters is how far behind surgery is
    candidate = max(others, key=lambda row: (whole and row["surgery"], row["validation"]), default=None)
    rate = f" at the rate {own['rate']:g}" if own["rate"] is not None else ""
    share = recommended["tuned_parameters"] / recommended["all_parameters"]
    if advice["surgery"]:
        first = f"Tune {', '.join(recommended['blocks'])}{rate} ({own['title']}): {share:.1%} of the parameters."
    elif name == "nothing":
        first = (
            "Do not use surgery here, nor tune at all: nothing is better than the model as it is by more than noise."
        )
    else:
        first = f"Do not use surgery here: tune all blocks{rate} ({own['title']})."
    if advice["all_tied"]:
        count = advice["validation_examples"]
        first = (
            f"The {count} validation examples cannot tell the last candidates apart; the smallest of them is: {first}"
        )
    if own["at_edge"]:
        first += " That rate is at the edge of the grid: a wider one may do better."
    tied = [rows[each]["title"] for each in advice["tied"] if each != name]
    second = ""
    if own is not best:
        stands = f"as good as {best['title']}"
        if own["to_best"]["mean"] != 0:
            stands = f"{_behind(advice, own)} than {best['title']}, which may be noise"
        second = f"On validation data it is {stands}, and it tunes fewer parameters. "
    elif tied:
        second = f"As good within noise, but no smaller: {', '.join(tied)}. "
    if candidate is None:
        return [first, second + "Of those trained longest none is clearly worse: more validation data would tell."]
    if whole and not candidate["surgery"]:
        return [first, second + "No choice of blocks was good enough to be trained longer."]
    gap = candidate["to_best"]
    clear = -gap["mean"] > _CLEAR * gap["standard_error"]
    which = f"The best choice of blocks, {candidate['title']}," if whole else f"The next, {candidate['title']},"
    noise = "more than noise" if clear else "that may be noise"
    return [first, f"{second}{which} is {_behind(advice, candidate)} than the best: {noise}."]


def _behind(advice: dict[str, Any], row: dict[str, Any]) -> str:
    gap = row["to_best"]
    scale, unit = (100, " points") if _is_share(advice) else (1, "")
    return f"{-scale * gap['mean']:.3g} ± {scale * gap['standard_error']:.2g}{unit} worse"


def _signature(advice: dict[str, Any]) -> list[str]:
    found = advice["signature"]
    steepest = max(found["gradients"], key=found["gradients"].get)
    gradients = f"the relative gradient is largest in {steepest}"
    if found["kind"] is None:
        why = "with source_data in the recipe it would say how far features move"
        if advice["recipe"].get("source_data"):
            why = "there are too few examples to say how far features move"
        return [f"Signature: {gradients}; {why}."]
    losses = f"loss {found['loss']:.3g}, {found['source_loss']:.3g} on the source"
    if found["kind"] in ("input", "features"):
        most = max(found["moving"], key=lambda name: found["moved"][name])
        where = "from the first block on" if found["kind"] == "input" else f"from block {found['moving'][0]} on"
        said = f"features move {where}, most in {most}"
    elif found["kind"] == "output":
        said = "the output moved: features are as on the source and the loss is high"
    else:
        said = "nothing moved: neither features nor loss"
    return [f"Signature: {said} ({losses}); {gradients}."]


def plot(advice: dict[str, Any], path: str | Path) -> None:
    """Scores, relative gradients and, with source data, how far features move; a bar for each block."""
    found = advice["signature"]
    panels: list[tuple[str, Mapping[str, float]]] = [("relative gradient norm", found["gradients"])]
    if advice["scores"]["values"]:
        panels.insert(0, (f"score: {advice['scores']['criterion']}", advice["scores"]["values"]))
    if found["moved"]:
        panels.append(("features, source to target", found["moved"]))
    names = list(dict.fromkeys(name for _, values in panels for name in values))
    size = 7 if len(names) > 40 else 10
    with new_figure(path, 3.4 * len(panels) + 0.8, 1.4 + 0.28 * len(names)) as figure:
        for axes, (title, values) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
        ):
            axes.barh(range(len(names)), [values.get(name, 0.0) for name in names], color="#4477aa")
            axes.set_title(title, fontsize=10)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if values is found["moved"]:
                floor = [found["floor"][name] if name in values else 0.0 for name in names]
                axes.plot(floor, range(len(names)), "|", color="#cc6677", markersize=11, markeredgewidth=2)
                axes.set_xlabel("energy coefficient; red: two halves of the source", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_ylim(len(names) - 0.4, -0.6)


def _is_share(advice: dict[str, Any]) -> bool:
    metrics = [probe["metric"] for row in advice["methods"] for probe in row["probes"]]
    return all(0 <= metric <= 1 for metric in metrics if metric is not None)


def _title(advice: dict[str, Any]) -> str:
    return f"After {_part(advice['share'])} of the steps, on {advice['validation_examples']} validation examples"


def _header(advice: dict[str, Any]) -> list[str]:
    return [name.format(metric=advice["metric"] + ", %" * _is_share(advice)) for name in _COLUMNS]


def _rows(advice: dict[str, Any], bold: str) -> list[list[str]]:
    scale = 100 if _is_share(advice) else 1
    found = []
    for row in advice["methods"]:
        gap = row["to_best"]
        difference = "-" if gap is None else f"{scale * gap['mean']:+.3g} ± {scale * gap['standard_error']:.2g}"
        is_chosen = row["method"] == advice["recommended"]["method"]
        cells = [
            row["title"],
            "-" if row["validation"] is None else f"{scale * row['validation']:.4g}",
            difference,
            "-" if row["rate"] is None else f"{row['rate']:g}",
            f"{row['tuned_parameters']:,}",
            _state(row, advice),
        ]
        found.append([bold.format(cell) for cell in cells[:2]] + cells[2:] if is_chosen else cells)
    return found


def _state(row: dict[str, Any], advice: dict[str, Any]) -> str:
    if row["same_as"]:
        return f"same as {row['same_as']}"
    if row["method"] == advice["recommended"]["method"]:
        return "recommended"
    if row["validation"] is None:
        last = row["probes"][-1]
        if last["rate"] is None:
            return "head untrained"
        return f"out after {_part(last['share'])}"
    return "as good" if row["method"] in advice["tied"] else "worse"


def _part(share: float) -> str:
    return str(Fraction(share).limit_denominator(100))
