"""Does it reproduce the paper? Our figures beside those of Lee et al. 2022, from the comparisons in compare/.

    surgical-peft compare recipes/real/cifar10_c.yaml --jobs 2
    cp -r runs/cifar10_c/comparison benchmarks/compare/cifar10_c
    python benchmarks/paper.py

writes `paper.md`. A draw is one corruption. The paper's best part is another one for each corruption, chosen on
validation images; so is ours here. The paper's figures are those of the project's seed document (ICLR 2023, CIFAR-C
with a ResNet-26); those of other tables of the paper were not to be found in a form that we could check.
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
REPORT = HERE / "compare" / "cifar10_c" / "report.json"
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


def results(report: dict[str, Any]) -> dict[str, list[float]]:
    """The test accuracies of each method, in percent, one for each corruption; and of the best part of each."""
    rows = {row["method"]: row for row in report["methods"]}
    found = {NAMES.get(name, name): [100 * value for value in row["test"]] for name, row in rows.items()}
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


def beside_the_paper(found: dict[str, list[float]]) -> list[str]:
    """The first table: the paper's figures, ours, and what follows."""
    lines = ["| CIFAR-C, ResNet-26 | paper | ours | to full, paper | to full, ours |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    order = [BEST, *PARTS.values(), *(name for name in found if name not in (BEST, *PARTS.values()))]
    for name in order:
        paper = PAPER.get(name)
        to_full = "-" if paper is None or name == FULL else f"{paper - PAPER[FULL]:+.1f}"
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
    """The second table: each corruption."""
    names = [Path(draw).name.rpartition("-")[0].replace("_", " ") for draw in report["recipe"]["draws"]]
    columns = [name for name in found if name != BEST]
    lines = [f"| corruption | {' | '.join(columns)} |", f"| --- | {' | '.join('---:' for _ in columns)} |"]
    for number, name in enumerate(names):
        values = [found[column][number] for column in columns]
        cells = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Write the page's tables."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    found = results(report)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [
        ["# Beside the paper"],
        beside_the_paper(found),
        answers(report, found),
        by_corruption(report, found),
        [f"{report['date']}, {versions}; {report['machine']}."],
    ]
    (HERE / "paper.md").write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
