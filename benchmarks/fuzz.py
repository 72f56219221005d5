"""Thousands of inputs that nobody meant, and their outcomes counted, into `benchmarks/fuzz.md`.

    python benchmarks/fuzz.py                       # the table
    python benchmarks/fuzz.py --cases 300 --start 1 deltas      # other cases of one family; writes no table

Each case is run in this process, for 10 seconds at most. The generators and what counts as right are those of the
tests (`tests/support/fuzz`), which run a few dozen cases of each family.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from datasets.utils.logging import disable_progress_bar, set_verbosity_error
from transformers.utils import logging

from surgical_peft.experiments.training.provenance import machine, today, versions
from surgical_peft.quiet import quieten

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the generators are those of the tests

from tests.support.fuzz.families import FAMILIES  # noqa: E402
from tests.support.fuzz.outcomes import LONGEST, Tally, run  # noqa: E402

CASES = {"recipes, values of keys": 450, "recipes, text": 350, "adapters": 350, "files of results": 300, "deltas": 250}
CASES |= {"SurgicalConfig, arguments": 130, "regular expressions": 80, "studies": 90, "data tables": 100}
_USUAL = 200
HEADER = ["| input | cases | clear error | accepted and right | else |", "| --- | ---: | ---: | ---: | ---: |"]


def row(name: str, tallies: list[Tally]) -> str:
    """A line of the table."""
    cells = [sum(tally.cases for tally in tallies), sum(tally.clear for tally in tallies)]
    cells += [sum(tally.right for tally in tallies), sum(len(tally.others) for tally in tallies)]
    return f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} |"


def main() -> int:
    """Run the families that were asked for; the exit code is 1 if there is an outcome that should not be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", choices=[[], *(family.name for family in FAMILIES)])
    parser.add_argument("--cases", type=int)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    logging.set_verbosity_error()
    disable_progress_bar()
    set_verbosity_error()
    began, tallies = time.monotonic(), []
    for family in FAMILIES:
        if options.families and family.name not in options.families:
            continue
        start = time.monotonic()
        tally = run(family, options.cases or CASES.get(family.name, _USUAL), options.start)
        tallies.append(tally)
        print(row(family.name, [tally]), f"{time.monotonic() - start:.0f} s", flush=True)
        for line in tally.others:
            print("   ", line, flush=True)
    if not options.families and not options.cases:
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        note = (
            f"A case takes {LONGEST:g} seconds at most. {(time.monotonic() - began) / 60:.0f} minutes on one core. "
            f"{today()}, {packages}; {machine()}."
        )
        lines = [*HEADER, *(row(tally.family, [tally]) for tally in tallies), row("**all**", tallies), "", note]
        (ROOT / "benchmarks" / "fuzz.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(tally.others for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
