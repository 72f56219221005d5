"""The command line in this process, and reports without what differs at every run."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from surgical_peft.cli.main import main

QUIET = Console(file=io.StringIO())
TIMED = ("date", "seconds", "ms", "ms_ratio", "choosing_seconds")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["surgical-peft", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def timeless(report: Any) -> Any:
    if isinstance(report, dict):
        return {key: timeless(value) for key, value in report.items() if key not in TIMED}
    return [timeless(each) for each in report] if isinstance(report, list) else report
