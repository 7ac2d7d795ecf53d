"""Runs a service with one fault in it: ``python -m overfill.lab.faults.service FAULT MODULE [ARGS...]``.

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
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import overfill.kv.puller
from overfill.engine.runner import ModelRunner
from overfill.engine.work import Work
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk, TransferSpec
from overfill.kv.keys import PromptBlocks, token_bytes
from overfill.kv.store import KvStore, LayerTargets
from overfill.model.batch import ForwardBatch
from overfill.model.quantize import Int8Matrix
from overfill.model.transformer import Transformer
from overfill.settings.reader import SETTINGS

_KV_DELAY = 0.8  # seconds
_STEP_DELAY = 0.15
_POISON = 3


def negate_weight_row() -> None:
    load = Transformer.load

    def load_and_damage(folder: Path, *args: Any, **kwargs: Any) -> Transformer:
        model = load(folder, *args, **kwargs)
        down = model.weights.layers[len(model.weights.layers) // 2].down
        with torch.inference_mode():
            # The row with the largest norm: negating a row of an unused channel would change no answer.
            if isinstance(down, Int8Matrix):
                down.values[down.dequantised().norm(dim=1).argmax()].neg_()
            else:
                down[down.norm(dim=1).argmax()].neg_()
        return model

    Transformer.load = load_and_damage  # type: ignore[method-assign]


def overwrite_kv_chunk() -> None:
    store: Any = _kv_store()
    write = store.write

    def write_then_overwrite(
        self: KvStore, blocks: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]
    ) -> int:
        written: int = write(self, blocks, targets, chunks)
        zeros = [Chunk(c.range, bytes(len(c.payload))) for c in chunks[:written] if _starts(c)]
        write(self, blocks, targets, zeros)
        return written

    store.write = write_then_overwrite


def _runs_vllm() -> bool:
    """Returns True if the service's engine is vLLM, by its flags or by the settings that its parent gives it."""
    return "--engine=vllm" in sys.argv or '"engine": "vllm"' in os.environ.get(SETTINGS, "")


def _kv_store() -> type[KvStore]:
    """Returns the class in which the service's engine keeps received KV."""
    if _runs_vllm():
        # Imported here because only a worker on vLLM has it.
        from overfill.engine.vllm.store import VllmKvStore

        return VllmKvStore
    return KvCache


def _starts(chunk: Chunk) -> bool:
    return chunk.range.layer_start == 0 and chunk.range.token_start == 0


def shift_positions() -> None:
    forward = Transformer.forward

    def forward_shifted(self: Transformer, batch: ForwardBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Clamp: the RoPE tables end at max_positions - 1.
        positions = (batch.positions + 1).clamp(max=self.max_positions - 1)
        return forward(self, dataclasses.replace(batch, positions=positions), *args, **kwargs)

    Transformer.forward = forward_shifted  # type: ignore[method-assign]


def _before_each_step(act: Callable[[int], None]) -> None:
    """Calls ``act`` in every step of the engine, with the step's number from 1."""
    steps = itertools.count(1)
    if _runs_vllm():
        # Imported here because only a worker on vLLM has it.
        from overfill.engine.vllm.internals import VllmCore

        take_step = VllmCore.step

        def act_and_step(self: VllmCore) -> tuple[list[Any], bool]:
            act(next(steps))
            return take_step(self)

        VllmCore.step = act_and_step  # type: ignore[method-assign]
        return
    make_batch = ModelRunner._batch

    def act_and_make(self: ModelRunner, works: Sequence[Work]) -> ForwardBatch:
        act(next(steps))
        return make_batch(self, works)

    ModelRunner._batch = act_and_make  # type: ignore[method-assign]


def hang_step() -> None:
    def hang(step: int) -> None:
        if step >= 20:
            threading.Event().wait()

    _before_each_step(hang)


def run_out_of_memory() -> None:
    def fail(step: int) -> None:
        if step > 10 and step % 5 == 0:  # the first 10 steps are the warm-up of OverFill's engine
            raise torch.OutOfMemoryError("no room for this step")

    _before_each_step(fail)


def lose_block() -> None:
    release = BlockPool.release

    def release_most(self: BlockPool, owner: str, blocks: Iterable[int]) -> None:
        release(self, owner, list(blocks)[:-1])

    BlockPool.release = release_most  # type: ignore[method-assign]


def delay_kv() -> None:
    store: Any = _kv_store()
    write = store.write

    def write_late(self: KvStore, blocks: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        if any(map(_starts, chunks)):
            time.sleep(_KV_DELAY)
        written: int = write(self, blocks, targets, chunks)
        return written

    store.write = write_late


def flip_kv_bit() -> None:
    puller: Any = overfill.kv.puller
    check, chunks = puller.check_head, itertools.count(1)

    def flip_and_check(spec: TransferSpec, chunk: Chunk) -> Any:
        if next(chunks) % 5 == 0:
            damaged = bytearray(chunk.payload)
            damaged[0] ^= 1
            chunk.payload = damaged
        return check(spec, chunk)

    puller.check_head = flip_and_check


def slow_steps() -> None:
    _before_each_step(lambda step: time.sleep(_STEP_DELAY))


def poison() -> None:
    # Imported here because only a worker on vLLM has it.
    from overfill.engine.vllm.decode import VllmDecodeEngine
    from overfill.engine.vllm.prefill import VllmPrefillEngine

    for engine in (VllmDecodeEngine, VllmPrefillEngine):
        plan: Any = engine.scheduled

        def plan_and_fail(
            self: Any, num_tokens: Mapping[str, int], preempted: Collection[str], plan: Any = plan
        ) -> None:
            plan(self, num_tokens, preempted)
            sequences = self._sequences if isinstance(self, VllmDecodeEngine) else self._running
            if any(sequences[id].prompt[0] == _POISON for id in num_tokens):
                raise RuntimeError("poisoned")

        engine.scheduled = plan_and_fail  # type: ignore[method-assign]


def share_answers() -> None:
    # Imported here because only a worker on vLLM has it.
    from overfill.engine.vllm import decode

    def block_hasher(prompt: PromptBlocks | None, num_shared: int, block_size: int) -> Callable[[Any], list[bytes]]:
        def hash_by_tokens(request: Any) -> list[bytes]:
            tokens = list(request.all_token_ids)
            ends = range(len(request.block_hashes) + 1, request.num_tokens // block_size + 1)
            return [hashlib.sha256(token_bytes(tokens[: end * block_size])).digest() for end in ends]

        return hash_by_tokens

    def keep_blocks_cached(self: object, request_id: str) -> bool:
        return False

    decode.block_hasher = block_hasher  # type: ignore[attr-defined]
    decode.VllmDecodeEngine.ending = keep_blocks_cached  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "negate-weight-row": negate_weight_row,
    "overwrite-kv-chunk": overwrite_kv_chunk,
    "shift-positions": shift_positions,
    "hang-step": hang_step,
    "out-of-memory": run_out_of_memory,
    "poison": poison,
    "lose-block": lose_block,
    "slow-kv": delay_kv,
    "flip-kv-bit": flip_kv_bit,
    "slow-steps": slow_steps,
    "share-answers": share_answers,
}


def main() -> None:
    """Installs ``sys.argv[1]`` and runs the module ``sys.argv[2]`` as ``__main__`` with the rest."""
    if len(sys.argv) < 3 or sys.argv[1] not in FAULTS:
        print(f"usage: python -m overfill.lab.faults.service {{{','.join(FAULTS)}}} MODULE [ARGS...]", file=sys.stderr)
        raise SystemExit(2)
    fault, module = sys.argv[1:3]
    FAULTS[fault]()
    print(f"fault installed: {fault}", file=sys.stderr)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
