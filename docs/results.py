"""Write the tables of README.md and docs/ from what the commands of benchmarks/ wrote.

    python docs/results.py           # rewrites the pages in place
    python docs/results.py --check   # writes nothing; fails if a page is out of date

A table stands between `<!-- table: SOURCE -->` and `<!-- end -->`. SOURCE is a Markdown file below benchmarks/,
followed by the numbers of the paragraphs to take from it (default: all but headings); or one of the tables that are
put together from several files or made from the code, see `COMBINED`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (?P<source>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)")


def paragraphs(source: str) -> list[str]:
    """The paragraphs of a file below benchmarks/, without its headings."""
    text = (BENCHMARKS / source).read_text(encoding="utf-8").strip()
    return [part for part in re.split(r"\n\s*\n", text) if not part.startswith("#")]


def rows(source: str) -> dict[str, dict[str, str]]:
    """The first table of a file: for each row, by its first cell, the other cells by column. Bold is dropped."""
    table = next(part for part in paragraphs(source) if part.startswith("|"))
    lines = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    header, _, *body = lines
    return {first: dict(zip(header[1:], cells, strict=True)) for first, *cells in body}


def headline(methods: str = "") -> str:
    """The headline comparisons on noise and on the label map side by side; all methods, or those named, by `;`."""
    noise, label_map = (rows(f"compare/headline_{shift}/table.md") for shift in ("noise", "label_map"))
    chosen = [name.strip() for name in methods.split(";")] if methods else list(noise)
    lines = [
        "| method | noise, % | vs. full | label map, % | vs. full | tuned parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in chosen:
        first, second = noise[name], label_map[name]
        cells = [row[column] for row in (first, second) for column in ("accuracy, %", "to full")]
        tuned = dict.fromkeys([first["tuned"], second["tuned"]])
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(tuned)} |")
    return "\n".join(lines)


def sweeps() -> str:
    """Validation accuracy of each block tuned alone, on both shifts; the best of each in bold."""
    columns = [best_by_blocks(shift) for shift in ("noise", "label_map")]
    lines = ["| tuned alone | noise | label map |", "| --- | ---: | ---: |"]
    for blocks in columns[0]:
        cells = ["all" if len(blocks) > 1 else blocks[0].replace("_", " ")]
        for column in columns:
            mean, deviation = column[blocks]
            cell = f"{100 * mean:.1f} ± {100 * deviation:.1f}"
            cells.append(f"**{cell}**" if column[blocks] == max(column.values(), key=lambda value: value[0]) else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_by_blocks(shift: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """For the candidates of a sweep, mean and standard deviation over the seeds at the best rate."""
    text = (BENCHMARKS / "sweeps" / shift / "search" / "search.json").read_text(encoding="utf-8")
    metrics: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for trial in json.loads(text)["trials"]:
        metrics.setdefault(tuple(trial["blocks"]), {}).setdefault(trial["rate"], []).append(trial["metric"])
    best = {blocks: max(by_rate.values(), key=statistics.fmean) for blocks, by_rate in metrics.items()}
    return {blocks: (statistics.fmean(each), statistics.stdev(each)) for blocks, each in best.items()}


def recipe_keys() -> str:
    """The keys of a recipe, a table for each section."""
    from surgical_peft.experiments.recipe.keys import keys_markdown

    return keys_markdown()


COMBINED = {"headline": headline, "sweeps": sweeps, "recipe_keys": recipe_keys}


def table(source: str) -> str:
    """What stands between the marks of `source`."""
    name, _, rest = source.partition(" ")
    if name in COMBINED:
        return COMBINED[name](rest) if rest else COMBINED[name]()
    parts = paragraphs(name)
    chosen = [parts[int(number) - 1] for number in rest.split()] if rest else parts
    folder = Path("../benchmarks", name).parent.as_posix()
    return "\n\n".join(LINK.sub(f"]({folder}/", part) for part in chosen)


def written(page: str) -> str:
    """A page with its tables written anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found['source'])}\n{found[3]}", page)


def main(check: bool) -> int:
    """Rewrite the pages whose tables changed, or name them."""
    stale = 0
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                path.write_text(after, encoding="utf-8")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
