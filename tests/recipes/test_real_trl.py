"""The recipes of `recipes/real` that TRL trains, in tiny mode: they check themselves, and stop if anything fails."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

REAL = Path(__file__).parents[2] / "recipes" / "real"


@pytest.mark.parametrize("name", ["chat_sft", "dpo"])
def test_the_tiny_mode_passes_its_own_checks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(REAL / f"{name}.py"))["main"](["--tiny", "--output", str(tmp_path)])
    assert "its numbers mean nothing" in capsys.readouterr().out
    config = json.loads((tmp_path / "tiny" / "adapter_config.json").read_text())
    assert config["blocks"] == [str(layer) for layer in range(20, 30)]
    if name == "dpo":
        assert found["first loss"] == pytest.approx(0.6931, abs=1e-3) and found["last margin"] > found["first margin"]
    else:
        assert found["loss after"] < found["loss before"]


def test_of_a_wrong_answer_no_number_is_right() -> None:
    right = "She has 3 + 10 = 13 eggs.\n#### 13"
    wrong = runpy.run_path(str(REAL / "dpo.py"))["miscalculated"](right, 0)
    pairs = list(zip(right.split(), wrong.split(), strict=True))
    assert all((one != other and other.isdigit()) if one.isdigit() else one == other for one, other in pairs)


@pytest.mark.parametrize(("name", "function"), [("chat_sft", "problems"), ("dpo", "pairs")])
def test_data_that_are_missing_are_told_with_what_makes_them(name: str, function: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"make real-data.*openai/gsm8k"):
        runpy.run_path(str(REAL / f"{name}.py"))[function](tmp_path / "none")
