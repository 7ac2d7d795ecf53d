"""What a worker and its ranks say to each other on their link, and the bytes of it. No sockets.

A message is its length in 4 bytes, then a pickled pair: the number of a command, and one of the dataclasses below, or
``Pull`` and ``Moved`` of ``kv.ranks``.
Pickle is safe here: both ends have the same code and the same user, and the rank shows the worker's token before the
worker reads a message. vLLM sends pickled messages between the same processes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from overfill.kv.chunks import TransferSpec
from overfill.request.params import SamplingParams
from overfill.rpc.access import AccessPolicy
from overfill.rpc.tls import Credentials, ServerTls

MAX_MESSAGE = 64 << 20
"""Limit on the bytes of a message. The largest one has the tokens or the blocks of one prompt."""
TOKEN_BYTES = 32
"""Length of the token that a rank sends before its first message."""
NO_COMMAND = 0
"""Number of messages that belong to no command."""

_LENGTH = struct.Struct("<I")


class BrokenLink(Exception):
    """The other end sent bytes that are no message."""


@dataclass(frozen=True, slots=True)
class RankHello:
    """First message of a rank, once its KV cache exists.

    Attributes:
        heads: half-open range of the KV heads that the rank holds; several ranks may hold the same.
        num_layers: layers in the rank's cache.
        block_size: tokens per KV block.
        dtype: element type of the cache.
        error: why the rank cannot be used, as ``rpc.status.to_bytes``; empty if it can.
    """

    rank: int
    pid: int
    heads: tuple[int, int]
    num_layers: int
    block_size: int
    dtype: str
    error: bytes = b""


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a ``Done``, by which the worker knows that the rank lives."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Starts the rank's listener for PullKv; the value of its ``Done`` is the address in use, ``host:port``."""

    address: str
    tls: ServerTls | None
    access: AccessPolicy
    max_rpcs: int | None


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Serves a transfer; see ``Ranks.open``."""

    spec: TransferSpec
    block_table: Sequence[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class CloseTransfer:
    """Ends a transfer; see ``Ranks.close``, whose result is the value of the ``Done``."""

    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class Connect:
    """Says how to pull: the number of connections to a data address, and the credentials. Comes before a ``Pull``."""

    streams: int
    credentials: Credentials | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels the command of this number, whose own answer says that nothing of it runs any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Makes the processor of one answer, and keeps it under ``key`` until ``Forget``."""

    key: str
    params: SamplingParams
    prompt: Sequence[int]
    eos_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Forget:
    """Drops the processor under ``key``, if there is one."""

    key: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Closes listeners and channels. The rank then outlives the end of the link; vLLM ends its process."""


@dataclass(frozen=True, slots=True)
class Done:
    """The command has succeeded."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The command has failed with ``error``, as ``rpc.status.to_bytes``."""

    error: bytes


def encode(number: int, body: object) -> bytes:
    """Returns the bytes of a message. Raises ValueError if they are too many."""
    data = pickle.dumps((number, body), pickle.HIGHEST_PROTOCOL)
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message to a rank has {len(data)} bytes; the limit is {MAX_MESSAGE}")
    return _LENGTH.pack(len(data)) + data


class MessageDecoder:
    """Cuts the bytes that arrive into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """Yields the number and body of each message that ``data`` completes. Raises BrokenLink if one is none."""
        self._rest += data
        while len(self._rest) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest)
            if length > MAX_MESSAGE:
                raise BrokenLink(f"a message claims to have {length} bytes; the limit is {MAX_MESSAGE}")
            end = _LENGTH.size + length
            if len(self._rest) < end:
                return
            try:
                number, body = pickle.loads(self._rest[_LENGTH.size : end])
            except Exception as error:  # pickle raises nearly anything for bytes that are none of its own
                raise BrokenLink(f"a message cannot be read: {error}") from error
            del self._rest[:end]
            yield number, body
