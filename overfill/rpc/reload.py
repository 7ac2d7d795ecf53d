"""A value read from files, and read again when the files change. Knows nothing about their contents."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

RELOAD_SECONDS = 1.0
"""Minimum seconds between two checks of the files."""


class ReloadingValue(Generic[T]):
    """Holds the result of ``read`` and calls it again when one of ``files`` has changed. Thread-safe.

    The check happens on access to ``value``. When ``read`` fails, the old value stays in force, and later accesses
    retry until a read succeeds.

    Args:
        files: files that ``read`` reads; None stands for a file that is not configured.
        read: reads the files and returns the value.
        errors: exceptions of ``read`` that mean unreadable files; other exceptions propagate.
        what: name of the value in log messages.

    Raises:
        Exception: one of ``errors``, when the first read fails.
    """

    def __init__(
        self,
        files: Iterable[Path | None],
        read: Callable[[], T],
        errors: type[Exception] | tuple[type[Exception], ...],
        what: str,
    ) -> None:
        self._files = [file for file in files if file is not None]
        self._read = read
        self._errors = errors
        self._what = what
        self._lock = threading.Lock()
        self._versions = self._stat()
        self._value = read()
        self._looked = time.monotonic()
        self._logged = ""

    @property
    def value(self) -> T:
        """The value, which reflects the files as of at most ``RELOAD_SECONDS`` ago."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= RELOAD_SECONDS:
                self._looked = now
                self._look()
            return self._value

    def _look(self) -> None:
        # Take the files' versions before the read, so that a replacement during the read is read again. Store them only
        # after the read, so that a failed read is repeated.
        versions = self._stat()
        if versions == self._versions:
            return
        try:
            self._value = self._read()
        except self._errors as error:
            if self._logged != (message := str(error)):
                self._logged = message
                log.warning("%s; %s from the last good read stay in force", message, self._what)
            return
        self._versions, self._logged = versions, ""
        log.info("read %s again: %s changed", self._what, ", ".join(map(str, self._files)))

    def _stat(self) -> list[tuple[int, int, int] | None]:
        return [_version(file) for file in self._files]


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
