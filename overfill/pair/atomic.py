"""Folders that appear whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` to fill; it becomes ``target``, replacing what was there, on success.

    On an exception it is removed. A killed process leaves a sibling called ``.<name>.tmp-…``, which
    ``remove_leftovers`` clears; it never looks like ``target``. Relative links in it hold after the rename.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            old = _sibling(target)
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes left beside ``target``. Only safe while nobody else writes ``target``."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
