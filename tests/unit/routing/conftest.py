from collections.abc import Callable
from dataclasses import replace

import pytest
from jobs import worker_info

from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.pool import Roster
from overfill.routing.worker import DECODE, Worker, WorkerInfo
from overfill.v1 import decode_pb2, kv_pb2, registry_pb2

KV = KvSpec(num_layers=4, num_kv_heads=2, head_dim=16, dtype="float32", rope=RopeSpec())


@pytest.fixture
def make_info() -> Callable[..., WorkerInfo]:
    def make(worker_id: str, stage: int = DECODE, *, incarnation: int = 1, **identity: object) -> WorkerInfo:
        fields = {"wire_version": 1, "full_digest": "aa", "tokenizer_digest": "bb", "kv": KV} | identity
        return worker_info(
            worker_id,
            stage,
            incarnation,
            data_addresses=(kv_pb2.DataAddress(address=f"{worker_id}:2", num_kv_heads=2),),
            identity=KvIdentity(**fields),
            engine=f"engine of {worker_id}",
        )

    return make


@pytest.fixture
def make_report() -> Callable[..., registry_pb2.Report]:
    def make(
        *,
        credits: int = 4,
        ready: bool = True,
        draining: bool = False,
        used: int = 0,
        total: int = 100,
        block_size: int = 16,
        **counts: int,
    ) -> registry_pb2.Report:
        load = decode_pb2.WorkerLoad(kv_blocks_used=used, kv_blocks_total=total, block_size=block_size, **counts)
        return registry_pb2.Report(load=load, credits=credits, ready=ready, draining=draining)

    return make


@pytest.fixture
def add_worker(
    make_info: Callable[..., WorkerInfo], make_report: Callable[..., registry_pb2.Report]
) -> Callable[..., Worker]:
    """Returns a function that adds a worker to a roster and gives its first report."""

    def add(
        roster: Roster,
        worker_id: str,
        stage: int = DECODE,
        *,
        now: float = 0.0,
        incarnation: int = 1,
        tier: str = "",
        **report: object,
    ) -> Worker:
        worker = roster.join(replace(make_info(worker_id, stage, incarnation=incarnation), tier=tier))
        roster.pool_of(worker).report(worker, make_report(**report), now)
        return worker

    return add
