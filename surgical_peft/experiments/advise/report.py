"""Advice as a table, in words and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...rendering import markdown_row, new_figure
from ...scoring.plot import draw_bars, words_of
from .advice import Advice, CandidateReport, Difference

_CLEAR = 2.0  # standard errors
_KINDS = {
    "input": "the input moved",
    "features": "features moved",
    "output": "the output moved",
    "nothing": "nothing moved",
    None: "gradients of the new data alone",
}
_COLUMNS = ("method", "{metric}", "to the best", "rate", "tuned", "")


def table(advice: Advice) -> Table:
    """The candidates as a table of 80 columns; the recommended one is bold."""
    columns = Table(title=_title(advice), box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(_header(advice)):
        columns.add_column(name, justify="right" if 0 < number < 5 else "left", no_wrap=True)
    for row in _rows(advice, "[bold]{}[/bold]"):
        columns.add_row(*row)
    return columns


def markdown(advice: Advice) -> str:
    """The advice as Markdown: what to do, what to write into the recipe, the table and the signature."""
    recommended = advice.recommended
    lines = [" ".join(advice.sentences), ""]
    if recommended.lines:
        lines += ["```yaml", *recipe_lines(advice), "```", ""]
    lines += [markdown_row(_header(advice)), markdown_row(["---", *["---:"] * 4, "---"])]
    lines += [markdown_row(row) for row in _rows(advice, "**{}**")]
    cost, signature = advice.cost, advice.signature
    lines += [
        "",
        f"{_title(advice)}; ± one standard error of the paired difference. Of those within one of the best, the one "
        f"that tunes the fewest parameters is recommended. {cost.trainings} short trainings, planned as "
        f"{cost.planned:.1f} full fine-tunings at most; with choosing, measuring and the signature they took as "
        f"long as {cost.full_trainings:.1f}.",
        "",
    ]
    lines += not_tried(advice)
    lines += [""] if advice.unfit else []
    scores, moved, floor = advice.scores.values, signature.moved or {}, signature.floor or {}
    header = ["block", f"score ({advice.scores.criterion})", "gradient (rgn)"]
    lines += [markdown_row([*header, *(["features moved", "chance"] if moved else [])])]
    lines += [markdown_row(["---", *["---:"] * (2 + 2 * bool(moved))])]
    for name, gradient in signature.gradients.items():
        values = [scores.get(name), gradient, *([moved.get(name), floor.get(name)] if moved else [])]
        lines.append(markdown_row([name, *("-" if value is None else f"{value:.3g}" for value in values)]))
    lines += ["", "![signature](signature.png)", ""]
    versions = ", ".join(f"{name} {number}" for name, number in advice.versions.items())
    return "\n".join([*lines, f"{advice.date}, {versions}; {advice.machine}."]) + "\n"


def not_tried(advice: Advice) -> list[str]:
    """A line for each candidate that does not fit the model, with the reason."""
    return [f"Not tried: {name}. {why}" for name, why in advice.unfit.items()]


def recipe_lines(advice: Advice) -> list[str]:
    """The lines to write into the recipe, for `surgical-peft train`."""
    return [f"{key}: {json.dumps(value)}" for key, value in advice.recommended.lines.items()]


def sentences(advice: Advice) -> list[str]:
    """The advice in words: the recommendation, how sure it is, and the signature."""
    return [*_recommendation(advice), *_signature(advice)]


def _recommendation(advice: Advice) -> list[str]:
    name, rows = advice.recommended.method, {row.method: row for row in advice.methods}
    chosen = rows[name]
    best = next(row for row in rows.values() if row.validation is not None and row.to_best is None)
    equals = [rows[tied].title for tied in advice.tied if tied != name]
    second = ""
    if chosen.to_best is not None:
        stands = f"as good as {best.title}"
        if chosen.to_best.mean != 0:
            stands = f"{_behind(advice, chosen.to_best)} than {best.title}, which may be noise"
        second = f"On validation data it is {stands}, and it tunes fewer parameters. "
    elif equals:
        second = f"As good within noise, but no smaller: {', '.join(equals)}. "
    return [_what_to_do(advice, chosen), second + _runner_up(advice)]


def _what_to_do(advice: Advice, chosen: CandidateReport) -> str:
    recommended = advice.recommended
    rate = f" at the rate {chosen.rate:g}" if chosen.rate is not None else ""
    share = recommended.tuned_parameters / recommended.all_parameters
    if advice.surgery:
        text = f"Tune {', '.join(recommended.blocks)}{rate} ({chosen.title}): {share:.1%} of the parameters."
    elif recommended.method == "nothing":
        text = (
            "Do not use surgery here, nor tune at all: nothing is better than the model as it is by more than noise."
        )
    else:
        text = f"Do not use surgery here: tune all blocks{rate} ({chosen.title})."
    if advice.all_tied:
        count = advice.validation_examples
        text = (
            f"The {count} validation examples cannot tell the last candidates apart; the smallest of them is: {text}"
        )
    return f"{text} That rate is at the edge of the grid: a wider one may do better." if chosen.at_edge else text


def _runner_up(advice: Advice) -> str:
    """The distance to the next candidate; where all blocks are to be tuned, to the best choice of some."""
    is_full = not advice.surgery and advice.recommended.method != "nothing"
    others = [row for row in advice.methods if row.to_best is not None and row.method not in advice.tied]
    if not others:
        return "Of those trained longest none is clearly worse: more validation data would tell."
    row = max(others, key=lambda other: (is_full and other.surgery, other.validation or 0.0))
    if row.to_best is None or (is_full and not row.surgery):
        return "No choice of blocks was good enough to be trained longer."
    error = row.to_best.standard_error
    is_clear = error is not None and -row.to_best.mean > _CLEAR * error
    which = f"The best choice of blocks, {row.title}," if is_full else f"The next, {row.title},"
    noise = "more than noise" if is_clear else "that may be noise"
    return f"{which} is {_behind(advice, row.to_best)} than the best: {noise}."


def _behind(advice: Advice, gap: Difference) -> str:
    scale, unit = (100, " points") if advice.is_share else (1, "")
    return f"{-scale * gap.mean:.3g}{_plus_minus(gap, scale)}{unit} worse"


def _plus_minus(gap: Difference, scale: float) -> str:
    return "" if gap.standard_error is None else f" ± {scale * gap.standard_error:.2g}"


def _signature(advice: Advice) -> list[str]:
    signature = advice.signature
    steepest = max(signature.gradients, key=lambda block: signature.gradients[block])
    gradients = f"the relative gradient is largest in {steepest}"
    if signature.kind is None:
        reason = "with source_data in the recipe it would say how far features move"
        if advice.recipe.get("source_data"):
            reason = "there are too few examples to say how far features move"
        return [f"Signature: {gradients}; {reason}."]
    losses = f"loss {signature.loss:.3g}, {signature.source_loss:.3g} on the source"
    moved = signature.moved or {}
    if signature.kind in ("input", "features"):
        most = max(signature.moving, key=lambda block: moved[block])
        where = "from the first block on" if signature.kind == "input" else f"from block {signature.moving[0]} on"
        shift = f"features move {where}, most in {most}"
    elif signature.kind == "output":
        shift = "the output moved: features are as on the source and the loss is high"
    else:
        shift = "nothing moved: neither features nor loss"
    return [f"Signature: {shift} ({losses}); {gradients}."]


def plot(advice: Advice, path: str | Path) -> None:
    """Scores, relative gradients and, with source data, how far features move; a bar for each block."""
    signature, floor = advice.signature, advice.signature.floor or {}
    scores, criterion = advice.scores.values, advice.scores.criterion
    panels: list[tuple[str, str, Mapping[str, float]]] = [
        ("gradients on the new data", "relative gradient norm,\nhigher = steeper for its weights", signature.gradients)
    ]
    if scores:
        panels.insert(0, ("scores", f"{words_of(criterion)} ({criterion}),\nhigher = tune", scores))
    if signature.moved:
        words = "energy coefficient, 0 to 1,\nhigher = further from the source"
        panels.append(("features, from source to new data", words, signature.moved))
    names = list(dict.fromkeys(name for *_, values in panels for name in values))
    size = 7 if len(names) > 40 else 10
    with new_figure(path, 3.6 * len(panels) + 1.2, 2.4 + 0.28 * len(names)) as figure:
        figure.suptitle(f"Signature of the shift: {_KINDS[signature.kind]}", fontsize=11)
        for axes, (title, unit, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_bars(axes, {name: values.get(name, 0.0) for name in names}, {}, size)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(unit, fontsize=9)
            axes.set_ylabel("block, input at the top")
            for number, name in enumerate(names):
                if name not in values:
                    axes.texts[number].set_text("not measured")
            if values is signature.moved:
                chance = [floor.get(name, 0.0) for name in names]
                look = {"color": "#cc6677", "markersize": 11, "markeredgewidth": 2}
                axes.plot(chance, range(len(names)), "|", label="chance: two halves of the source", **look)
                axes.set_xlim(right=1.22 * max(*chance, *values.values()))
                axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24))


def _title(advice: Advice) -> str:
    return f"After {_part(advice.share)} of the steps, on {advice.validation_examples} validation examples"


def _header(advice: Advice) -> list[str]:
    return [name.format(metric=advice.metric + ", %" * advice.is_share) for name in _COLUMNS]


def _rows(advice: Advice, bold: str) -> list[list[str]]:
    scale = 100 if advice.is_share else 1
    rows = []
    for row in advice.methods:
        gap = row.to_best
        difference = "-" if gap is None else f"{scale * gap.mean:+.3g}{_plus_minus(gap, scale)}"
        is_chosen = row.method == advice.recommended.method
        cells = [
            row.title,
            "-" if row.validation is None else f"{scale * row.validation:.4g}",
            difference,
            "-" if row.rate is None else f"{row.rate:g}",
            f"{row.tuned_parameters:,}",
            _state(row, advice),
        ]
        rows.append([bold.format(cell) for cell in cells[:2]] + cells[2:] if is_chosen else cells)
    return rows


def _state(row: CandidateReport, advice: Advice) -> str:
    if row.same_as:
        return f"same as {row.same_as}"
    if row.method == advice.recommended.method:
        return "recommended"
    if row.validation is None:
        last = row.probes[-1]
        if last.rate is None:
            return "head untrained"
        return f"out after {_part(last.share)}"
    return "as good" if row.method in advice.tied else "worse"


def _part(share: float) -> str:
    return str(Fraction(share).limit_denominator(100))
