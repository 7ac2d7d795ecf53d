"""Makes the router's dispatcher and jobs for the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import get_args

from overfill.errors import InvalidRequest
from overfill.kv.keys import PromptKeys, root_key
from overfill.lab.traffic.traces import TraceRequest
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.job import Job
from overfill.routing.policies import DECODE_DEFAULT, DECODE_POLICIES, POLICIES, PREFILL_DEFAULT, PolicyName
from overfill.routing.pool import Roster
from overfill.v1 import common_pb2, decode_pb2

DEFAULT = "default"
NAMES = (DEFAULT, *get_args(PolicyName))
"""``default`` is the router's default: ``PREFILL_DEFAULT`` and ``DECODE_DEFAULT``."""

_ROOT = root_key("", "")


def make_dispatcher(
    roster: Roster, policy: str, max_queue: int, seed: int, max_wait: float | None = None
) -> Dispatcher:
    """Makes a dispatcher with ``policy``, one of ``NAMES``. Decode uses its default if it does not have this policy.

    Raises:
        InvalidRequest: The policy is unknown.
    """
    if policy not in NAMES:
        raise InvalidRequest("policy", f"must be one of {', '.join(NAMES)}, got {policy!r}")
    prefill: PolicyName = PREFILL_DEFAULT if policy == DEFAULT else policy  # type: ignore[assignment]
    decode: PolicyName = policy if policy in DECODE_POLICIES else DECODE_DEFAULT
    roster.use(POLICIES[prefill](seed), lambda: POLICIES[decode](seed))
    return Dispatcher(roster, max_queue=max_queue, max_wait=max_wait)


def make_job(name: str, trace: TraceRequest) -> Job:
    """Makes the job of a request, as the router does. The trace's block numbers replace the tokens of blocks."""
    sampling = common_pb2.SamplingParams(max_tokens=trace.output_tokens)
    start = decode_pb2.StartDecode(request_id=name, sampling=sampling)
    job = Job(start=start, prompt_token_ids=range(trace.prompt_tokens))
    if trace.blocks:
        keys = PromptKeys(_ROOT, trace.blocks[: trace.prompt_tokens // trace.block_tokens])

        def block_keys(block_size: int) -> Iterator[int]:
            # Where blocks are smaller than the trace's, each of the trace's has several: the same key stands for all.
            times = max(1, trace.block_tokens // block_size)
            return chain.from_iterable(repeat(key, times) for key in keys(1))

        job.block_keys = block_keys
    return job


def answer_keys(trace: TraceRequest) -> list[int]:
    """Returns the keys of all full blocks of a request's prompt and answer; empty if they are unknown."""
    full = trace.prompt_tokens // trace.block_tokens
    return list(PromptKeys(_ROOT, (*trace.blocks[:full], *trace.answer_blocks))(1)) if trace.answer_blocks else []
