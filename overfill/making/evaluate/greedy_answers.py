"""Writes greedy answers with models that are in memory: the full model reads a prompt, a decoder writes on its KV.

The engine's runner computes, so that the tokens are those of a worker. There is no scheduler: a prompt starts as soon
as blocks are free, and each step decodes all running answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from overfill.engine.runner import ModelRunner
from overfill.engine.work import Work
from overfill.kv.cache import KvCache
from overfill.kv.tensors import dtype_name
from overfill.making.evaluate.teacher_forced import Candidate
from overfill.model.transformer import ForwardModel
from overfill.telemetry.progress import Report, silent

_BLOCK_SIZE = 16
_MAX_RUNNING = 64
_CACHE_TOKENS = 32_768
"""Tokens of the decoder's KV cache, unless one sequence is longer."""


@dataclass(slots=True)
class Written:
    """An answer without its end-of-sequence token; ``finished`` is False if it was cut at the limit."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True, slots=True)
class _Running:
    """A sequence in the decoder's cache; ``end`` is the number of tokens at which it is cut, ``adapter`` a slot."""

    written: Written
    prompt_tokens: int
    end: int
    blocks: list[int]
    adapter: int | None

    def add(self, token: int, stop_ids: Sequence[int]) -> bool:
        """Adds a token; returns False when the answer has ended."""
        if token in stop_ids:
            self.written.finished = True
            return False
        self.written.token_ids.append(token)
        return self.prompt_tokens + len(self.written.token_ids) < self.end

    def next_step(self) -> Work:
        start = self.prompt_tokens + len(self.written.token_ids) - 1
        return Work(self.written.token_ids[-1:], start, self.blocks, True, adapter=self.adapter)


def write_answers(
    full: ForwardModel,
    decoder: Candidate,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    starts: Sequence[int] | None = None,
    adapters: Sequence[int | None] | None = None,
    step: str = "Writing answers",
    report: Report = silent,
) -> list[Written]:
    """Writes a greedy answer of at most ``max_tokens`` tokens to each prompt, in the order of ``prompts``.

    An answer ends early at the context's end.

    Args:
        starts: index of the first token of each prompt that the decoder computes; it then chooses the first token. None
            means that the full model computes all of them and chooses the first token, as in a stack. Successive
            prompts with the same part before it are read once.
        adapters: slot of the adapter that writes each answer; None for the decoder alone.
    """
    starts = starts or [len(prompt) for prompt in prompts]
    adapters = adapters or [None] * len(prompts)
    context = min(full.max_positions, decoder.model.max_positions)
    ends = [min(len(prompt) + max_tokens, context) for prompt in prompts]
    needed = [-(-end // _BLOCK_SIZE) for end in ends]
    num_blocks = max(_CACHE_TOKENS // _BLOCK_SIZE, *needed)
    reader = _runner(full, -(-max(map(len, prompts)) // _BLOCK_SIZE))
    runner = _runner(decoder.model, min(num_blocks, sum(needed)))
    free = list(range(runner.cache.num_blocks))
    stop_ids = full.config.eos_token_ids
    written = [Written() for _ in prompts]
    waiting, running = deque(range(len(prompts))), list[_Running]()
    read, next_logits = list[int](), torch.empty(0)  # what the reader's cache holds
    while waiting or running:
        while waiting and len(running) < _MAX_RUNNING and needed[waiting[0]] <= len(free):
            index = waiting.popleft()
            prompt, start, adapter = prompts[index], starts[index], adapters[index]
            blocks = [free.pop() for _ in range(needed[index])]
            if start:
                read_blocks = list(range(-(-start // _BLOCK_SIZE)))
                if (shared := list(prompt[:start])) != read:
                    read, next_logits = shared, reader.run([Work(shared, 0, read_blocks, wants_logits=True)])
                runner.copy_kv(reader, read_blocks, blocks[: len(read_blocks)], decoder.layer_map, start, 0)
            first = next_logits
            if start < len(prompt):
                first = runner.run([Work(prompt[start:], start, blocks, wants_logits=True, adapter=adapter)])
            sequence = _Running(written[index], len(prompt), ends[index], blocks, adapter)
            if sequence.add(int(first.argmax()), stop_ids):
                running.append(sequence)
            else:
                free += blocks
        if running:
            tokens = runner.run([sequence.next_step() for sequence in running]).argmax(-1).tolist()
            going = [sequence.add(token, stop_ids) for sequence, token in zip(running, tokens, strict=True)]
            free += [b for sequence, goes in zip(running, going, strict=True) if not goes for b in sequence.blocks]
            running = [sequence for sequence, goes in zip(running, going, strict=True) if goes]
        report(step, len(prompts) - len(waiting) - len(running), len(prompts))
    return written


def _runner(model: ForwardModel, num_blocks: int) -> ModelRunner:
    spec = model.config.kv_spec(dtype_name(model.dtype))
    return ModelRunner(model, KvCache(spec, num_blocks, _BLOCK_SIZE, model.device))
