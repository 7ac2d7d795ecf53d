"""Tables that a page of the reference has between two marks, and that tests make of their cases."""

from __future__ import annotations

from pathlib import Path

_REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
_BEGIN, _END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


def documented(page: str) -> str:
    """Returns the tables that ``page`` contains."""
    return (_REFERENCE / page).read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0].strip()


def write(page: str, tables: str) -> None:
    """Replaces the tables of ``page``."""
    path = _REFERENCE / page
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    path.write_text(f"{before}{_BEGIN}\n\n{tables}\n\n{_END}{after}", encoding="utf-8")
