"""What the site shows and no file has: pages, and parts of pages, that are made from the code.

A page holds the place of a part with ``<!-- made: NAME -->``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import cli_tables
import errors_table
import settings_tables
import wire_tables

from overfill.cli.metrics import metrics_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_MARK = re.compile(r"<!-- made: ([\w-]+) -->")


def _file(name: str) -> str:
    """Returns a page of the repository's root folder, with links from docs/project/."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")


PAGES: dict[str, Callable[[], str]] = {
    "project/changelog.md": lambda: _file("CHANGELOG.md"),
    "project/contributing.md": lambda: _file("CONTRIBUTING.md"),
    "reference/metrics.md": metrics_page,
}
"""Path below docs/ -> function that returns the page's Markdown."""

PARTS: dict[str, Callable[[], str]] = {
    "cli-overview": cli_tables.overview,
    "cli-commands": cli_tables.commands,
    "errors": errors_table.errors_table,
    **{f"settings-{name}": make for name, make in settings_tables.TABLES.items()},
    "wire-services": wire_tables.services,
    "wire-files": wire_tables.files,
}
"""Name of a part -> function that returns its Markdown."""


def fill(markdown: str) -> str:
    """Returns a page's Markdown with its parts. Raises KeyError for a part that does not exist."""
    return _MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


@functools.cache
def text_of(page: Path) -> str:
    """Returns the whole Markdown of a page below docs/ or in the root folder."""
    make = PAGES.get(page.relative_to(DOCS).as_posix()) if page.is_relative_to(DOCS) else None
    return fill(page.read_text(encoding="utf-8")) if make is None else make()
