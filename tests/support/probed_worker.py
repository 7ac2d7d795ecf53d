"""A decode worker on the mock engine that a test holds up: while it loads, and its event loop on SIGUSR1.

Arguments: a named pipe, ``CONNECTION_SECONDS`` of its probes, and those of the worker. Each time the worker is held up,
a writer of the pipe lets it go on. Its metrics port answers nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from overfill.engine.protocol import LoadedEngine
from overfill.model.manifest import Half
from overfill.rpc import metrics_http, probes
from overfill.settings.config import WorkerConfig
from services.decode import main as decode

HANG_SECONDS = 2.0  # a machine under load must not make an event loop hang

_load = decode.load_half_of
_gate, _seconds, *_arguments = sys.argv[1:]


async def _load_later(config: WorkerConfig, half: Half) -> LoadedEngine:
    await asyncio.to_thread(Path(_gate).read_bytes)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, Path(_gate).read_bytes)
    return await _load(config, half)


def _never(*arguments: Any) -> None:
    threading.Event().wait()


if __name__ == "__main__":
    probes.HANG_SECONDS, probes.CONNECTION_SECONDS = HANG_SECONDS, float(_seconds)
    metrics_http._Server.process_request = _never
    decode.load_half_of = _load_later
    decode.main(_arguments)
