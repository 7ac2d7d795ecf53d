"""Each caller's share of a server: how many RPCs it may have open, and how many bytes of answers it may leave unread.

gRPC for Python cannot reset an RPC. An RPC whose answer the client does not read stays open, and its answer stays in
memory, until the client reads it or closes the connection. Until then, it counts against its caller.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import unquote

from overfill.errors import Overloaded
from overfill.rpc.access import KeyHolder

MAX_UNREAD_BYTES = 32 << 20
"""Bytes of answers that one API key may leave unread. Without keys, the limit is that of all callers together.

Without keys, a connection may also leave no more bytes unread than all callers together leave free. A connection that
reads nothing gets half of the limit, the next one a quarter, and so on. So there is room for connections that read.
"""

SMALL_ANSWER = 16 << 10
"""Size in bytes up to which an unary answer does not count as unread. The limits of open RPCs bound their number."""

KEY_SHARE = 2
"""An API key may have one in this many of the server's RPCs open."""

OPEN_SHARE = 8
"""Callers of RPCs that need no credential, such as health checks, may together have one in this many of them open."""

HOST_SHARE = 32
"""One host of such callers may have one in this many of the server's RPCs open."""


@dataclass(slots=True)
class _Usage:
    """What one caller uses.

    Attributes:
        name: the caller, for messages.
        limit: maximum number of open RPCs.
        rpcs: number of open RPCs.
        unread: bytes of answers that the caller has not read.
    """

    name: str
    limit: float
    rpcs: int = 0
    unread: int = 0


class RpcShares:
    """The callers of a server and what they use.

    An API key has a share of the RPCs. Callers of RPCs that need no credential have a smaller one together, and each of
    their hosts a part of it. All others have no share of the RPCs: processes of the stack, and clients where there are
    no API keys. Each of their connections has a share of the bytes.

    Args:
        max_rpcs: maximum number of RPCs of the server; None means no limit.
    """

    def __init__(self, max_rpcs: int | None) -> None:
        self._max_rpcs = math.inf if max_rpcs is None else max_rpcs
        self._others = _Usage("this server", math.inf)
        self._without_credential = _Usage("everyone without a credential", self._part(OPEN_SHARE))
        self._usages: dict[str, _Usage] = {}  # of keys, connections and hosts that have RPCs open

    def open(self, key: KeyHolder | None, needs_credential: bool, peer: str) -> OpenRpc:
        """Counts an RPC until ``OpenRpc.end``.

        Args:
            key: owner of the API key that admitted the caller; None if no key did.
            needs_credential: False if the RPC is open to every caller.
            peer: address of the client, as gRPC writes it.

        Raises:
            Overloaded: the caller's share is used up.
        """
        usages: tuple[_Usage, ...]
        if key is not None:
            usages = (self._usage(f"API key {key.name!r}", KEY_SHARE),)
        elif needs_credential:
            usages = (self._usage(f"connection {peer}", 1), self._others)
        else:
            usages = (self._usage(f"host {_host(peer)}", HOST_SHARE), self._without_credential)
        for usage in usages:
            if usage.rpcs >= usage.limit:
                raise Overloaded(
                    f"{usage.name} has {usage.rpcs} RPCs open at this server, of which the maximum is "
                    f"{int(usage.limit)}: read their answers, or cancel them"
                )
        if key is not None and usages[0].unread >= MAX_UNREAD_BYTES:
            raise _too_much_unread(usages)
        for usage in usages:
            self._usages[usage.name] = usage
            usage.rpcs += 1
        return OpenRpc(self._usages, usages)

    def _usage(self, name: str, share: int) -> _Usage:
        return self._usages.get(name) or _Usage(name, self._part(share))

    def _part(self, share: int) -> float:
        return max(1.0, self._max_rpcs / share)


class OpenRpc:
    """An open RPC, which counts against its caller. ``RpcShares.open`` makes it."""

    __slots__ = ("_all", "_unread", "_usages")

    def __init__(self, all: dict[str, _Usage], usages: tuple[_Usage, ...]) -> None:
        self._all = all
        self._usages = usages
        self._unread = 0

    def answer(self, size: int) -> None:
        """Counts an unary answer of ``size`` bytes.

        Raises:
            Overloaded: the caller leaves too many bytes unread.
        """
        if size <= SMALL_ANSWER:
            return
        # For a connection, its bytes plus those of all: it may have no more than all leave free.
        if self._usages[-1].unread and sum(usage.unread + size for usage in self._usages) > MAX_UNREAD_BYTES:
            raise _too_much_unread(self._usages)
        self.give_up(size)

    def give_up(self, size: int) -> None:
        """Counts a message of ``size`` bytes that has waited too long for the client."""
        for usage in self._usages:
            usage.unread += size
        self._unread += size

    def end(self) -> None:
        """Records that gRPC has sent the status of the RPC, or that the client has left."""
        for usage in self._usages:
            usage.unread -= self._unread
            usage.rpcs -= 1
            if not usage.rpcs:
                del self._all[usage.name]


current: ContextVar[OpenRpc] = ContextVar("current")
"""The RPC that the task serves."""


def _too_much_unread(usages: tuple[_Usage, ...]) -> Overloaded:
    have = " and ".join(f"{usage.name} has {usage.unread}" for usage in usages)
    most = f"the maximum is {MAX_UNREAD_BYTES}" + (", and for a connection what all leave free" if usages[1:] else "")
    return Overloaded(f"{have} bytes of answers that no client has read; {most}: read them, or cancel their RPCs")


def _host(peer: str) -> str:
    """Returns the host in ``ipv4:host:port`` or ``ipv6:%5Bhost%5D:port``; of IPv6, its network of 64 bits."""
    kind, _, address = peer.partition(":")
    host = unquote(address.rpartition(":")[0]).strip("[]")
    if kind != "ipv6":
        return host or kind
    return f"{IPv6Address(int(IPv6Address(host)) >> 64 << 64)}/64"
