"""A single checkpoint as an identity pair, for the engine to run on its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overfill.model.manifest import write_manifest
from overfill.telemetry.progress import Report, silent


@contextmanager
def identity_pair(checkpoint: Path, recipe: Mapping[str, Any] | None = None, report: Report = silent) -> Iterator[Path]:
    """The folder of a pair whose halves are both ``checkpoint``; it is temporary.

    Args:
        recipe: of the decoder; with int8 in it, prompts are still read unquantised.
    """
    with tempfile.TemporaryDirectory(prefix="overfill-") as folder:
        (Path(folder) / "full").symlink_to(os.path.abspath(checkpoint))
        write_manifest(Path(folder), decoder="full", recipe=recipe, report=report)
        yield Path(folder)
