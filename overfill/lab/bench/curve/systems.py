"""Starts each system of a curve on the same cores, in bfloat16 and with the same limits, and stops it at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overfill.lab.bench.curve.plan import APART, APART_FROM, RequestShape
from overfill.lab.bench.curve.tools import Endpoint
from overfill.lab.peers.vllm_server import vllm_server
from overfill.lab.stacks import Log, served
from overfill.model.manifest import Pair

LIMITS = {"max_num_seqs": 64, "max_model_len": 2048, "kv_memory": 1 << 30}
"""Of every worker and of vLLM. The KV cache holds the tokens of more users than a curve has."""


@contextmanager
def started(
    system: str, shape: RequestShape, pairs: Mapping[str, Pair], pythons: Mapping[str, Path], log: Log
) -> Iterator[Endpoint]:
    """Starts a system and yields its endpoint once it is ready. Call it on the main thread only.

    ``APART`` gets all cores but the last, which this thread and its later children get meanwhile.

    Args:
        pairs: pair of each system. vLLM serves the full model of its own.
        pythons: interpreter of vLLM's environment, by its name.

    Raises:
        StartFailed, PeerFailed: a process exited.
    """
    if system == APART and len(cores := sorted(os.sched_getaffinity(0))) > 1:
        os.sched_setaffinity(0, cores[:-1])
        try:
            with started(APART_FROM, shape, pairs, pythons, log) as endpoint:
                os.sched_setaffinity(0, cores[-1:])
                yield endpoint
        finally:
            os.sched_setaffinity(0, cores)
        return
    pair, threads = pairs[APART_FROM if system == APART else system], len(os.sched_getaffinity(0))
    caches = shape.prefix > 0
    tokenizer, vocab_size = pair.full_path, pair.full_config.vocab_size
    if system == "vllm":
        with vllm_server(pythons["vllm"], pair.full_path, prefix_cache=caches, **LIMITS) as url:
            yield Endpoint(url, str(pair.full_path), tokenizer, vocab_size)
        return
    split = system == "split"
    stages: dict[str, Any] = {
        "prefill": int(split),
        "decode": int(split),
        "colocated": int(not split),
        "threads": max(1, threads // 2) if split else threads,
    }
    settings = {"device": "cpu", "dtype": "bfloat16", "prefix_cache": caches, **LIMITS}
    with served(pair.folder, settings=settings, log=log, **stages) as stack:
        yield Endpoint(stack.url, stack.model, tokenizer, vocab_size)
