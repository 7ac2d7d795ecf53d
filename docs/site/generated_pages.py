"""The pages of the site that are made from the code, and so are in no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import page_cli
import page_errors
import page_settings
import page_wire

from overfill.cli.metrics import metrics_page

ROOT = Path(__file__).parents[2]


def _file(name: str) -> str:
    """Returns a page of the repository's root folder, with links from docs/project/."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")


PAGES: dict[str, Callable[[], str]] = {
    "project/changelog.md": lambda: _file("CHANGELOG.md"),
    "project/contributing.md": lambda: _file("CONTRIBUTING.md"),
    "reference/cli.md": page_cli.page,
    "reference/errors.md": page_errors.page,
    "reference/metrics.md": metrics_page,
    "reference/settings.md": page_settings.page,
    "reference/wire.md": page_wire.page,
}
"""Path below docs/ -> function that returns the page's Markdown."""
