"""Does memory stay where it is? Many short requests through both engines, resident memory after each batch of them.

What grows with the first requests is left out: caches whose pages are touched, workspaces that grow to the largest
step. Knows nothing of speed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from overfill.model.manifest import Pair
from overfill.pair.llm import LLM
from overfill.request.params import SamplingParams

MIB = 2**20
_BATCH = 64
_WARM_SHARE = 0.1  # of the requests
_TOKENS = 64  # that a request takes in the cache, at most; a batch fills it, so it is all touched while warming up


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Resident memory of the process.

    Attributes:
        requests: requests finished at each sample.
        resident: bytes, at each.
    """

    requests: list[int]
    resident: list[int]

    @property
    def warm(self) -> int:
        """Index of the first sample after the warm-up."""
        return next(i for i, done in enumerate(self.requests) if done >= _WARM_SHARE * self.requests[-1])

    @property
    def growth(self) -> int:
        """Bytes between the end of the warm-up and the end, each the median of a few samples."""
        after = self.resident[self.warm :]
        few = max(1, len(after) // 10)
        return sorted(after[-few:])[few // 2] - sorted(after[:few])[few // 2]


def measure_memory(
    pair: Path, requests: int, threads: int | None, report: Callable[[int], object] = lambda done: None
) -> MemoryRun:
    """Answers ``requests`` prompts of 4 to 40 tokens with 1 to 12 tokens each, greedy and drawn, with and without
    log-probabilities; ``report`` hears how many are done."""
    room = _BATCH * _TOKENS * Pair.load(pair).full_config.kv_spec("float32").token_bytes
    llm = LLM(pair, threads=threads, kv_memory=room)
    process = psutil.Process()
    draw = random.Random(0)
    vocabulary = llm.tokenizer.vocab_size
    done: list[int] = []
    resident: list[int] = []
    while not done or done[-1] < requests:
        count = min(_BATCH, requests - (done[-1] if done else 0))
        prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(4, 40))] for _ in range(count)]
        llm.generate(prompts, [_choice(draw) for _ in range(count)])
        done.append((done[-1] if done else 0) + count)
        resident.append(process.memory_info().rss)
        report(done[-1])
    return MemoryRun(done, resident)


def _choice(draw: random.Random) -> SamplingParams:
    length = draw.randint(1, 12)
    kinds = (
        SamplingParams(temperature=0, max_tokens=length),
        SamplingParams(temperature=0, max_tokens=length, logprobs=2),
        SamplingParams(seed=draw.getrandbits(64), max_tokens=length),
        SamplingParams(seed=draw.getrandbits(64), top_p=0.9, top_k=50, max_tokens=length),
    )
    return draw.choice(kinds)
