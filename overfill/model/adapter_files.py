"""Reads the files of an adapter's folder into memory, whole and bounded, before anything parses them.

The folder may be on shared storage, where others add and remove adapters meanwhile. All files are opened below one
descriptor of the folder, so that a folder that is replaced during the read gives the files of one folder or an error.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from overfill.errors import OverfillError

MAX_JSON_BYTES = 256 << 10
"""Largest size of a JSON file of an adapter: names of 500 modules with a rank each take 40 KiB."""

_MAX_MESSAGE = 1000

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class InvalidAdapter(OverfillError):
    """An adapter's folder lacks a file or is damaged, or the decoder cannot use an adapter of this kind or size.

    The message is printable, and cut at 1,000 characters: parts of it may be a stranger's.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message[:_MAX_MESSAGE])
        super().__init__("".join(shown))


def read_files(folder: Path, limits: Mapping[str, int], follow_links: bool = False) -> dict[str, bytes]:
    """Reads regular files of ``folder``, by name; missing files are left out.

    Args:
        limits: largest size in bytes of each file, by name.
        follow_links: whether the folder and its files may be links. They must not where several users write.

    Raises:
        InvalidAdapter: the folder is missing, or a file is larger, changes while it is read, is a link or no regular
            file, or cannot be read.
    """
    no_follow = 0 if follow_links else os.O_NOFOLLOW
    try:
        directory = os.open(folder, _FLAGS | os.O_DIRECTORY | no_follow)
    except FileNotFoundError:
        raise InvalidAdapter(f"{folder}: there is no such folder") from None
    except OSError as error:
        link = "is a link, which is not followed; copy the folder itself" if folder.is_symlink() else error.strerror
        raise InvalidAdapter(f"{folder}: {link}") from None
    try:
        found = {}
        for name, limit in limits.items():
            try:
                found[name] = _read(folder / name, directory, limit, no_follow)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise InvalidAdapter(f"{folder / name}: cannot be read: {error.strerror}") from None
        return found
    finally:
        os.close(directory)


def _read(file: Path, directory: int, limit: int, no_follow: int) -> bytes:
    # Looks before it opens: opening a device may have an effect. O_NONBLOCK: a FIFO in its place must not block.
    _check_regular(file, os.stat(file.name, dir_fd=directory, follow_symlinks=not no_follow))
    with open(os.open(file.name, _FLAGS | os.O_NONBLOCK | no_follow, dir_fd=directory), "rb") as stream:
        status = os.fstat(stream.fileno())
        _check_regular(file, status)
        if status.st_size > limit:
            raise InvalidAdapter(f"{file}: has {status.st_size} bytes; at most {limit} are read")
        data = stream.read(status.st_size + 1)
        if len(data) != status.st_size or os.fstat(stream.fileno()).st_mtime_ns != status.st_mtime_ns:
            raise InvalidAdapter(f"{file}: changed while it was read; write adapters with `overfill pair adapter add`")
    return data


def _check_regular(file: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise InvalidAdapter(f"{file}: is a link, which is not followed; put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise InvalidAdapter(f"{file}: is not a regular file")


def parse_object(file: Path, data: bytes) -> dict[str, Any]:
    """Parses a JSON object; raises InvalidAdapter if ``data`` is something else, or has numbers that JSON has not."""
    try:
        content = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidAdapter(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")
