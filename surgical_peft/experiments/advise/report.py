"""Advice as a table and in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction

from ...blocks.block_map import blocks_in_words
from ...rendering import TextTable, markdown_block, markdown_row, markdown_text
from ..training.source_data import SOURCE_LOSS, unit_of_loss
from .advice import Advice, CandidateReport, Difference
from .forgetting import limit_in_words

_CLEAR = 2.0  # standard errors
_COLUMNS = ("method", "{metric}", "to the best", "rate", "tuned")


def table(advice: Advice) -> TextTable:
    """The candidates as a table of 80 columns; the recommended one is bold."""
    chosen = [number for number, row in enumerate(advice.methods) if row.method == advice.chosen]
    header = [name.replace(", %", ",\u00a0%") for name in _header(advice)]
    left = (0, len(header) - 1)
    return TextTable(_title(advice), header, _rows(advice, "{}"), _legend(advice), left=left, bold=chosen)


def _legend(advice: Advice) -> list[str]:
    """What the columns, marks and states mean."""
    points = " in points" * advice.is_share
    given = "from the recipe's" if advice.recipe.get("rates") else "a third, once and three times the recipe's"
    notes = [
        f"To the best: paired difference{points}, ± one standard error; as good: within one of them. Rate: the best "
        f"of those tried, {given}. Tuned: parameters. Out after 1/4: of the steps, as others were better."
    ]
    notes += [_source_note(advice).strip()] * (advice.source_examples is not None)
    if advice.forgetting is not None:
        notes.append(
            "Forgets more: than the limit allows; others may be out for that, too. The best is of those that keep it."
        )
    if any(row.at_edge for row in advice.methods):
        notes.append("* the lowest or highest that was tried: the best rate may lie beyond.")
    if advice.constant is not None:
        notes.append(f"The same answer, {advice.constant.answer}, for every example gives {_shown(advice)}.")
    return notes


def _source_note(advice: Advice) -> str:
    """What the column of the source loss means, where there is one."""
    if advice.source_examples is None:
        return ""
    where = f"on {advice.source_examples:,} examples of the source model's own data"
    return f"Source loss: its rise {where}, in {unit_of_loss(advice.recipe)}. "


def _shown(advice: Advice) -> str:
    """The metric of the constant answer."""
    assert advice.constant is not None
    scale = 100 if advice.is_share else 1
    return f"{advice.metric} {scale * advice.constant.metric:.4g}{' %' * advice.is_share}"


def markdown(advice: Advice) -> str:
    """The advice as Markdown: what to do, what to write into the recipe, the table and the signature."""
    recommended = advice.recommended
    lines = [markdown_text(" ".join(advice.sentences)), ""]
    if recommended is not None and recommended.lines:
        lines += [markdown_block("\n".join(recipe_lines(advice)), "yaml"), ""]
    header = _header(advice, markdown_text)
    lines += [markdown_row(header), markdown_row(["---", *["---:"] * (len(header) - 2), "---"])]
    lines += [markdown_row(row) for row in _rows(advice, "**{}**", markdown_text)]
    cost, signature = advice.cost, advice.signature
    lines += [
        "",
        f"{_title(advice)}; ± one standard error of the paired difference. Of those within one of the best, the one "
        f"that tunes the fewest parameters is recommended. {_source_note(advice)}{cost.trainings} short trainings, "
        f"planned as {cost.planned:.1f} full fine-tunings at most; with choosing, measuring and the signature they "
        f"took as long as {cost.full_trainings:.1f}.",
        "",
    ]
    lines += map(markdown_text, not_tried(advice))
    lines += [""] if advice.unfit else []
    scores, moved, floor = advice.scores.values, signature.moved or {}, signature.floor or {}
    header = ["block", f"score ({markdown_text(advice.scores.criterion)})", "gradient (rgn)"]
    lines += [markdown_row([*header, *(["features moved", "chance"] if moved else [])])]
    lines += [markdown_row(["---", *["---:"] * (2 + 2 * bool(moved))])]
    for name, gradient in signature.gradients.items():
        values = [scores.get(name), gradient, *([moved.get(name), floor.get(name)] if moved else [])]
        lines.append(
            markdown_row([markdown_text(name), *("-" if value is None else f"{value:.3g}" for value in values)])
        )
    lines += ["", "![signature](signature.png)", ""]
    versions = ", ".join(f"{name} {number}" for name, number in advice.versions.items())
    made = markdown_text(f"{advice.date}, {versions}; {advice.machine}.")
    return "\n".join([*lines, made]) + "\n"


def not_tried(advice: Advice) -> list[str]:
    """A line for each candidate that does not fit the model, with the reason."""
    return [f"Not tried: {name}. {why}" for name, why in advice.unfit.items()]


def recipe_lines(advice: Advice) -> list[str]:
    """The lines to write into the recipe, for `surgical-peft train`."""
    lines = advice.recommended.lines if advice.recommended else {}
    return [f"{key}: {json.dumps(value)}" for key, value in lines.items()]


def sentences(advice: Advice) -> list[str]:
    """The advice in words: the recommendation, how sure it is, what a limit costs, and the signature."""
    if advice.recommended:
        lines = _recommendation(advice)
    elif advice.forgetting is not None and advice.forgetting.none_keeps_it:
        lines = []
    else:
        lines = _nothing_learned(advice)
    return [*lines, *limit_in_words(advice), *_signature(advice)]


def _nothing_learned(advice: Advice) -> list[str]:
    assert advice.constant is not None
    rates = sorted({probe.rate for row in advice.methods for probe in row.probes if probe.rate is not None})
    args = advice.recipe.get("max_steps"), advice.recipe.get("num_train_epochs", 3)
    length = f"max_steps: {args[0]}" if (args[0] or 0) > 0 else f"num_train_epochs: {args[1]:g}"
    which = "no way of tuning" + " within the limit" * (advice.forgetting is not None)
    return [
        f"Nothing has learned yet: {which} is better, by more than noise, than the answer "
        f"{advice.constant.answer} for every example ({_shown(advice)} on {advice.validation_examples} validation "
        "examples). So none is recommended.",
        f"Train longer (the recipe has {length}, and these trainings had at most {_part(advice.share)} of that) or at "
        f"other rates (tried: {', '.join(f'{rate:g}' for rate in rates)}), and ask again.",
    ]


def _recommendation(advice: Advice) -> list[str]:
    assert advice.recommended is not None
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
    assert recommended is not None
    rate = f" at the rate {chosen.rate:g}" if chosen.rate is not None else ""
    share = recommended.tuned_parameters / recommended.all_parameters
    if advice.surgery:
        text = f"Tune {blocks_in_words(recommended.blocks)}{rate} ({chosen.title}): {share:.1%} of the parameters."
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
    is_full = not advice.surgery and advice.chosen != "nothing"
    others = [
        row
        for row in advice.methods
        if row.to_best is not None and row.method not in advice.tied and not row.forgets_more
    ]
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
    steepest = _block(max(signature.gradients, key=lambda block: signature.gradients[block]))
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
        where = f"from {'the first block' if signature.kind == 'input' else _block(signature.moving[0])} on"
        shift = f"features move {where}, most in {_block(most)}"
    elif signature.kind == "output":
        shift = "the output moved: features are as on the source and the loss is high"
    else:
        shift = "nothing moved: neither features nor loss"
    return [f"Signature: {shift} ({losses}); {gradients}."]


def _block(name: str) -> str:
    return blocks_in_words([name])


def _title(advice: Advice) -> str:
    return f"After {_part(advice.share)} of the steps, on {advice.validation_examples} validation examples"


def _header(advice: Advice, shown: Callable[[str], str] = str) -> list[str]:
    columns = [*_COLUMNS, *[SOURCE_LOSS] * (advice.source_examples is not None), ""]
    return [name.format(metric=shown(advice.metric) + ", %" * advice.is_share) for name in columns]


def _rows(advice: Advice, bold: str, shown: Callable[[str], str] = str) -> list[list[str]]:
    scale = 100 if advice.is_share else 1
    rows = []
    for row in advice.methods:
        gap = row.to_best
        difference = "-" if gap is None else f"{scale * gap.mean:+.3g}{_plus_minus(gap, scale)}"
        is_chosen = row.method == advice.chosen
        cells = [
            shown(row.title),
            "-" if row.validation is None else f"{scale * row.validation:.4g}",
            difference,
            "-" if row.rate is None else f"{row.rate:g}{'*' * row.at_edge}",
            f"{row.tuned_parameters:,}",
            *[_risen(row.source_loss_rise)] * (advice.source_examples is not None),
            shown(_state(row, advice)),
        ]
        rows.append([bold.format(cell) for cell in cells[:2]] + cells[2:] if is_chosen else cells)
    return rows


def _state(row: CandidateReport, advice: Advice) -> str:
    if row.same_as:
        return f"same as {row.same_as}"
    if row.method == advice.chosen:
        return "recommended"
    if row.validation is None:
        last = row.probes[-1]
        if last.rate is None:
            return "head untrained"
        return f"out after {_part(last.share)}"
    if row.forgets_more:
        return "forgets more"
    return "as good" if row.method in advice.tied else "worse"


def _risen(rise: float | None) -> str:
    return "-" if rise is None else f"{rise:+.3f}"


def _part(share: float) -> str:
    return str(Fraction(share).limit_denominator(100))
