"""Wrap a single checkpoint as an identity pair, so that the engine can run it on its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overfill.making.pair_json import write_manifest
from overfill.telemetry.progress import Report, silent


@contextmanager
def identity_pair(checkpoint: Path, recipe: Mapping[str, Any] | None = None, report: Report = silent) -> Iterator[Path]:
    """Yields the temporary folder of a pair whose full model and decoder are both ``checkpoint``.

    Args:
        recipe: The decoder's recipe. When it says int8, the full model still reads prompts unquantised.
    """
    with tempfile.TemporaryDirectory(prefix="overfill-") as folder:
        (Path(folder) / "full").symlink_to(os.path.abspath(checkpoint))
        write_manifest(Path(folder), decoder="full", recipe=recipe, report=report)
        yield Path(folder)
