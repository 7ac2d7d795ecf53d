"""Runs a service with one fault in it: ``python -m tests.support.faulty_service FAULT MODULE [ARGS...]``.

``hang-step``, ``out-of-memory`` and ``slow-steps`` work on either engine. vLLM is recognised by the setting ``engine``.
``poison`` and ``share-answers`` are for vLLM only.

The first three faults act after all of the service's own checks, so that only a comparison of the answers
(``overfill verify``) can detect them. Faults are patched in memory and named on stderr.

=====================  ==============================================================================
negate-weight-row      one row of the middle layer's down projection is negated after loading
overwrite-kv-chunk     received KV that starts at token 0 of layer 0 is overwritten with zeros (decode)
shift-positions        every forward pass gets positions that are one too large; use it in one stage only,
                       since RoPE is relative
hang-step              the engine's twentieth step never ends
out-of-memory          every fifth step of the engine raises an out-of-memory error
poison                 every step with a prompt that begins with token 3 raises an error (vLLM)
lose-block             the last block of a released sequence is not returned to the pool
slow-kv                each prompt's first KV is written 0.8 s late (decode)
flip-kv-bit            in every fifth KV chunk, one bit is flipped before the chunk is checked (decode)
slow-steps             every step of the engine takes 0.15 s longer
share-answers          vLLM's prefix cache takes blocks of answers for a prompt's (decode on vLLM)
=====================  ==============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import runpy
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from overfill.engine.runner import ModelRunner
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk
from overfill.kv.keys import token_bytes
from overfill.lab.chaos.patching import around, damage_received, runs_vllm
from overfill.model.quantize import Int8Matrix
from overfill.model.transformer import Transformer

_KV_DELAY = 0.8  # seconds
_STEP_DELAY = 0.15
_POISON = 3

# What only a worker on vLLM has is imported when its fault is installed.


def negate_weight_row() -> None:
    @around(Transformer, "load")
    def load_and_damage(load: Any, *args: Any, **kwargs: Any) -> Transformer:
        model: Transformer = load(*args, **kwargs)
        down = model.weights.layers[len(model.weights.layers) // 2].down
        with torch.inference_mode():
            # The row with the largest norm: negating a row of an unused channel would change no answer.
            if isinstance(down, Int8Matrix):
                down.values[down.dequantised().norm(dim=1).argmax()].neg_()
            else:
                down[down.norm(dim=1).argmax()].neg_()
        return model


def overwrite_kv_chunk() -> None:
    @around(_kv_store(), "write")
    def write_then_overwrite(write: Any, self: Any, blocks: Any, targets: Any, chunks: Any) -> Any:
        written = write(self, blocks, targets, chunks)
        zeros = [Chunk(c.range, bytes(len(c.payload))) for c in chunks[:written] if _starts(c)]
        write(self, blocks, targets, zeros)
        return written


def shift_positions() -> None:
    @around(Transformer, "forward")
    def forward_shifted(forward: Any, self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # Clamp: the RoPE tables end at max_positions - 1.
        positions = (batch.positions + 1).clamp(max=self.max_positions - 1)
        return forward(self, dataclasses.replace(batch, positions=positions), *args, **kwargs)


def hang_step() -> None:
    def hang(step: int) -> None:
        if step >= 20:
            threading.Event().wait()

    _before_each_step(hang)


def out_of_memory() -> None:
    def fail(step: int) -> None:
        if step > 10 and step % 5 == 0:  # the first 10 steps are the warm-up of OverFill's engine
            raise torch.OutOfMemoryError("no room for this step")

    _before_each_step(fail)


def poison() -> None:
    from overfill.engine.vllm.decode import VllmDecodeEngine
    from overfill.engine.vllm.prefill import VllmPrefillEngine

    for engine, owned in ((VllmDecodeEngine, "_sequences"), (VllmPrefillEngine, "_running")):

        @around(engine, "scheduled")
        def plan_and_fail(plan: Any, self: Any, num_tokens: Any, preempted: Any, owned: str = owned) -> None:
            plan(self, num_tokens, preempted)
            if any(getattr(self, owned)[id].prompt[0] == _POISON for id in num_tokens):
                raise RuntimeError("poisoned")


def lose_block() -> None:
    @around(BlockPool, "release")
    def release_most(release: Any, self: Any, owner: str, blocks: Any) -> None:
        release(self, owner, list(blocks)[:-1])


def slow_kv() -> None:
    @around(_kv_store(), "write")
    def write_late(write: Any, self: Any, blocks: Any, targets: Any, chunks: Any) -> Any:
        if any(map(_starts, chunks)):
            time.sleep(_KV_DELAY)
        return write(self, blocks, targets, chunks)


def flip_kv_bit() -> None:
    chunks = itertools.count(1)
    damage_received(lambda size: None if next(chunks) % 5 else (0, 1))


def slow_steps() -> None:
    _before_each_step(lambda step: time.sleep(_STEP_DELAY))


def share_answers() -> None:
    from overfill.engine.vllm import decode

    @around(decode, "block_hasher")
    def block_hasher(_: Any, prompt: Any, num_shared: int, block_size: int) -> Callable[[Any], list[bytes]]:
        def hash_by_tokens(request: Any) -> list[bytes]:
            tokens = list(request.all_token_ids)
            ends = range(len(request.block_hashes) + 1, request.num_tokens // block_size + 1)
            return [hashlib.sha256(token_bytes(tokens[: end * block_size])).digest() for end in ends]

        return hash_by_tokens

    @around(decode.VllmDecodeEngine, "ending")
    def keep_blocks_cached(*_: Any) -> bool:
        return False


def _kv_store() -> type:
    """Returns the class in which the service's engine keeps received KV."""
    if not runs_vllm():
        return KvCache
    from overfill.engine.vllm.store import VllmKvStore

    return VllmKvStore


def _starts(chunk: Chunk) -> bool:
    return chunk.range.layer_start == 0 and chunk.range.token_start == 0


def _before_each_step(act: Callable[[int], None]) -> None:
    """Calls ``act`` in every step of the engine, with the step's number from 1."""
    steps = itertools.count(1)
    owner: Any = ModelRunner
    if runs_vllm():
        from overfill.engine.vllm.internals import VllmCore

        owner = VllmCore

    @around(owner, "step" if runs_vllm() else "_batch")
    def act_and_step(step: Any, *args: Any) -> Any:
        act(next(steps))
        return step(*args)


_FAULTS = (
    negate_weight_row, overwrite_kv_chunk, shift_positions, hang_step, out_of_memory, poison, lose_block, slow_kv,
    flip_kv_bit, slow_steps, share_answers,
)  # fmt: skip
FAULTS = {install.__name__.replace("_", "-"): install for install in _FAULTS}


def main() -> None:
    """Installs ``sys.argv[1]`` and runs the module ``sys.argv[2]`` as ``__main__`` with the rest."""
    if len(sys.argv) < 3 or sys.argv[1] not in FAULTS:
        print(f"usage: python -m tests.support.faulty_service {{{','.join(FAULTS)}}} MODULE [ARGS...]", file=sys.stderr)
        raise SystemExit(2)
    fault, module = sys.argv[1:3]
    FAULTS[fault]()
    print(f"fault installed: {fault}", file=sys.stderr)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
