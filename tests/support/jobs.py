"""Makes requests as the dispatcher sees them, without a prompt's tokens."""

from __future__ import annotations

from typing import Any

from overfill.routing.job import Job
from overfill.v1 import common_pb2, decode_pb2


def make_job(
    id: str, prompt_tokens: int, max_tokens: int, *, emitted: int = 0, compiles: bool = False, **more: Any
) -> Job:
    """Makes a job; ``more`` has further arguments of ``Job``."""
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, grammar=common_pb2.Grammar() if compiles else None)
    start = decode_pb2.StartDecode(request_id=id, sampling=sampling, emitted_token_ids=[0] * emitted)
    return Job(start=start, prompt_token_ids=range(prompt_tokens), **more)
