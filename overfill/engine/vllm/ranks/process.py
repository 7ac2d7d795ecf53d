"""vLLM's worker in the process of a rank: ends with the worker's process, and says why it cannot load."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm.platforms import current_platform

from overfill.engine.device import NotEnoughMemory
from overfill.engine.vllm.hooks import hub
from overfill.engine.vllm.internals import quieten
from overfill.engine.vllm.ranks.agent import RankAgent
from overfill.engine.vllm.ranks.messages import RankHello
from overfill.errors import InvalidRequest
from overfill.rpc.status import to_bytes
from overfill.telemetry import logs

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LINGER = 2.0
"""Seconds for the worker to hear of a failed step before the rank ends. Other ranks may wait for this one for ever."""


class RankWorker(Worker):  # type: ignore[misc]
    """Each method that loads something tells the worker's process why it failed. A failed step ends the rank."""

    def __init__(self, vllm_config: Any, local_rank: int, rank: int, *args: Any, **options: Any) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        tqdm.set_lock(threading.RLock())  # its own has a name in /dev/shm, which a rank would leave behind
        # The worker ends its ranks. A signal to a whole group of processes must not end them while it drains.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._process = f"rank {rank} (process {os.getpid()})"
        logs.configure(*self._extra["logs"])
        quieten()
        with self._reporting(vllm_config, rank):
            super().__init__(vllm_config, local_rank, rank, *args, **options)

    def init_device(self) -> None:
        with self._reporting(self.vllm_config, self.rank):
            super().init_device()
            self._extra["refusals"].look_at_memory(self.device)

    def load_model(self, *args: Any, **options: Any) -> None:
        with self._reporting(self.vllm_config, self.rank):
            super().load_model(*args, **options)

    def determine_available_memory(self) -> int:
        with self._reporting(self.vllm_config, self.rank):
            return int(super().determine_available_memory())

    def initialize_from_config(self, *args: Any, **options: Any) -> None:
        with self._reporting(self.vllm_config, self.rank):
            super().initialize_from_config(*args, **options)

    def execute_model(self, *args: Any, **options: Any) -> Any:
        with self._ending_rank():
            return super().execute_model(*args, **options)

    def sample_tokens(self, *args: Any, **options: Any) -> Any:
        with self._ending_rank():
            output = super().sample_tokens(*args, **options)
            runner: Any = hub.runner
            runner.end_step(output.req_ids, output.sampled_token_ids)
            return output

    @contextmanager
    def _reporting(self, config: Any, rank: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if hub.store is None:  # later the worker has a link to this rank, and hears of it by that
                told = self._extra["refusals"].explain(error, config)
                if isinstance(told, NotEnoughMemory):  # has no place among the errors that travel
                    told = InvalidRequest("kv_memory", str(told))
                hello = RankHello(rank, os.getpid(), (0, 0), 0, 0, "", to_bytes(told))
                RankAgent(self._extra["ranks"], hello, None, ThreadPoolExecutor(1), lambda *_: None)
            raise

    @contextmanager
    def _ending_rank(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            timer = threading.Timer(_LINGER, os._exit, (1,))
            timer.daemon = True
            timer.start()
            memory = "out of memory: " if isinstance(error, MemoryError | torch.OutOfMemoryError) else ""
            raise RuntimeError(f"{self._process}: {memory}{error}") from error
