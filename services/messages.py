"""Makes the messages of a worker from what its engine knows."""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from collections.abc import Sequence

from overfill.engine.protocol import ServedHalf
from overfill.model.steps import SampledToken
from overfill.rpc.constants import WIRE_VERSION
from overfill.telemetry.engine_load import EngineLoad
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__

_STAGES = {"full": common_pb2.STAGE_PREFILL, "decoder": common_pb2.STAGE_DECODE}
_KINDS = {"full": "prefill", "decoder": "decode"}


def new_hello(worker_id: str, halves: Sequence[ServedHalf], tier: str = "") -> registry_pb2.Hello:
    """Creates a worker's Hello with a new incarnation. The host fills in the addresses once it listens.

    Args:
        halves: the halves that the worker runs, the full model first.
        tier: tier of a decode worker; empty means the only one of the stack.
    """
    last = halves[-1]  # with both halves, the decoder, whose identity names the full model too
    kind = "colocated" if len(halves) > 1 else _KINDS[last.half]
    return registry_pb2.Hello(
        worker_id=worker_id or f"{kind}-{socket.gethostname()}-{secrets.token_hex(2)}",
        incarnation=secrets.randbits(63),
        stages=[_STAGES[served.half] for served in halves],
        wire_version=WIRE_VERSION,
        software_version=__version__,
        model=last.model_identity,
        kv=last.kv.to_proto(),
        max_model_len=min(served.max_model_len for served in halves),
        vocab_size=last.config.vocab_size,
        pid=os.getpid(),
        engine=last.engine_version,
        tier=tier,
    )


def worker_load(load: EngineLoad, block_size: int, kv_disk_bytes: int = 0) -> decode_pb2.WorkerLoad:
    """Makes the message of an engine's load, and of the bytes of KV that its worker has on disk."""
    return decode_pb2.WorkerLoad(
        kv_blocks_used=load.blocks_used,
        kv_blocks_total=load.blocks_total,
        running=load.running,
        waiting=load.waiting,
        block_size=block_size,
        queued_tokens=load.queued_tokens,
        kv_blocks_cached=load.blocks_cached,
        prefix_tokens_looked_up=load.prefix_tokens_looked_up,
        prefix_tokens_found=load.prefix_tokens_found,
        kv_disk_bytes=kv_disk_bytes,
    )


def first_token_to_proto(
    token: SampledToken | None, scores: common_pb2.PromptLogprobs | None, scheduled_ns: int, sampled_ns: int
) -> decode_pb2.Tokens:
    """Converts the full model's token, if it has sampled one, and its scores of the prompt.

    The times are when its prompt was scheduled and when it was sampled.
    """
    tokens = decode_pb2.Tokens() if token is None else tokens_to_proto(token, 0)
    if scores is not None:
        tokens.prompt_logprobs.CopyFrom(scores)
    tokens.prefill_compute_ns = sampled_ns - scheduled_ns
    tokens.return_ns = time.monotonic_ns() - sampled_ns
    return tokens


def tokens_to_proto(token: SampledToken, index: int) -> decode_pb2.Tokens:
    """Converts a token of the answer, with its log-probabilities if the request asked for them."""
    tokens = decode_pb2.Tokens(first_index=index, ids=[token.token_id])
    if token.logprob is not None:
        # Leave out tokens that a grammar rules out: their log-probability is -inf.
        top = [(id, value) for id, value in token.top or [] if value != -math.inf]
        tokens.logprobs.add(
            logprob=token.logprob, top_ids=[id for id, _ in top], top_logprobs=[value for _, value in top]
        )
    return tokens
