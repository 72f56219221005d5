"""Finding blocks, wrapping, saving, loading, and many adapters, as they grow in number, into `benchmarks/scale.md`.

    python benchmarks/scale.py                              # about 4 minutes on one core
    python benchmarks/scale.py --rows scale_before.json     # the numbers alone, of the code that is on the path

CPU seconds of one process. What counts is the ratio to the row above, which has half as many modules: 2 is linear.
`scale_before.json` holds the numbers of commit 0f9f41b, from before all of this was made to grow linearly: made by the
second command with a checkout of that commit as PYTHONPATH, and `--most 3203` since larger models take it minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig

HERE = Path(__file__).parent
BEFORE = HERE / "scale_before.json"
LAYERS = (200, 400, 800, 1600, 3200)
LISTS = (100, 200, 400)
ACTIONS = ("find", "wrap", "save", "load")
ADAPTERS, CYCLES = 100, 200
WIDTH = 64  # of the layers that adapters tune, for their bytes to show in those of the process


class Layer(nn.Module):
    """Three modules, which is four with itself."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)


def deep(count: int, width: int = 4) -> nn.Module:
    """A model of so many layers and a head."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(width) for _ in range(count))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(width, 2)})


def nested(count: int) -> nn.Module:
    """So many lists, each in the next, beside as many layers."""
    model: nn.Module = nn.Linear(3, 3)
    for _ in range(count):
        model = nn.Sequential(model, nn.Linear(3, 3))
    return nn.ModuleDict({"nested": model, "layers": nn.ModuleList(Layer() for _ in range(count))})


def seconds(action: Callable[[], Any]) -> float:
    """CPU seconds that a call takes."""
    began = time.process_time()
    action()
    return time.process_time() - began


def by_modules(most: int) -> list[dict[str, float]]:
    """For each size the number of modules and the seconds of finding, wrapping, saving and loading."""
    measured = []
    for count in LAYERS:
        model, config = deep(count), SurgicalConfig(blocks=[f"0:{count // 2}"])
        row = {"modules": len(list(model.modules())), "find": seconds(lambda model=model: BlockMap.find(model))}
        if row["modules"] > most:
            break
        row["wrap"] = seconds(lambda model=model, config=config: get_peft_model(model, config))
        wrapped = get_peft_model(deep(count), config)
        with tempfile.TemporaryDirectory() as folder:
            row["save"] = seconds(lambda wrapped=wrapped, folder=folder: wrapped.save_pretrained(folder))
            fresh = deep(count)
            row["load"] = seconds(lambda fresh=fresh, folder=folder: PeftModel.from_pretrained(fresh, folder))
        measured.append(row)
    return measured


def by_lists(most: int) -> list[dict[str, float]]:
    """For each number of lists in lists the seconds of finding blocks."""
    found = []
    for count in LISTS:
        model = nested(count)
        if 16 * count <= most:  # they cost more than as many modules side by side
            found.append({"lists in lists": count, "find": seconds(lambda model=model: BlockMap.find(model))})
    return found


def adapters() -> dict[str, float]:
    """What adding one adapter after another takes: milliseconds of the first and of the last tenth, bytes of each."""
    model = get_peft_model(deep(50, WIDTH), SurgicalConfig(blocks=[0]), adapter_name="adapter-0")
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    times, live = [], [live_bytes()]
    for number in range(1, ADAPTERS + 1):
        config = SurgicalConfig(blocks=[number % 50])
        times.append(seconds(lambda number=number, config=config: model.add_adapter(f"adapter-{number}", config)))
        live.append(live_bytes())
    return {**tenths(times), "own": own, "live": slope(live)}


def cycles() -> dict[str, float]:
    """What adding and deleting an adapter again and again takes: milliseconds as above, bytes that stay of each."""
    model = get_peft_model(deep(50, WIDTH), SurgicalConfig(blocks=[0]), adapter_name="kept")
    process, times, live, resident = psutil.Process(), [], [], []

    def cycle(number: int) -> None:
        model.add_adapter("other", SurgicalConfig(blocks=[number % 50]))
        model.delete_adapter("other")

    for number in range(CYCLES):
        times.append(seconds(lambda number=number: cycle(number)))
        live.append(live_bytes())
        resident.append(process.memory_info().rss)
    half = CYCLES // 2  # what is loaded once is loaded by then
    return {**tenths(times), "live": slope(live[half:]), "resident": slope(resident[half:])}


def tenths(times: list[float]) -> dict[str, float]:
    """Mean milliseconds of the first and of the last tenth."""
    part = len(times) // 10
    return {"first": 1000 * statistics.fmean(times[:part]), "last": 1000 * statistics.fmean(times[-part:])}


def live_bytes() -> float:
    """Bytes of all tensors that are alive, those with shared memory once."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor with memory; by type, since some proxies act when they are asked for a class."""
    return issubclass(type(value), torch.Tensor) and not value.is_meta


def slope(values: list[float]) -> float:
    """By how much a value grows from one to the next, by least squares."""
    return statistics.linear_regression(range(len(values)), values).slope


def with_ratios(rows: list[dict[str, float]], key: str) -> list[str]:
    """Each value of a column with its ratio to the one before."""
    values = [row[key] for row in rows]
    return [
        f"{value:.2f}" + (f" ({value / old:.1f})" if old else "")
        for old, value in zip([None, *values], values, strict=False)
    ]


def growth(now: list[dict[str, float]], before: list[dict[str, float]], size: str, keys: Sequence[str]) -> list[str]:
    """A table of seconds that grow with a size, now and before."""
    heads = [head for key in keys for head in (f"{key}, s", "before")]
    lines = [f"| {size} | {' | '.join(heads)} |", f"| ---: |{' ---: |' * len(heads)}"]
    columns = [with_ratios(rows, key) for key in keys for rows in (now, before)]
    for place, row in enumerate(now):
        cells = [column[place] if place < len(column) else "-" for column in columns]
        lines.append(f"| {row[size]:,.0f} | {' | '.join(cells)} |")
    return lines


def many(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The table of many adapters."""
    lines = ["| adapters of one model | first tenth, ms | last tenth, ms | bytes that stay | of the process |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for words, found in (("", now), (", before", before)):
        one, other = found["adapters"], found["cycles"]
        stays = f"{one['live']:,.0f} of {one['own']:,.0f} each"
        lines.append(f"| {ADAPTERS} added{words} | {one['first']:.0f} | {one['last']:.0f} | {stays} | - |")
        lines.append(
            f"| {CYCLES} times added and deleted{words} | {other['first']:.0f} | {other['last']:.0f} | "
            f"{other['live']:,.0f} each time | {other['resident']:,.0f} each time |"
        )
    return lines


def measure(most: int) -> dict[str, Any]:
    """All numbers."""
    return {"modules": by_modules(most), "lists": by_lists(most), "adapters": adapters(), "cycles": cycles()}


def main() -> None:
    """Measure and write the table, or the numbers alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="write the numbers to this file, beside the script, and no table")
    parser.add_argument("--most", type=int, default=10**9, help="modules of the largest model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # tensors are looked for among what is made from here on
    found = measure(options.most)
    if options.rows:
        (HERE / options.rows).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    from surgical_peft.experiments.training.provenance import machine, today, versions

    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        *growth(found["modules"], before["modules"], "modules", ACTIONS),
        "",
        *growth(found["lists"], before["lists"], "lists in lists", ["find"]),
        "",
        *many(found, before),
        "",
        "In brackets the ratio to the row above, which is half as large; a dash: it would have taken minutes. Before: "
        f"commit 0f9f41b. CPU time. {today()}, {packages}; {machine()}.",
    ]
    (HERE / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
