"""Makes requests as the dispatcher sees them, without a prompt's tokens, and workers as they join a router."""

from __future__ import annotations

from typing import Any

from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.job import Job
from overfill.routing.worker import WorkerInfo
from overfill.v1 import common_pb2, decode_pb2


def make_job(
    id: str, prompt_tokens: int, max_tokens: int, *, emitted: int = 0, compiles: bool = False, **more: Any
) -> Job:
    """Makes a job; ``more`` has further arguments of ``Job``."""
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, grammar=common_pb2.Grammar() if compiles else None)
    start = decode_pb2.StartDecode(request_id=id, sampling=sampling, emitted_token_ids=[0] * emitted)
    return Job(start=start, prompt_token_ids=range(prompt_tokens), **more)


def worker_info(id: str, stage: common_pb2.Stage, incarnation: int = 1, **fields: Any) -> WorkerInfo:
    """Describes one stage of a worker; ``fields`` has further arguments of ``WorkerInfo``."""
    usual = {
        "address": f"{id}:1",
        "data_addresses": (),
        "identity": KvIdentity(1, "a", "b", KvSpec(1, 1, 2, "float32", RopeSpec())),
        "max_model_len": 0,
        "vocab_size": 99,
    }
    return WorkerInfo(id, incarnation, stage, **usual | fields)
