"""Does it reproduce the paper? Our figures beside those of Lee et al. 2022, from the comparisons in compare/.

    for name in cifar10_c cifar10_c_online cifar10_flip; do
      surgical-peft compare recipes/real/$name.yaml --jobs 2
      cp -r runs/$name/comparison benchmarks/compare/$name
    done
    python benchmarks/paper.py

writes `paper.md`. A draw is one corruption, of the labels that are flipped one of images. The paper's best part is
another one for each corruption, chosen on validation images; so is ours here. The paper's figures are those of the
project's seed document (ICLR 2023, CIFAR-C with a ResNet-26); those of other tables of the paper were not to be found
in a form that we could check.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgical_peft.experiments.compare.statistics import Interval, t_interval

HERE = Path(__file__).parent
REPORTS = HERE / "compare"
FULL = "full fine-tuning"
PARTS = {
    "blocks embeddings, stages.0[:]": "first stage",
    "blocks stages.1[:]": "second stage",
    "blocks stages.2[:]": "third stage",
    "head": "last layer",
}
NAMES = {**PARTS, "auto_snr(criterion='eb', normalized=None, threshold=0.95)": "Auto-SNR (paper)"}
BEST = "best single part"
PAPER = {BEST: 82.8, "Auto-RGN (paper)": 81.4, FULL: 79.9}
TWO_STAGES = "first two stages"
NAMES["blocks embeddings, stages.0[:], stages.1[:]"] = TWO_STAGES
ONLINE = {"no adaptation": 67.8, FULL: 69.7, "first stage": 75.4, TWO_STAGES: 75.5, "last layer": 67.8}


def results(report: dict[str, Any]) -> dict[str, list[float]]:
    """The test accuracies of each method, in percent, one for each corruption; and of the best part of each."""
    rows = {row["method"]: row for row in report["methods"]}
    found = {NAMES.get(name, name): [100 * value for value in row["test"]] for name, row in rows.items()}
    if PARTS.keys() <= rows.keys():
        found[BEST] = [found[PARTS[part]][number] for number, part in enumerate(best_parts(rows))]
    return found


def best_parts(rows: dict[str, Any]) -> list[str]:
    """For each corruption the part with the best validation accuracy."""
    draws = zip(*(rows[part]["validation"] for part in PARTS), strict=True)
    return [max(zip(PARTS, values, strict=True), key=lambda pair: pair[1])[0] for values in draws]


def difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference with its 95 % interval over corruptions."""
    return t_interval([value - other for value, other in zip(values, others, strict=True)])


def in_words(interval: Interval) -> str:
    """A difference with its interval, in points."""
    bounds = "" if interval.low is None else f" ({interval.low:+.1f} to {interval.high:+.1f})"
    return f"{interval.mean:+.1f}{bounds}"


def beside_the_paper(title: str, found: dict[str, list[float]], told_there: dict[str, float]) -> list[str]:
    """A table of the paper's figures, ours, and what follows."""
    lines = [f"| {title} | paper | ours | to full, paper | to full, ours |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    parts = [BEST, *PARTS.values()]
    for name in [*(part for part in parts if part in found), *(name for name in found if name not in parts)]:
        paper = told_there.get(name)
        to_full = "-" if paper is None or name == FULL else f"{paper - told_there[FULL]:+.1f}"
        ours = "-" if name == FULL else in_words(difference(found[name], found[FULL]))
        told = "-" if paper is None else f"{paper:.1f}"
        lines.append(f"| {name} | {told} | {statistics.fmean(found[name]):.1f} | {to_full} | {ours} |")
    return lines


def answers(report: dict[str, Any], found: dict[str, list[float]]) -> list[str]:
    """A plain answer for each claim of the paper's row."""
    lines = []
    for name, claim in ((BEST, "One part, chosen well, beats everything"), ("Auto-RGN (paper)", "So does Auto-RGN")):
        gain = difference(found[name], found[FULL])
        verdict = (
            ("yes" if gain.mean > 0 else "no, it is below")
            if gain.is_clear
            else "no: within the spread over corruptions"
        )
        lines.append(f"- {claim}: {verdict} ({in_words(gain)} points; the paper {PAPER[name] - PAPER[FULL]:+.1f}).")
    chosen = Counter(PARTS[part] for part in best_parts({row["method"]: row for row in report["methods"]}))
    lines.append(
        f"- The best part by corruption: {', '.join(f'{name} {count}' for name, count in chosen.most_common())}."
    )
    return lines


def by_corruption(report: dict[str, Any], found: dict[str, list[float]]) -> list[str]:
    """A table of each corruption."""
    names = [Path(draw).name.rpartition("-")[0].replace("_", " ") for draw in report["recipe"]["draws"]]
    columns = [name for name in found if name != BEST]
    lines = [f"| corruption | {' | '.join(columns)} |", f"| --- | {' | '.join('---:' for _ in columns)} |"]
    for number, name in enumerate(names):
        values = [found[column][number] for column in columns]
        cells = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report_of(name: str) -> dict[str, Any]:
    """What a comparison found."""
    report: dict[str, Any] = json.loads((REPORTS / name / "report.json").read_text(encoding="utf-8"))
    return report


def origin_of(report: dict[str, Any]) -> list[str]:
    """When, with what and where it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return [f"{report['date']}, {versions}; {report['machine']}."]


def main() -> None:
    """Write the page's tables, of those comparisons that have been made."""
    report = report_of("cifar10_c")
    found = results(report)
    parts = [
        ["# Beside the paper"],
        beside_the_paper("CIFAR-C, ResNet-26", found, PAPER),
        answers(report, found),
        by_corruption(report, found),
        origin_of(report),
    ]
    if (REPORTS / "cifar10_flip").exists():
        flip = report_of("cifar10_flip")
        parts += [beside_the_paper("CIFAR-Flip, ResNet-26", results(flip), {}), origin_of(flip)]
    if (REPORTS / "cifar10_c_online").exists():
        online = report_of("cifar10_c_online")
        along = results(online)
        parts += [beside_the_paper("CIFAR-C, streams without labels", along, ONLINE), by_corruption(online, along)]
        parts += [origin_of(online)]
    (HERE / "paper.md").write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
