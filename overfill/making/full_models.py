"""Finds full models: folders here, and models that are downloaded once into the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from overfill.errors import InvalidPair
from overfill.making.atomic import atomic_folder, remove_leftovers
from overfill.making.named import locked
from overfill.making.seal import record_checksums
from overfill.making.sources import SourceUnavailable, fetch_from_hub
from overfill.model.manifest import MANIFEST
from overfill.pair.checksums import checksums_match
from overfill.process.home import home
from overfill.telemetry.progress import Report, silent


def resolve_model(folder_or_id: str, report: Report = silent) -> Path:
    """Returns the folder of a full model: a local folder, or a model of the hub, which is downloaded once.

    Args:
        folder_or_id: Folder of a Hugging Face checkpoint, or an id of the hub, such as
            "HuggingFaceTB/SmolLM2-135M-Instruct".
        report: As in ``resolve_pair``.

    Raises:
        InvalidPair: it is a file or a pair.
        SourceUnavailable: there is no such folder or model, or the download fails.
    """
    if Path(folder_or_id).is_dir():
        folder = Path(os.path.abspath(folder_or_id))
        if (folder / MANIFEST).exists():
            raise InvalidPair(f"{folder_or_id} is a pair: give one of its models, such as {folder}/full")
        return folder
    if Path(folder_or_id).is_file():
        reason = "GGUF is not supported; " if folder_or_id.endswith(".gguf") else ""
        raise InvalidPair(f"{folder_or_id} is a file: {reason}give the folder of a Hugging Face checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_id, re.ASCII) or folder_or_id.startswith("."):
        raise SourceUnavailable(f"{folder_or_id!r} is neither a folder here nor an id on the Hugging Face hub")
    if (parent := Path(folder_or_id).parent).is_dir():
        raise SourceUnavailable(
            f"there is no folder {folder_or_id}, although there is {parent}; if it is an id on the hub, run the "
            "command in another folder"
        )
    target = home() / "models" / folder_or_id.replace("/", "--")
    with locked(report):
        if not checksums_match(target):  # missing or damaged
            remove_leftovers(target)
            with atomic_folder(target) as folder:
                fetch_from_hub(folder_or_id, folder, report)
                record_checksums(folder)
    return target
