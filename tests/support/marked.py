"""A module that leaves a file when it is imported, and a metric's script that does when it runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_MODULE = """
open({mark!r}, "w").close()

def forgets(*given, **options):
    "Neither a policy nor anything else."

def score(weights, grads, *, a=0):
    return 1.0

def task(recipe, splits):
    "No task."
"""


@dataclass(frozen=True)
class Marked:
    """The module `marked`.

    Attributes:
        mark: the file that it leaves.
    """

    mark: Path

    @property
    def ran(self) -> bool:
        """Whether it was imported."""
        return self.mark.exists()


def marked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Marked:
    """Makes the module `marked`, that can be imported and has not been."""
    (folder / "modules").mkdir()
    made = Marked(folder / "imported")
    (folder / "modules" / "marked.py").write_text(_MODULE.format(mark=str(made.mark)))
    monkeypatch.syspath_prepend(folder / "modules")
    monkeypatch.setitem(sys.modules, "marked", None)  # type: ignore[arg-type]  # so that it is forgotten afterwards
    del sys.modules["marked"]
    return made
