"""What below docs/ is made from the code. ``python docs/site/generated.py`` writes it.

A part of a page stands between ``<!-- made: NAME -->`` and ``<!-- /made -->``. ``tests/unit/test_docs.py``
compares it with the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cli_tables
import errors_table
import metrics_page
import python_objects
import settings_tables
import stack_schema
import wire_tables

DOCS = Path(__file__).parents[1]
_PART = re.compile(r"(<!-- made: ([^>\n]+) -->\n).*?(?=<!-- /made -->)", re.DOTALL)
_WHOLE: dict[Path, Callable[[], str]] = {
    DOCS / "reference" / "metrics.md": metrics_page.metrics_page,
    DOCS / "reference" / "stack.schema.json": stack_schema.stack_schema,
}
"""Files all of which is made."""

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
    """Returns the text of a file below docs/ as it should be. Raises KeyError for a part that does not exist."""
    return _WHOLE[page]() if page in _WHOLE else _PART.sub(_part, page.read_text(encoding="utf-8"))


def _part(mark: re.Match[str]) -> str:
    name = mark[2]
    text = python_objects.section(name) if "." in name else PARTS[name]()
    return f"{mark[1]}\n{text.strip()}\n\n"


def pages() -> list[Path]:
    """Returns the files that are made, or have parts that are."""
    return sorted({*_WHOLE, *(page for page in DOCS.rglob("*.md") if _PART.search(page.read_text("utf-8")))})


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path), encoding="utf-8")
