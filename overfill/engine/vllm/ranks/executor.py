"""vLLM's executor for a worker's ranks: processes that end with the worker, as the worker does with them.

A rank that has ended ends all others, and the step that waits for them. The engine's thread then ends as after every
failed step, so that routers learn which requests were in the step.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from overfill.engine.vllm.ranks.steps import RankExtras
from overfill.errors import InternalError
from overfill.process.held_folder import temporary_folder

log = logging.getLogger(__name__)

_GRACE = 5.0
"""Seconds that a worker has to tell its peers about a lost rank before it ends."""
_EXIT = 2.0
"""Seconds for a process to leave after its last pipe has closed."""
_SENTINEL_WAIT = 0.5
"""Seconds to wait for the end of a process that is lost, since a link closes a little earlier."""
_SHARED_MEMORY = Path("/dev/shm")


class RankExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Starts the ranks, compares the tokens that they choose, and ends them all at once.

    Attributes:
        failure: why the ranks have ended; None while they live.
        end_process: called ``_GRACE`` seconds after a rank was lost.
    """

    end_process: Callable[[], object] = staticmethod(lambda: os._exit(1))

    def _init_executor(self) -> None:
        self.failure: str | None = None
        self._failing = threading.Lock()
        self._lost_at_start = ""
        # The kernel ends a rank with the thread that started it. So that thread lives as long as the executor.
        self._starter = ThreadPoolExecutor(1, "ranks")
        # vLLM's Unix sockets lie in a folder that only this user can enter.
        with temporary_folder("ranks") as folder:
            os.environ["VLLM_RPC_BASE_PATH"] = str(folder)  # ranks inherit it
            try:
                self._starter.submit(super()._init_executor).result()
            except Exception as error:
                self._starter.shutdown(wait=False)
                if self._lost_at_start:
                    raise InternalError(f"{self._lost_at_start} while it loaded the model") from error
                raise
            self._unname()

    def init_kv_output_aggregator(self, connector: Any) -> None:
        self.kv_output_aggregator = Agreement.from_connector(connector, self.parallel_config.world_size)

    def start_worker_monitor(self, inline: bool = False) -> None:
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()

    def lose(self, reason: str) -> None:
        """Ends all ranks, fails the step that waits for them, and soon the process. Any thread may call it."""
        with self._failing:
            if self.failure is not None or getattr(self, "shutting_down", False):
                return
            self.failure, self.is_failed = reason, True
        processes = [handle.proc for handle in self.workers]
        if ended := wait([process.sentinel for process in processes], _SENTINEL_WAIT):  # tells more than a closed link
            self.failure = next(_describe_end(process) for process in processes if process.sentinel in ended)
        log.critical("%s; this worker ends", self.failure)
        timer = threading.Timer(_GRACE, self.end_process)
        timer.daemon = True
        timer.start()
        self._kill(processes)
        for queue in getattr(self, "response_mqs", ()):  # vLLM watches the ranks before it lists their queues
            queue.shutdown()  # wakes the engine's thread

    def _watch(self) -> None:
        processes = [handle.proc for handle in self.workers]
        wait([process.sentinel for process in processes])
        self.lose("a rank has ended")

    def _ensure_worker_termination(self, worker_procs: list[BaseProcess]) -> None:
        # vLLM asks first, and waits for seconds. A stopped process does not even hear SIGTERM.
        if self.failure is None and not getattr(self, "shutting_down", False):  # the start has failed
            wait([process.sentinel for process in worker_procs], _EXIT)
            self._lost_at_start = next((_describe_end(p) for p in worker_procs if p.exitcode is not None), "")
        self._kill(worker_procs)

    @staticmethod
    def _kill(processes: Sequence[BaseProcess]) -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(_EXIT)

    def _unname(self) -> None:
        """Removes the names of files and memory that the ranks share, so that nothing outlives the processes."""
        (method, *_) = self.collective_rpc(unname)
        file = Path(method.removeprefix("file://"))
        for path in [file, *_SHARED_MEMORY.glob(f"{file.name}-*")]:
            path.unlink(missing_ok=True)
        for queue in (self.rpc_broadcast_mq, *self.response_mqs):
            _unlink(queue)

    def shutdown(self) -> None:
        super().shutdown()
        self._starter.shutdown(wait=False)


class Agreement(KVOutputAggregator):  # type: ignore[misc]
    """Puts the ranks' outputs of a step together, and checks that all have chosen the same tokens."""

    def aggregate(self, outputs: list[Any], output_rank: int = 0) -> Any:
        check_agreement(outputs)
        return super().aggregate(outputs, output_rank)


def check_agreement(outputs: Sequence[Any]) -> None:
    """Raises InternalError if ranks have chosen different tokens. Their caches would differ from there on.

    Rows that a rank reports as failed do not count: they end, and the others' tokens for them are dropped.
    """
    first, *others = outputs
    if first is None or all(other.sampled_token_ids == first.sampled_token_ids for other in others):
        return
    failed: set[str] = set()
    for output in outputs:
        extras = output.kv_connector_output and output.kv_connector_output.kv_connector_worker_meta
        failed |= extras.errors.keys() if isinstance(extras, RankExtras) else set()
    for rank, other in enumerate(others, 1):
        for id, ours, theirs in zip(first.req_ids, first.sampled_token_ids, other.sampled_token_ids, strict=True):
            if ours != theirs and id not in failed:
                raise InternalError(f"rank 0 chose token {ours} for a sequence, and rank {rank} {theirs}")


def unname(worker: Any) -> str:
    """Removes the name of what a rank shares with the others, and returns where they found each other."""
    queue = get_tp_group().mq_broadcaster
    if queue is not None and getattr(queue.buffer, "is_creator", False):
        _unlink(queue)
    return str(worker.worker.distributed_init_method)


def _unlink(queue: Any) -> None:
    with suppress(FileNotFoundError):
        queue.buffer.shared_memory.unlink()
    queue.buffer.is_creator = False


def _describe_end(process: BaseProcess) -> str:
    process.join(_EXIT)
    code = process.exitcode
    how = f"exited with code {code}"
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as the kernel does when memory is short"
    return f"rank {process.name.rpartition('-')[2]} (process {process.pid}) {how}"
