"""Threads that nobody waits for at their start."""

from __future__ import annotations

import _thread
from typing import Any

import pytest

from surgical_peft import SurgicalError
from surgical_peft.threads import in_background


def test_the_event_is_set_at_the_end_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    assert in_background(said.append, 3).wait(10) and said == [3]
    monkeypatch.setattr("sys.unraisablehook", lambda _: said.append(4))
    assert in_background([].pop).wait(10)


def test_no_room_for_a_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", full)
    with pytest.raises(SurgicalError, match="ulimit"):
        in_background(print)
