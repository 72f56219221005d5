"""What the installed command imports: little for `--help`, the whole library before a command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "transformers", "peft", "datasets", "matplotlib", "pandas"]

# As pip installs the command: a script of that name.
SCRIPT = f"""
import atexit, sys
if __name__ == "__main__":
    atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules]))
from surgical_peft.cli.main import main
if __name__ == "__main__":
    main()
"""

# A criterion of the user's own, in a process that the command started: the public names are there, PEFT knows us.
CRITERION = """
from multiprocessing import get_context
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from surgical_peft import SurgicalConfig
import surgical_peft

def known(_):
    return "SURGICAL" in PEFT_TYPE_TO_TUNER_MAPPING and bool(surgical_peft.__all__)

def counted(weights, grads):
    if not hasattr(counted, "told"):
        counted.told = True
        with get_context("spawn").Pool(1) as pool:
            print("known:", known(0), *pool.map(known, [0]), file=open("known.txt", "w"))
    return 1.0
"""


def start(folder: Path, *arguments: str) -> str:
    script = folder / "surgical-peft"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "-h"]], ids=" ".join)
def test_help_loads_no_library(tmp_path: Path, arguments: list[str]) -> None:
    assert start(tmp_path, *arguments).splitlines()[-1] == "imported:"


def test_a_command_knows_the_method_and_the_public_names_also_in_processes_that_it_starts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CRITERION)
    recipe = Path(__file__).parents[2] / "recipes" / "auto.yaml"
    start(tmp_path, "score", str(recipe), "--criterion", "mine:counted", "--json")
    assert (tmp_path / "known.txt").read_text() == "known: True True\n"
