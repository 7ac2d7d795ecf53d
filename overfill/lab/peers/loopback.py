"""Network namespaces with nothing but loopback, for peers that listen on all addresses of their machine.

A namespace exists as long as a process runs in it, so nothing has to be removed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from overfill.lab.peers.process import PeerFailed

_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def alone(name: str, command: list[str]) -> list[str]:
    """Returns a command that runs ``command`` in a new namespace, with the same process id.

    Args:
        name: What listens on all addresses, for the message.

    Raises:
        PeerFailed: Namespaces cannot be made here; the message says what is missing.
    """
    missing = [program for program in ("unshare", "nsenter", "ip") if shutil.which(program) is None]
    if sys.platform != "linux" or os.geteuid() != 0 or missing:
        reason = f"the programs {', '.join(missing)} are missing" if missing else "only root on Linux can make one"
        raise PeerFailed(
            f"{name} listens on all addresses, so it has to run in a network namespace, and {reason}: run this "
            "command as root, with util-linux and iproute2 installed, or leave the peer out"
        )
    return ["unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def beside(process: int, command: list[str]) -> list[str]:
    """Returns a command that runs ``command`` in the namespace of ``process``."""
    return ["nsenter", f"--net=/proc/{process}/ns/net", "--", *command]


def within(process: int, function: Callable[[], T]) -> T:
    """Calls ``function`` on a thread in the namespace of ``process``."""

    def call() -> T:
        enter(process)
        return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def enter(process: int) -> None:
    """Moves this thread, for the rest of its life, into the namespace of ``process``."""
    with open(f"/proc/{process}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter the network namespace of process {process}: {os.strerror(error)}")
