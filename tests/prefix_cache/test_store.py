"""What is kept in files: used by a later run, never for something else, and nothing breaks where it cannot be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.prefix_cache import PrefixCache, cache_prefix
from surgical_peft.prefix_cache import store as store_module
from surgical_peft.prefix_cache.store import Store
from tests.support.cached import COUNT, EPOCHS, SIZE, Training, train
from tests.support.toys import TOYS, Toy

VIT = TOYS["vit"]
ROW = 5 * 16 * 4  # bytes of an example


def model(seed: int = 0, block: str = "11") -> nn.Module:
    return get_surgical_model(VIT.model(seed), SurgicalConfig(blocks=[block]))


def trained(cached: dict[str, Any] | None, seed: int = 0, examples: int = 0, epochs: int = EPOCHS) -> Training:
    return train(model(seed), VIT.batch(examples, COUNT), cached=cached, epochs=epochs)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def plain() -> Training:
    return trained(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain: Training) -> Path:
    """With all outputs for the examples."""
    folder = tmp_path_factory.mktemp("cache")
    first = trained({"memory": 0, "folder": folder}, epochs=1)
    assert first.cache and first.cache.misses == COUNT // SIZE and first.cache.store.written == COUNT * ROW
    return folder


def test_beyond_the_memory_they_go_to_files(plain: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT", 3 * ROW)
    short = trained({"memory": 5 * ROW + 7, "folder": tmp_path})
    short.same_as(plain)
    assert short.cache and short.cache.misses == COUNT // SIZE
    assert (short.cache.store.held, short.cache.store.written) == (5 * ROW, 7 * ROW)
    assert [path.stat().st_size > 0 for path in files(tmp_path)] == [True] * 3
    total = sum(path.stat().st_size for path in files(tmp_path))
    assert 7 * ROW < total < 7 * (ROW + 150)  # a header has a name and a shape for each


def test_a_later_run_uses_them_from_its_first_epoch(plain: Training, folder: Path) -> None:
    again = trained({"folder": folder})
    again.same_as(plain)
    assert again.cache and again.cache.misses == 0


def test_those_of_another_model_or_of_other_inputs_are_not_used(folder: Path) -> None:
    for options in ({"seed": 1}, {"examples": 1}):
        plain = trained(None, **options, epochs=1)
        other = trained({"folder": folder}, **options, epochs=1)
        other.same_as(plain)
        assert other.cache and other.cache.hits == 0


def test_other_blocks_use_them_where_the_start_is_the_same(folder: Path) -> None:
    with cache_prefix(wrapped := model(block="10"), folder=folder) as earlier:
        wrapped.train()(**VIT.batch(size=SIZE))
    assert (earlier.hits, earlier.misses) == (0, 1)
    config = SurgicalConfig(blocks=["11", "head"])
    with cache_prefix(wrapped := get_surgical_model(VIT.model(), config), folder=folder) as later:
        wrapped.train()(**{name: value[:SIZE] for name, value in VIT.batch(size=COUNT).items()})
    assert (later.hits, later.misses) == (1, 0)


def test_what_a_kill_or_a_disk_leaves_behind_is_not_used(plain: Training, folder: Path, tmp_path: Path) -> None:
    (whole,) = files(folder)
    target = tmp_path / whole.parent.name
    target.mkdir()
    content = whole.read_bytes()
    (target / f".{'0' * 16}.{'1' * 16}.safetensors").write_bytes(content[:500])  # cut off while it was written
    (target / "1.safetensors").write_bytes(content[:500])
    (target / "2.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        short = trained({"folder": tmp_path})
    short.same_as(plain)
    assert short.cache and short.cache.misses == COUNT // SIZE


def test_numbers_that_another_has_written_are_compared_first(plain: Training, folder: Path, tmp_path: Path) -> None:
    """A whole file with wrong numbers, as of a disk that is failing."""
    from safetensors.torch import load_file, save_file

    (whole,) = files(folder)
    (target := tmp_path / whole.parent.name).mkdir()
    save_file({name: value + 1 for name, value in load_file(whole).items()}, target / whole.name)
    with pytest.warns(UserWarning, match="used no more"):
        short = trained({"folder": tmp_path})
    short.same_as(plain)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_folder_that_takes_no_more(
    error: OSError, plain: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = list[Any](), store_module.save_file

    def fail(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) > 1:
            Path(path).write_bytes(b"half")
            raise error
        save(tensors, path)

    monkeypatch.setattr(store_module, "SEGMENT", SIZE * ROW)
    monkeypatch.setattr(store_module, "save_file", fail)
    with pytest.warns(UserWarning, match="cannot write") as told:
        short = trained({"memory": 0, "folder": tmp_path})
    short.same_as(plain)
    assert sum("cannot write" in str(warning.message) for warning in told) == 1
    assert len(saved) == 2 and len(files(tmp_path)) == 1
    monkeypatch.undo()
    trained({"folder": tmp_path}).same_as(plain)  # what is there is whole


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SurgicalError, match="file"):
        cache_prefix(model(), folder=tmp_path / "file")
    with pytest.raises(SurgicalError, match="-1"):
        cache_prefix(model(), memory=-1)


def test_runs_that_share_a_folder_see_what_others_wrote(vit: Toy, tmp_path: Path) -> None:
    batches = [{name: value[at : at + SIZE] for name, value in vit.batch(size=8).items()} for at in (0, SIZE)]
    one, other = model().train(), model().train()
    with (
        cache_prefix(one, memory=0, folder=tmp_path) as first,
        cache_prefix(other, memory=0, folder=tmp_path) as second,
    ):
        one(**batches[0])
        other(**batches[1])
        one(**batches[0])  # a new epoch: what it has is written
        other(**batches[1])
        one(**batches[1])
        other(**batches[0])
    assert (first.misses, second.misses) == (1, 1)


def test_without_a_folder_there_is_a_temporary_one(plain: Training) -> None:
    with cache_prefix(wrapped := model(), memory=0) as cache:
        temporary = cache.store.folder
        assert temporary and temporary.is_dir()
        wrapped.train()(**VIT.batch())
    assert not temporary.exists()


def test_a_memory_that_is_too_small_without_files_keeps_nothing(plain: Training) -> None:
    wrapped = model()
    cache = PrefixCache(wrapped, Store(ROW - 1, None))
    trained_weights = train(wrapped, VIT.batch(size=COUNT))
    trained_weights.same_as(plain)
    assert cache.hits == 0 and cache.store.held == 0
