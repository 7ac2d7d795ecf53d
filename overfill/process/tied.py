"""Child processes that end with their parent, even if it is killed."""

from __future__ import annotations

import os
import signal
import sys

# Runs in the child before the command: asks the kernel to send it the signal argv 2 when its parent argv 1 dies, even
# by SIGKILL. This is not a preexec_fn, because that would run Python in a fork of a process with gRPC's threads.
_TIED_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]), 0, 0, 0)  # PR_SET_PDEATHSIG; survives exec
if os.getppid() != int(sys.argv[1]):
    os._exit(1)  # the parent died before prctl
os.execvp(sys.argv[3], sys.argv[3:])
"""


def tied_to_parent(orphaned: signal.Signals = signal.SIGKILL) -> list[str]:
    """Returns a command prefix with which a command gets the signal ``orphaned`` when this process dies.

    Linux ties the command's life to the thread that starts it, so that thread must not end first.
    """
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), str(int(orphaned))]
