"""MkDocs hook: what is outside docs/ joins the site.

Files that a page links to, such as tables and figures of benchmarks/, are added; in the repository their links work as
they are, on the site `../benchmarks/x` becomes `benchmarks/x`. The reference has an entry for each name of
`surgical_peft.criteria`, `.policies` and `.procedures`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)[^)]*\)")
OPEN_SET = re.compile(r"^::: surgical_peft\.(criteria|policies|procedures)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside docs/."""
    for page in DOCS.glob("*.md"):
        for path in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(DOCS.parent / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links out of docs/ to where `on_files` put their files, and list the open sets."""
    if page.file.generated_by:
        return LINK.sub(r"\1", markdown)  # what these files link to is not on the site
    return OPEN_SET.sub(lambda found: entries(found[1]), OUTSIDE.sub(r"](\1", markdown))


def entries(package: str) -> str:
    """An entry for each name that a package imports from its modules, under the name that the package gives it."""
    tree = ast.parse((DOCS.parent / "surgical_peft" / package / "__init__.py").read_text(encoding="utf-8"))
    paths = {
        name.asname or name.name: f"surgical_peft.{package}.{node.module}.{name.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for name in node.names
    }
    return "\n\n".join(
        f"[](){{#surgical_peft.{package}.{name}}}\n\n::: {path}\n    options: {{heading: {name}, toc_label: {name}}}"
        for name, path in paths.items()
    )
