from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, get_peft_config

from surgical_peft import Selection, SurgicalConfig, SurgicalError
from surgical_peft.tuner.config import SurgicalPeftType


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"selects nothing: give blocks=\[0, 1\]"),
        ({"blocks": []}, r"blocks=\[\] selects nothing"),
        ({"blocks": ()}, r"blocks=\[\] selects nothing"),
        ({"blocks": ""}, "blocks='' selects nothing"),
        ({"target_modules": []}, r"target_modules=\[\] selects nothing"),
        ({"blocks": [0], "target_modules": []}, r"target_modules=\[\]"),
        ({"blocks": [0], "criterion": "rgn"}, r"criterion only speak.*blocks=\[0\] already says"),
        ({"blocks": [0], "criterion": "rgn", "num_blocks": 2}, "criterion and num_blocks only speak"),
        ({"target_modules": ["a"], "num_blocks": 2}, "num_blocks.*blocks='auto'"),
        ({"blocks": "auto", "num_blocks": 0}, "num_blocks=0"),
        ({"blocks": "auto", "num_blocks": -1}, "num_blocks=-1"),
    ],
)
def test_refuses_nothing_and_two_answers(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        SurgicalConfig(**kwargs)


def test_block_zero_is_a_choice() -> None:
    assert SurgicalConfig(blocks=0).blocks == 0


def test_a_task_type_that_peft_does_not_know_is_pefts_error() -> None:
    with pytest.raises(ValueError, match="Invalid task type"):
        SurgicalConfig(blocks=[0], task_type="IMAGE")


@pytest.mark.parametrize("kind", [tuple, set])
def test_tuples_and_sets_become_lists(kind: type) -> None:
    config = SurgicalConfig(blocks=kind([1]), target_modules=kind("ba"), exclude_modules=kind("dc"))
    assert config.blocks == [1]
    assert sorted(config.target_modules) == config.target_modules == ["a", "b"]
    assert config.exclude_modules == ["c", "d"]


def test_one_module_to_save_may_be_a_string() -> None:
    """PEFT goes through a string letter by letter, and saves every module whose name ends in one of them."""
    assert SurgicalConfig(blocks=[0], modules_to_save="classifier").modules_to_save == ["classifier"]


def test_a_criterion_may_be_a_function() -> None:
    config = SurgicalConfig(blocks="auto", criterion=max)
    assert config.criterion is max


def test_from_selection_takes_blocks_and_record() -> None:
    selection = Selection(blocks=("0", "head"), record={"criterion": "rgn"})
    config = SurgicalConfig.from_selection(selection, frozen_eval=False, target_modules=["mlp"])
    assert config.blocks == ["0", "head"]
    assert config.selection == {"criterion": "rgn"}
    assert not config.frozen_eval and config.target_modules == ["mlp"]


FULL = {
    "blocks": ["0", "head"],
    "target_modules": ["attention"],
    "exclude_modules": ["q_proj"],
    "modules_to_save": ["pooler"],
    "frozen_eval": False,
    "selection": {"criterion": "rgn", "scores": {"0": 0.5}},
    "task_type": "SEQ_CLS",
}


def test_round_trips_through_the_file(tmp_path: Path) -> None:
    config = SurgicalConfig(**FULL)
    config.save_pretrained(str(tmp_path))
    for cls in (PeftConfig, SurgicalConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert type(loaded) is SurgicalConfig
        assert loaded == config
        assert loaded.peft_type is SurgicalPeftType.SURGICAL
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SURGICAL"


def test_round_trips_through_a_dict_and_a_pickle() -> None:
    config = SurgicalConfig(**FULL)
    assert get_peft_config(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_field_of_a_later_version_is_kept_with_a_warning(tmp_path: Path) -> None:
    SurgicalConfig(blocks=[0]).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invented_later": 1}))
    with pytest.warns(UserWarning, match="invented_later"):
        config = PeftConfig.from_pretrained(str(tmp_path))
    config.save_pretrained(str(tmp_path / "again"))
    assert config.blocks == [0]
    assert json.loads((tmp_path / "again" / path.name).read_text())["invented_later"] == 1


def test_parts_of_blocks_become_modules_by_block() -> None:
    config = SurgicalConfig.from_selection(Selection(("0/mlp", "3/attention", "3/mlp", "head")))
    assert config.target_modules == {"0": ["mlp"], "3": ["attention", "mlp"], "head": "all"}
    assert config.blocks == ["0", "3", "head"]
    with pytest.raises(SurgicalError, match="parts of blocks"):
        SurgicalConfig.from_selection(Selection(("0/mlp",)), target_modules=["attention"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"blocks": np.array([0, 1])},
        {"blocks": b"0"},
        {"blocks": [0], "tuned_modules": {"x": 5}},
        {"blocks": [0], "tuned_modules": {"x": [None]}},
        {"blocks": [0], "inference_mode": "no"},
        {"blocks": [0], "base_model_name_or_path": 5},
        {"blocks": [0], "auto_mapping": [1]},
        {"blocks": "auto", "criterion": 5},
        {"target_modules": {1}},
        {"target_modules": "x" * 10**6},
        *(
            {"blocks": [0], "lora": {"target_modules": ["q"], **lora}}
            for lora in (
                *(
                    {"r": "8"},
                    {"r": 0},
                    {"r": 2.0},
                    {"r": None},
                    {"lora_alpha": "8"},
                    {"lora_dropout": 2},
                    {"bias": "x"},
                ),
                *({"rank_pattern": ["q"]}, {"rank_pattern": {"q": "8"}}, {"rank_pattern": {"q": 0}}, {"use_dora": 1}),
                *({"target_modules": "q", "layers_to_transform": [0]}, {"target_modules": [["q"]]}, {"eva_config": 3}),
            )
        ),
    ],
    ids=lambda kwargs: repr(kwargs)[:60],
)
def test_values_of_another_type_are_refused_before_a_model_is_touched(kwargs: dict[str, Any]) -> None:
    """They ended in errors of NumPy, re and torch, some of them in a model half wrapped."""
    with pytest.raises(SurgicalError):
        SurgicalConfig(**kwargs)
