"""Tests a rolling upgrade by hand: in each stage a new worker joins and an old one drains; no request fails."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

from stacks import children, idle, running_stack, wait_until

from overfill.client import AsyncClient, Client, SamplingParams
from overfill.stack.placed import PlacedWorker

GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
STREAMS = 6
PROMPTS = [[20 + (7 * i * (seed + 3)) % 470 for i in range(24 + seed)] for seed in range(STREAMS)]


def test_every_worker_is_replaced_under_load_and_no_request_fails(tiny_pair: Path) -> None:
    with running_stack(tiny_pair, prefill=1, decode=2, grace_period="20") as (stack, address):
        load = Load(address)
        load.start()
        with Client(address) as client:
            for worker in stack.placed.workers:
                load.wait_for_answers(2 * STREAMS)
                old, new = worker.id, f"{worker.id}-new"
                stack._workers.append(stack._spawn_worker(renamed(worker, new)))
                wait_until(lambda new=new: is_ready(client, new), 90, f"{new} joins")
                client.drain(old)
                wait_until(lambda old=old: gone(client, old), 60, f"{old} leaves")
                child = next(child for child in children(stack, worker.kind.name) if child.name == old)
                wait_until(lambda child=child: child.returncode == 0, 30, f"{old} exits 0")
            load.wait_for_answers(2 * STREAMS)
            answers = load.stop()
            wait_until(lambda: idle(address), 10, "all blocks are free")
            used = {w.id for w in client.status().workers}
        assert used == {"prefill-0-new", "decode-0-new", "decode-1-new"}
        assert len(answers) > 8 * STREAMS
        # Every stream had the same answers throughout, on old and new workers.
        assert len(set(answers)) == STREAMS
        assert {prompt for prompt, _ in answers} == set(range(STREAMS))


def renamed(worker: PlacedWorker, name: str) -> PlacedWorker:
    return replace(worker, config=worker.config.model_copy(update={"worker_id": name}))


def is_ready(client: Client, worker: str) -> bool:
    return any(w.id == worker and w.process is not None and w.process.ready for w in client.status().workers)


def gone(client: Client, worker: str) -> bool:
    return all(w.id != worker for w in client.status().workers)


class Load(threading.Thread):
    """Sends greedy requests one after another on each stream. A failure ends its stream; ``stop`` raises it."""

    def __init__(self, address: str) -> None:
        super().__init__(name="load", daemon=True)
        self._address = address
        self._answers: list[tuple[int, tuple[int, ...]]] = []
        self._stopping = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._error = error

    def wait_for_answers(self, count: int) -> None:
        wanted = len(self._answers) + count
        wait_until(lambda: len(self._answers) >= wanted or not self.is_alive(), 90, f"{count} more answers")
        if self._error is not None:
            raise self._error

    def stop(self) -> list[tuple[int, tuple[int, ...]]]:
        self._stopping.set()
        self.join(60)
        if self._error is not None:
            raise self._error
        return self._answers

    async def _all(self) -> None:
        async with AsyncClient(self._address) as client, asyncio.TaskGroup() as group:
            for index in range(STREAMS):
                group.create_task(self._stream(client, index))

    async def _stream(self, client: AsyncClient, index: int) -> None:
        while not self._stopping.is_set():
            answer = await client.generate(PROMPTS[index], sampling=GREEDY, timeout=60)
            self._answers.append((index, tuple(answer.token_ids)))
