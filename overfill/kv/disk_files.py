"""The folder of the disk tier: a file for each block of KV. Bytes only; ``kv.disk`` knows what is in them.

The file system is the index. A rename commits a file, an unlink evicts it, and a process that is killed leaves nothing
to repair. Several processes of one user may share a folder. Any thread may call the functions, but one at a time
writes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

_SUBFOLDER = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")
"""Names of blocks. They never change, so that files of an older format are evicted too. Other files are left alone."""

_PAGE = 4096  # bytes in which file systems allocate


class NotOurFolder(OSError):
    """Another user can read or write the folder."""


class NotAFile(OSError):
    """What has a block's name is no block's file."""


class StoredBlock(NamedTuple):
    """A file: its name, the bytes that it takes, and when it was last used, in nanoseconds since the epoch."""

    name: str
    num_bytes: int
    used_ns: int


def bytes_on_disk(num_bytes: int) -> int:
    """Bytes that a file of ``num_bytes`` takes."""
    return -(-num_bytes // _PAGE) * _PAGE


class DiskFiles:
    """Files of blocks in ``folder``, which is made if it is missing. Only this user can enter it.

    Raises:
        OSError: the folder cannot be made, or is a NotOurFolder.
    """

    def __init__(self, folder: Path) -> None:
        _make_folder(folder)
        self._folder = folder
        self._held: IO[bytes] | None = None
        self._part = folder

    def read(self, name: str, limit: int) -> bytes | None:
        """Returns a file's content; None if there is no such file.

        Raises:
            NotAFile: it is something else, or has more than ``limit`` bytes.
            OSError: it cannot be read.
        """
        try:
            with open(self._path(name), "rb", 0, opener=_open) as file:
                if os.fstat(file.fileno()).st_size <= limit:
                    return file.readall()
                raise NotAFile(f"{name} has more than {limit} bytes")
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a pipe or socket
                raise NotAFile(f"{name} is no file") from error
            raise

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, or replaces it. Others see all of it or nothing. Raises OSError, such as for a full disk."""
        if self._held is None:
            self._take_part()
        path = self._path(name)
        try:
            with open(self._part, "wb", opener=_open) as file:
                file.write(content)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._part.rename(path)
        except OSError:
            self._part.unlink(missing_ok=True)  # a full disk needs its bytes
            self.close()
            self._held = None  # the next write makes the folder again if someone has deleted it
            raise

    def touch(self, names: Sequence[str]) -> list[int]:
        """Marks files as used now, the first ones last. Returns the indices of those that are missing.

        A prompt's later blocks are of no use without the earlier ones, so that they must be evicted first.
        """
        now, missing = time.time_ns(), []
        for index, name in enumerate(names):
            try:
                os.utime(self._path(name), ns=(now - index, now - index), follow_symlinks=False)
            except FileNotFoundError:
                missing.append(index)
            except OSError:  # a folder that is mounted read-only
                continue
        return missing

    def delete(self, name: str) -> None:
        """Deletes a file. Raises OSError if it is there and cannot be deleted."""
        self._path(name).unlink(missing_ok=True)

    def scan(self) -> Iterator[StoredBlock]:
        """Yields all files, except for those in sub-folders that cannot be read. Raises OSError."""
        if not self._folder.exists():  # someone has deleted it
            return
        for folder in os.scandir(self._folder):
            if _SUBFOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    yield from _scan(folder.path)

    def close(self) -> None:
        """Lets another process have this one's part. Nothing may be written afterwards."""
        if self._held is not None:
            self._held.close()

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _take_part(self) -> None:
        """Takes a file to write to before it gets its name. A later process takes over that of one that was killed."""
        _make_folder(self._folder)
        for number in itertools.count():
            held = open(self._folder / f"writer-{number}", "wb", opener=_open)  # noqa: SIM115  # until close
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held.close()
                if isinstance(error, BlockingIOError):  # its process lives
                    continue
                raise
            self._part, self._held = self._folder / f"writer-{number}.part", held
            return


def _make_folder(folder: Path) -> None:
    """Makes a folder if it is missing. Raises OSError if it cannot be made, or is a NotOurFolder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise NotOurFolder(
            f"user {os.geteuid()} must own {folder}, with mode 0700, because KV is as secret as prompts; its owner "
            f"is {status.st_uid} and its mode {stat.S_IMODE(status.st_mode):04o}; name a new folder inside it"
        )


def _scan(subfolder: str) -> Iterator[StoredBlock]:
    """Yields the files of a sub-folder. Raises OSError."""
    for entry in os.scandir(subfolder):
        if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):  # another process has just evicted it
                status = entry.stat(follow_symlinks=False)
                yield StoredBlock(entry.name, bytes_on_disk(status.st_size), status.st_mtime_ns)


def _open(path: str, flags: int) -> int:
    """As ``os.open``, for this user alone, without following a link or waiting for a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
