"""Compiles the C++ kernels on first use and keeps the result in the cache folder.

::

    $OVERFILL_HOME/native/<key>/kernels.so      key: sources, flags and compiler version
    $OVERFILL_HOME/native/<key>/sha256          of kernels.so, so that a damaged one is not loaded

A folder is filled under another name and renamed, so several processes may start at once: at worst each compiles.
Knows nothing of what is in the library.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from overfill.home import home

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-mtune=native", "-mfma", "-mf16c", "-mbmi2"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"),
)
_LIBRARY, _DIGEST = "kernels.so", "sha256"
_TIMEOUT = 300  # seconds; it takes about five


class CannotBuild(Exception):
    """There is no compiler, or it failed; the message says what to do."""


def compiled_library() -> Path:
    """The shared library, compiled now unless an earlier process did.

    Raises:
        CannotBuild: naming the compiler and what it said.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotBuild(f"none of {', '.join(COMPILERS)} is installed")
    sources = sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")))
    key = _key(compiler, sources)
    folder = home() / "native" / key
    if not _intact(folder):
        shutil.rmtree(folder, ignore_errors=True)  # damaged: made again
        _compile(compiler, folder)
    return folder / _LIBRARY


def _key(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=_TIMEOUT)
    digest.update(version.stdout)
    for source in sources:
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _intact(folder: Path) -> bool:
    """Loading a library that was cut short can end the process, so its digest is compared first."""
    try:
        return _sha256(folder / _LIBRARY) == (folder / _DIGEST).read_text()
    except OSError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(compiler: str, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise CannotBuild(f"{folder.parent} cannot be written: {error}") from error
    try:
        command = [compiler, *FLAGS, str(SOURCES / "overfill.cpp"), "-o", str(made / _LIBRARY)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuild(f"{compiler} failed: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise CannotBuild(f"{compiler} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
        (made / _DIGEST).write_text(_sha256(made / _LIBRARY))
        try:
            os.rename(made, folder)
        except OSError:
            if not _intact(folder):  # else another process was faster
                raise CannotBuild(f"{folder} cannot be made") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
