"""Parts of pages that are made from the code. ``python docs/site/generated.py`` writes them into the pages.

A part stands between ``<!-- made: NAME -->`` and ``<!-- /made -->``. ``tests/unit/test_docs.py``
compares it with the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cli_tables
import errors_table
import python_objects
import settings_tables
import wire_tables

from overfill.cli.metrics import metrics_page

DOCS = Path(__file__).parents[1]
_PART = re.compile(r"(<!-- made: ([^>\n]+) -->\n).*?(?=<!-- /made -->)", re.DOTALL)
_METRICS = DOCS / "reference" / "metrics.md"

PARTS: dict[str, Callable[[], str]] = {
    "cli-overview": cli_tables.overview,
    "cli-commands": cli_tables.commands,
    "errors": errors_table.errors_table,
    "error-classes": python_objects.error_classes,
    **{f"settings-{name}": make for name, make in settings_tables.TABLES.items()},
    "wire-services": wire_tables.services,
    "wire-files": wire_tables.files,
}
"""Name of a part -> function that returns its Markdown. A name with a dot is a Python object's."""


def filled(page: Path) -> str:
    """Returns the Markdown of a page below docs/ as it should be. Raises KeyError for a part that does not exist."""
    return metrics_page() if page == _METRICS else _PART.sub(_part, page.read_text(encoding="utf-8"))


def _part(mark: re.Match[str]) -> str:
    name = mark[2]
    text = python_objects.section(name) if "." in name else PARTS[name]()
    return f"{mark[1]}\n{text.strip()}\n\n"


def pages() -> list[Path]:
    """Returns the pages that have parts."""
    return [page for page in sorted(DOCS.rglob("*.md")) if page == _METRICS or _PART.search(page.read_text("utf-8"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path), encoding="utf-8")
