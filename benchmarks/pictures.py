"""Draw all pictures anew from the reports of the other commands, without training anything; and the one of README.md.

python benchmarks/pictures.py
"""

from __future__ import annotations

import json
from pathlib import Path

from surgical_peft import BlockScores
from surgical_peft.experiments.compare.plot import plot as plot_comparison
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.scoring.plot import plot_scores
from surgical_peft.search.profile_plot import plot_profile
from surgical_peft.search.result import SearchResult

HERE = Path(__file__).parent
SHIFTS = {"noise on the images": "noise", "labels mapped to others": "label_map"}


def main() -> None:
    """Write the pictures beside their reports."""
    for path in HERE.glob("quickstart*/report.json"):
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        by_shift = {shift: BlockScores.from_json(json.dumps(each)) for shift, each in scores.items()}
        plot_scores(by_shift, path.with_name("scores.png"))
    for path in HERE.glob("compare/*/report.json"):
        report = ComparisonReport.from_json(json.loads(path.read_text(encoding="utf-8")))
        plot_comparison(report, path.with_name("compare.png"))
    for path in HERE.glob("*/*/search/profile.png"):
        SearchResult.load(path.with_name("search.json")).plot(path, "validation accuracy")
    sweeps = HERE / "sweeps"
    results = {title: SearchResult.load(sweeps / name / "search" / "search.json") for title, name in SHIFTS.items()}
    plot_profile(results, sweeps / "profiles.png", "validation accuracy")


if __name__ == "__main__":
    main()
