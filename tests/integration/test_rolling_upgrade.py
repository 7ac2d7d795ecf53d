"""Tests a rolling upgrade by hand: in each stage a new worker joins and an old one drains; no request fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stacks import Load, children, idle, running_stack, wait_until

from overfill.client import Client
from overfill.stack.placed import PlacedWorker

STREAMS = 6
PROMPTS = [[20 + (7 * i * (seed + 3)) % 470 for i in range(24 + seed)] for seed in range(STREAMS)]


def test_every_worker_is_replaced_under_load_and_no_request_fails(tiny_pair: Path) -> None:
    with (
        running_stack(tiny_pair, prefill=1, decode=2, grace_period="20") as (stack, address),
        Client(address) as client,
    ):
        with Load(address, STREAMS, 40, PROMPTS) as load:
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
        assert load.errors == []
        wait_until(lambda: idle(address), 10, "all blocks are free")
        assert {w.id for w in client.status().workers} == {"prefill-0-new", "decode-0-new", "decode-1-new"}
        # Every stream had the same answers throughout, on old and new workers. The prompts' lengths tell them apart.
        assert len({answer.usage.prompt_tokens for answer in load.answers}) == STREAMS
        assert len({(answer.usage.prompt_tokens, answer.token_ids) for answer in load.answers}) == STREAMS


def renamed(worker: PlacedWorker, name: str) -> PlacedWorker:
    return replace(worker, config=worker.config.model_copy(update={"worker_id": name}))


def is_ready(client: Client, worker: str) -> bool:
    return any(w.id == worker and w.process is not None and w.process.ready for w in client.status().workers)


def gone(client: Client, worker: str) -> bool:
    return all(w.id != worker for w in client.status().workers)
