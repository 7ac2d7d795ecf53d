"""A stack of real processes, started as users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from overfill.client import Client


@dataclass
class Stack:
    """A stack that ``overfill up`` runs: ``address`` is that of gRPC, ``url`` that of HTTP, without ``/v1``."""

    address: str
    url: str

    def kill_busy_worker(self) -> str:
        """Kills the decode worker that has a sequence, with SIGKILL. Returns its id."""
        with Client(self.address) as client:
            workers = [worker for worker in client.status().workers if worker.process is not None]
        busy = next(w for w in workers if w.id.startswith("decode") and w.process.load.kv_blocks_used)
        os.kill(busy.process.pid, signal.SIGKILL)
        return busy.id


@contextmanager
def stack_of(*flags: str) -> Iterator[Stack]:
    """Runs ``overfill up`` with plain processes, until it says that it is up."""
    command = [sys.executable, "-m", "overfill.cli.main", "up", "--no-ray", "--grpc", "0", "--http", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    reader = None
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("stop "):
                break
        address, url = re.findall(r"^gRPC +(\S+)\nOpenAI +(\S+)/v1$", "".join(lines), re.MULTILINE)[0]
        reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
        reader.start()
        yield Stack(address, url)
    except BaseException:
        print("".join(lines))
        raise
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        if reader is not None:
            reader.join()
        process.stdout.close()
