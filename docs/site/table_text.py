"""Pieces of Markdown that several generated pages need."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLACEHOLDER = re.compile(r"(?<![`\w])(--[a-z][a-z-]*\w|\$?OVERFILL_\w+(?:=\w+)?|HOST:PORT)(?![`\w])")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table. Cells are Markdown; line breaks in them become spaces."""
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |\n" for line in lines)


def cell(text: str) -> str:
    """Returns plain text for a cell: flags and variables become code, and nothing else is read as Markdown."""
    parts = re.split(r"(`[^`]*`|'[^']*\{[^']*')", text)  # code, and JSON between quotes
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"`{part.strip('`')}`".replace("|", "&#124;")
        else:
            parts[index] = _PLACEHOLDER.sub(r"`\1`", escape(part))
    return "".join(parts)


def escape(text: str) -> str:
    """Escapes what Markdown or HTML would read as markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([*\[\]\\])", r"\\\1", text)


def sentence(text: str) -> str:
    """Returns ``text`` with a capital letter."""
    return text[:1].upper() + text[1:]
