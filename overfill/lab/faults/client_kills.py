"""Kills clients of a stack with SIGKILL at random moments of their answers, and measures when all KV is free.

It runs one client at a time, so that all used blocks belong to it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median

from overfill.client import AsyncClient, Client, SamplingParams
from overfill.errors import InternalError
from overfill.lab.faults.engines import engines_by_stage
from overfill.stack.placed import PlacedStack
from overfill.stack.process_runner import ProcessRunner

_FREE_TIMEOUT = 10.0  # seconds after a kill in which all blocks must be free
_POLL = 0.01
_TIMED_ANSWERS = 5  # answers that may finish, to learn how long one takes


@dataclass(slots=True)
class ClientKillResult:
    """Results of killing clients.

    Attributes:
        engines: Stage -> engines of its workers.
        delays: For each client killed before its answer was complete: seconds until no worker had a used block or a
            request. Infinite if one still had after 10 s.
        holding: Number of these clients whose blocks were in use at the first check after the kill.
        finished: Number of clients that had their whole answer before the kill; they are not counted in ``delays``.
    """

    engines: dict[str, str] = field(default_factory=dict)
    delays: list[float] = field(default_factory=list)
    holding: int = 0
    finished: int = 0


async def kill_clients(
    plan: PlacedStack,
    prompts: Sequence[Sequence[int]],
    kills: int,
    max_tokens: int,
    seed: int,
    report: Callable[[str, int, int], None],
) -> ClientKillResult:
    """Kills ``kills`` clients of a new stack.

    Call it on the main thread: child processes end with the thread that starts them.
    """
    rng = random.Random(seed)
    result = ClientKillResult()
    stack = ProcessRunner(plan.spec, lambda name, line: None, placed=plan)
    try:
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        address = plan.addresses[0]
        async with AsyncClient(address, tls=plan.client_tls) as watcher, _client_forker() as forker:
            result.engines = engines_by_stage((await watcher.status()).workers)
            times = [await forker.run_to_end(address, rng.choice(prompts), max_tokens) for _ in range(_TIMED_ANSWERS)]
            usual_seconds = median(times)
            while len(result.delays) < kills:
                await forker.begin(address, rng.choice(prompts), max_tokens)
                await asyncio.sleep(rng.uniform(0, usual_seconds))
                if not await forker.kill():
                    result.finished += 1
                    continue
                killed = time.monotonic()
                if await _in_use(watcher):
                    result.holding += 1
                result.delays.append(await _seconds_until_free(watcher, killed))
                report("Killing clients", len(result.delays), kills)
    finally:
        stack.stop()
    return result


async def _seconds_until_free(watcher: AsyncClient, since: float) -> float:
    """Returns the seconds from ``since`` to the first of two successive polls that show nothing in use."""
    freed: float | None = None
    while (now := time.monotonic()) - since < _FREE_TIMEOUT:
        if await _in_use(watcher):
            freed = None
        elif freed is not None:
            return freed
        else:
            freed = time.monotonic() - since
        await asyncio.sleep(max(0.0, _POLL - (time.monotonic() - now)))
    return float("inf")


async def _in_use(watcher: AsyncClient) -> bool:
    for worker in (await watcher.status()).workers:
        load = None if worker.process is None else worker.process.load
        if load is None or load.kv_blocks_used or load.running or load.waiting:
            return True
    return False


class _ClientForker:
    """A process that has imported the SDK and forks one client at a time. A new process needs 1 s for the import."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pid = 0

    async def begin(self, address: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Starts a client."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([address, list(prompt), max_tokens]).encode() + b"\n")
        self._pid = int(await self._line())

    async def end(self) -> str:
        """Waits for the client; returns its exit code, or minus the signal that ended it."""
        return await self._line()

    async def run_to_end(self, address: str, prompt: Sequence[int], max_tokens: int) -> float:
        """Runs a client to the end of its answer and returns the seconds that this took."""
        started = time.monotonic()
        await self.begin(address, prompt, max_tokens)
        if (how := await self.end()) != "0":
            raise InternalError(f"a client exited with {how}, although it was not killed")
        return time.monotonic() - started

    async def kill(self) -> bool:
        """Kills the client. Returns False if it had already exited."""
        # The client stays a zombie until the next one starts, so its pid is not reused.
        os.kill(self._pid, signal.SIGKILL)
        return await self.end() == str(-signal.SIGKILL)

    async def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := await self._process.stdout.readline()):
            raise InternalError("the process that forks clients has exited")
        return line.decode().strip()


@asynccontextmanager
async def _client_forker() -> AsyncIterator[_ClientForker]:
    command = [sys.executable, "-m", "overfill.lab.faults.client_kills"]
    pipe = asyncio.subprocess.PIPE
    # gRPC's fork handlers are not needed: the parent never opens a channel.
    environment = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=environment)
    try:
        yield _ClientForker(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def _fork_clients() -> None:
    """Forks one client per line of stdin: prints its pid, waits for it, prints its exit status."""
    pid = 0
    for line in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        address, prompt, max_tokens = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                with Client(address) as client, client.stream(prompt, sampling=sampling) as stream:
                    for _ in stream:
                        pass
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


if __name__ == "__main__":
    _fork_clients()
