"""Compiles C++ on first use and keeps the result in the cache folder.

::

    $OVERFILL_HOME/native/<key>/kernels.so      key: sources and flags
    $OVERFILL_HOME/native/<key>/sha256          checksum of kernels.so, so that a damaged file is not loaded

Images contain compiled libraries, in the same form below ``SHIPPED``, and no compiler.

One process at a time compiles into a temporary folder and renames it; other processes wait. The umask decides who may
read the folder, and only its owner may write. A process loads only libraries that its own user or root compiled and
that no other user can write. Knows nothing about the library's contents.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from overfill.process.home import home

COMPILERS = ("c++", "g++", "clang++")
C_COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-mtune=native")
SHIPPED = Path(sys.prefix) / "share" / "overfill" / "native"
_LIBRARY, _DIGEST = "kernels.so", "sha256"
_TIMEOUT = 300  # seconds; compiling takes about 5


class CannotBuild(Exception):
    """The library cannot be compiled; the message names the reason."""


def find_compiler(names: Sequence[str] = COMPILERS) -> str | None:
    """Returns the path of the first program in ``names`` that is installed; None without any."""
    return next((found for name in names if (found := shutil.which(name))), None)


def compiled_library(source: Path, flags: Sequence[str]) -> Path:
    """Returns the shared library of ``source`` and its headers. Compiles it if it is neither shipped nor in the cache.

    Args:
        source: C++ file; headers are in the same folder.
        flags: compiler flags in addition to ``FLAGS``, such as the CPU instructions to use.

    Raises:
        CannotBuild: no compiler is installed, the compiler failed, or the cache folder is not writable.
    """
    flags = (*FLAGS, *flags)
    key = _key(flags, [*sorted(source.parent.glob("*.h")), source])
    if _intact(SHIPPED / key):
        return SHIPPED / key / _LIBRARY
    folder = home() / "native" / key
    if not _intact(folder):
        compiler = find_compiler()
        if compiler is None:
            raise CannotBuild(f"no C++ compiler is installed: install one of {', '.join(COMPILERS)}")
        with _locked(folder.parent):
            if not _intact(folder):  # another process may have compiled it while this one waited
                _compile([compiler, *flags, str(source)], folder)
    return folder / _LIBRARY


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``; the kernel releases it if the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(flags: Sequence[str], sources: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sources:
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _intact(folder: Path) -> bool:
    """Returns True if the library exists, matches its checksum, and only this user or root can have written it.

    Loading a truncated library can crash the process. Loading one that others can write would run their code.
    """
    library = folder / _LIBRARY
    try:
        trusted = all(_trusted(path) for path in (folder, library))
        return trusted and _sha256(library) == (folder / _DIGEST).read_text()
    except OSError:
        return False


def _trusted(path: Path) -> bool:
    found = path.lstat()
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compile(command: list[str], folder: Path) -> None:
    """Compiles into ``folder`` and replaces its contents. The caller holds the lock."""
    made = folder.with_name(f".building-{secrets.token_hex(4)}")
    try:
        made.mkdir(0o755)  # the umask may remove permissions; see _trusted
    except OSError as error:
        raise CannotBuild(f"{folder.parent} cannot be written: {error}") from error
    try:
        done = _run([*command, "-o", str(made / _LIBRARY)])
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise CannotBuild(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
        (made / _DIGEST).write_text(_sha256(made / _LIBRARY))
        readable = made.stat().st_mode & 0o555
        (made / _LIBRARY).chmod(readable)
        (made / _DIGEST).chmod(readable & 0o444)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(made, folder)
        except OSError as error:
            raise CannotBuild(f"{folder} cannot be made: {error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} failed: {error}") from error
