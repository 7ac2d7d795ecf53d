"""The router processes that share one public address: how they find each other, and count the use of API keys together.

A group is a folder on one machine. Each process holds a lock on a file there, which the kernel releases when the
process dies, and writes its own addresses into that file. A key with a limit has a file too, mapped into the memory of
every process.

Counting takes no lock, so a process that freezes holds up no other. Each process writes only its own number of running
requests. Two processes that admit requests of a key within the same microseconds may admit one too many.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from overfill.errors import Unavailable
from overfill.routing.admission import KeyUsage

logger = logging.getLogger(__name__)

MAX_PROCESSES = 64
"""Maximum number of processes in a group."""

_USAGE_BYTES = 8 * (1 + MAX_PROCESSES)  # `spent_until`, and the running requests of each process


class Member(NamedTuple):
    """A router process of a group.

    Attributes:
        id: the router's id.
        address: ``host:port`` of its own, where workers join it.
        metrics_address: ``host:port`` of its metrics; empty without.
    """

    id: str
    address: str
    metrics_address: str


class PortGroup:
    """This process as a member of the group in ``folder``, from construction until ``leave`` or its death.

    Raises:
        Unavailable: the folder cannot be used, or the group is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, int] = {}  # index of another process -> descriptor of its file
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._index, self._file = self._claim()
            os.ftruncate(self._file, 0)
            for path in folder.glob("key-*"):  # what an earlier process of this index has left
                _SharedUsage(path, self, self._index).running = 0
        except OSError as error:
            raise Unavailable(f"cannot use --share-port {folder}: {error.strerror}") from error

    def announce(self, member: Member) -> None:
        """Tells the other processes the addresses of this one. Raises Unavailable."""
        try:
            os.pwrite(self._file, json.dumps(member).encode(), 0)
        except OSError as error:
            raise Unavailable(f"cannot write to --share-port {self._folder}: {error.strerror}") from error

    def others(self) -> list[Member]:
        """Returns the other processes that are alive and have announced themselves."""
        found = []
        for index in range(MAX_PROCESSES):
            if self.alive(index):
                try:
                    found.append(Member(*json.loads(os.pread(self._files[index], 4096, 0))))
                except (OSError, ValueError, TypeError):
                    continue  # it has not announced itself yet
        return found

    def alive(self, index: int) -> bool:
        """True if another process of this index is alive."""
        if index == self._index:
            return False
        if index not in self._files:
            try:
                self._files[index] = os.open(self._path(index), os.O_RDONLY)
            except OSError:
                return False
        file = self._files[index]
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False

    def usage_of(self, key: str) -> KeyUsage:
        """Returns the group's use of the API key with this id; without a file for it, only this process's use."""
        try:
            return _SharedUsage(self._folder / f"key-{key}", self, self._index)
        except OSError as error:
            logger.warning("the limits of API key %s hold for each process alone: %s", key, error)
            return KeyUsage()

    def leave(self) -> None:
        """Leaves the group. The other processes ignore this one from now on."""
        os.close(self._file)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _claim(self) -> tuple[int, int]:
        for index in range(MAX_PROCESSES):
            file = os.open(self._path(index), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
            else:
                return index, file
        raise Unavailable(f"--share-port {self._folder}: {MAX_PROCESSES} processes share the port already")

    def _path(self, index: int) -> Path:
        return self._folder / f"process-{index}"


class _SharedUsage(KeyUsage):
    """The use of one key by all processes of a group, in a file that all of them map. Raises OSError."""

    def __init__(self, path: Path, group: PortGroup, index: int) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(file).st_size < _USAGE_BYTES:
                os.ftruncate(file, _USAGE_BYTES)  # zeros
            memory = memoryview(mmap.mmap(file, _USAGE_BYTES))
        finally:
            os.close(file)
        self._group, self._index = group, index
        self._spent_until: Any = memory[:8].cast("d")
        self._running: Any = memory[8:].cast("q")

    @property
    def running(self) -> int:
        return int(self._running[self._index])

    @running.setter
    def running(self, count: int) -> None:
        self._running[self._index] = count

    @property
    def spent_until(self) -> float:
        return float(self._spent_until[0])

    @spent_until.setter
    def spent_until(self, time: float) -> None:
        self._spent_until[0] = time

    @property
    def running_elsewhere(self) -> int:
        return sum(self._counts())

    def _counts(self) -> Iterator[int]:
        for index, count in enumerate(self._running):
            if count and self._group.alive(index):
                yield count
