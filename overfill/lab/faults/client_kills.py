"""Kills clients of a stack with SIGKILL, each at a random moment of its answer, and times how soon all KV is free.

One client at a time, so that the blocks that are in use are its own.
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

from overfill.cli.stack import Stack, StackPlan
from overfill.client import AsyncClient, Client, SamplingParams
from overfill.errors import InternalError

_FREE_TIMEOUT = 10.0  # seconds for all blocks to be free before the trial says that they are not
_POLL = 0.01
_TIMED_ANSWERS = 5  # answers that are let finish, to know how long one takes


@dataclass(slots=True)
class ClientKillResult:
    """Results of killing clients.

    Attributes:
        delays: For each client killed before its answer was complete: seconds until no worker had a used block or a
            request. Infinite if one still had after 10 s.
        holding: Number of these clients whose blocks were in use at the first check after the kill.
        finished: Number of clients that had their whole answer before the kill; they are not counted in ``delays``.
    """

    delays: list[float] = field(default_factory=list)
    holding: int = 0
    finished: int = 0


async def kill_clients(
    plan: StackPlan,
    prompts: Sequence[Sequence[int]],
    kills: int,
    max_tokens: int,
    seed: int,
    report: Callable[[str, int, int], None],
) -> ClientKillResult:
    """Kills ``kills`` clients on a stack of its own. On the main thread: children are tied to it."""
    rng = random.Random(seed)
    result = ClientKillResult()
    stack = Stack(plan, lambda name, line: None)
    try:
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        address = plan.addresses[0]
        async with AsyncClient(address, tls=plan.client_tls) as watcher, _client_forker() as forker:
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
    """Seconds from ``since`` to the first of two readings, one after the other, that show nothing in use."""
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
    """A process that has loaded the SDK and forks a client at a time: a fresh one would take a second to load it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pid = 0

    async def begin(self, address: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Starts a client."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([address, list(prompt), max_tokens]).encode() + b"\n")
        self._pid = int(await self._line())

    async def end(self) -> str:
        """How the client ended."""
        return await self._line()

    async def run_to_end(self, address: str, prompt: Sequence[int], max_tokens: int) -> float:
        """Seconds that a client takes for its answer."""
        started = time.monotonic()
        await self.begin(address, prompt, max_tokens)
        if (how := await self.end()) != "0":
            raise InternalError(f"a client that nobody killed ended with {how}")
        return time.monotonic() - started

    async def kill(self) -> bool:
        """Kills the client; whether it was still waiting for tokens."""
        # It stays a zombie until the next one begins, so the pid is still its own.
        os.kill(self._pid, signal.SIGKILL)
        return await self.end() == str(-signal.SIGKILL)

    async def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := await self._process.stdout.readline()):
            raise InternalError("the process that forks clients has died")
        return line.decode().strip()


@asynccontextmanager
async def _client_forker() -> AsyncIterator[_ClientForker]:
    command = [sys.executable, "-m", "overfill.lab.faults.client_kills"]
    pipe = asyncio.subprocess.PIPE
    # Without gRPC's own handling of forks: the parent never opens a channel.
    environment = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=environment)
    try:
        yield _ClientForker(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def _fork_clients() -> None:
    """Per line of stdin a client: prints its pid, waits for it, prints how it ended."""
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
