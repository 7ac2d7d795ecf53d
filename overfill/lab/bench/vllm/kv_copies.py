"""Speed of reading and writing vLLM's KV blocks, beside ``memcpy`` of the same bytes. Prints one JSON object.

Run as a process of its own, ``python -m overfill.lab.bench.vllm.kv_copies PAIR DEVICE DTYPE ROUNDS``, because it loads
a vLLM engine: its store is the one that workers send from and receive into.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import cast

import numpy as np
import torch

from overfill.engine.device import resolve_device
from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions
from overfill.kv.chunks import Chunk, digest
from overfill.kv.ranges import KvRange
from overfill.kv.spec import DTypeName, KvSpec
from overfill.kv.store import LayerTargets
from overfill.model.manifest import Pair
from overfill.rpc.constants import MAX_SHARED_PAYLOAD

TOKENS = 512
"""Tokens of a transfer's prompt."""
TRANSFERS = 8
"""Maximum number of transfers at once."""


def measure(pair: Pair, device: torch.device, dtype: DTypeName, rounds: int) -> dict[str, float]:
    """Bytes per second of each kind of copy, by name: the best of ``rounds``, since others only slow a copy."""
    spec = pair.full_config.kv_spec(dtype)
    needed = (TRANSFERS + 1) * TOKENS * spec.token_bytes
    options = EngineOptions(device, spec.dtype, kv_memory=needed, engine_args={"enforce_eager": True}, max_num_seqs=8)
    store = load_engine("vllm", pair, "full", options).served.store
    blocks = list(range(1, 1 + TRANSFERS * TOKENS // store.block_size))
    random.Random(0).shuffle(blocks)
    each = TOKENS // store.block_size
    tables = [blocks[at * each : (at + 1) * each] for at in range(TRANSFERS)]
    prompts = [_chunks(spec, store.block_size) for _ in tables]
    size = sum(len(chunk.payload) for chunk in prompts[0])
    targets = LayerTargets({layer: [layer] for layer in range(spec.num_layers)})
    sources, copies = (np.ones((TRANSFERS, size), dtype=np.uint8) for _ in range(2))  # as many bytes as the transfers

    def read(at: int) -> None:
        store.read(tables[at], prompts[at], {})

    def write(at: int) -> None:
        store.write(tables[at], targets, prompts[at])

    def check(at: int) -> None:
        for chunk in prompts[at]:
            digest(chunk.payload)

    kinds: dict[str, tuple[Callable[[int], None], int]] = {
        "memcpy": (lambda at: np.copyto(copies[at], sources[at]), 1),
        "checksum": (check, 1),
        **{f"read_{count}": (read, count) for count in (1, TRANSFERS)},
        **{f"write_{count}": (write, count) for count in (1, TRANSFERS)},
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for turn in range(rounds + 1):
            for name, (copy, count) in kinds.items():
                began = time.perf_counter()
                if count == 1:
                    copy(turn % TRANSFERS)
                else:
                    for one in wait([pool.submit(copy, at) for at in range(count)]).done:
                        one.result()
                if turn:  # the first one touches the memory
                    found[name].append(count * size / (time.perf_counter() - began))
    return {name: max(rates) for name, rates in found.items()}


def _chunks(spec: KvSpec, block_size: int) -> Sequence[Chunk]:
    """The chunks of a transfer through shared memory, without checksums."""
    layers = max(1, MAX_SHARED_PAYLOAD // (TOKENS * spec.token_layer_bytes))
    ranges = [
        KvRange(first, min(first + layers, spec.num_layers), 0, TOKENS, 0, spec.num_kv_heads)
        for first in range(0, spec.num_layers, layers)
    ]
    vector = spec.token_layer_bytes // (2 * spec.num_kv_heads)
    return [Chunk(one, memoryview(bytearray(one.num_vectors * vector))) for one in ranges]


def main() -> None:
    folder, device, dtype, rounds = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout
    os.dup2(2, 1)
    found = measure(Pair.load(Path(folder)), resolve_device(device), cast(DTypeName, dtype), int(rounds))
    print(json.dumps(found), file=answer, flush=True)
    os._exit(0)  # vLLM's engine has threads


if __name__ == "__main__":
    main()
