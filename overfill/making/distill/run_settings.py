"""Records the settings that determine a run's results, so that only an equal run resumes in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.making.checkpoint import write_json

SETTINGS = "settings.json"


def open_run_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Records ``settings`` in a new run's ``folder``, or checks that the run in it may resume.

    Raises:
        InvalidRequest: the folder holds a run and ``resume`` is False, or settings differ; the message names them.
    """
    file = folder / SETTINGS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if not resume:
        raise InvalidRequest("out", f"{folder} holds a run already; continue it with --resume, or remove it")
    if changed := sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)):
        values = ", ".join(f"{key} ({before.get(key)} before, {settings.get(key)} now)" for key in changed)
        raise InvalidRequest("resume", f"the run in {folder} had other settings: {values}")
