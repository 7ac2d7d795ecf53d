"""The engines of a run: decode workers of ours, each a tier of one stack, and plain vLLM in processes of their own.

All engines are open together and take turns. They have the same settings, and no prefix caches.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from overfill.client import Answer, Client, SamplingParams
from overfill.kv.spec import DTypeName
from overfill.lab.bench.vllm.plain import PlainVllm, serve
from overfill.lab.bench.vllm.window import CpuTimes, DecodeWindow, decode_window
from overfill.lab.cpu_clock import cpu_seconds
from overfill.lab.peers.process import PeerFailed
from overfill.lab.stacks import Log, ServedStack, served
from overfill.lab.traffic.openai import completion_body, error_message
from overfill.lab.traffic.outcome import RequestFailed
from overfill.settings.tiers import TierSpec
from overfill.stack.child import TAIL_LINES
from overfill.stack.process_runner import child_environment
from overfill.telemetry.progress import Report

STEPS, SECONDS = 64, 1.0
"""A window of ours has so many steps and seconds at least, unless the answers are too short for it."""

_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_PAUSE = 1.25
"""Seconds before a turn. Processes of plain vLLM spin for a second after their last message."""

_PLAIN_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as in our workers
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Settings that all engines share.

    Attributes:
        threads: CPU threads of each engine.
        kv_memory: Bytes of each engine's KV cache.
        engine_args: Arguments of vLLM by name.
    """

    dtype: DTypeName
    threads: int
    max_num_seqs: int
    max_model_len: int
    kv_memory: int
    engine_args: Mapping[str, Any]

    def common(self) -> dict[str, Any]:
        """Settings that workers and vLLM call by the same names."""
        return {
            "dtype": self.dtype,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": max(2048, self.max_num_seqs),
            "max_model_len": self.max_model_len,
        }


class StackEngine:
    """A tier of a stack of ours, with one decode worker."""

    def __init__(self, stack: ServedStack, tier: str) -> None:
        self._stack, self._tier = stack, tier
        self._worker, self._router = stack.processes[f"decode-{tier}-0"], stack.processes["router"]

    def decode(self, prompts: Sequence[list[int]], max_tokens: int) -> DecodeWindow:
        """Tokens while all ``prompts`` are decoded.

        Raises:
            InternalError: an answer ended before.
            RequestFailed: the router refused a request.
        """

        async def run() -> DecodeWindow:
            model, most = f"{self._stack.model}:{self._tier}", max_tokens // 2
            bodies = [completion_body(model, prompt, max_tokens, extensions=True) for prompt in prompts]
            streams = [completion_counts(self._stack.url, body) for body in bodies]
            return await decode_window(streams, min(STEPS, most), self._cpu, seconds=SECONDS, most=most)

        window = asyncio.run(run())
        # The thread that steps vLLM is by far the busiest one. Threads have no names outside of their process.
        thread = max(spent for name, spent in window.cpu.items() if name not in ("worker", "router"))
        return replace(window, cpu={**window.cpu, "thread": thread})

    def answer(self, prompt: list[int], max_tokens: int) -> tuple[list[float], Answer]:
        """One answer, and when each of its tokens arrived."""
        with Client(self._stack.address) as client:
            client.models()  # connects
            start, times = time.perf_counter(), list[float]()
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            stream = client.stream(prompt, sampling=sampling, tier=self._tier)
            with stream:
                for delta in stream:
                    times += [time.perf_counter() - start] * len(delta.token_ids)
            return times, stream.answer

    def _cpu(self) -> CpuTimes:
        threads = {str(one.id): one.user_time + one.system_time for one in psutil.Process(self._worker).threads()}
        return {"worker": cpu_seconds(self._worker), "router": cpu_seconds(self._router), **threads}


class PlainEngine:
    """One model in plain vLLM, in a process of its own. The constructor starts the process and loads the model.

    Args:
        name: Name in messages.
        log: File for all that the process prints; its last lines are shown when a request fails.
        kind: Class of the engine.

    Raises:
        PeerFailed: vLLM did not start.
    """

    def __init__(
        self, name: str, model: Path, settings: VllmSettings, log: Path, kind: Callable[[Any], Any] = PlainVllm
    ) -> None:
        self._name, self._log = name, log
        environment = child_environment(os.environ, settings.threads) | _PLAIN_ENVIRONMENT
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, log, environment))  # it ends when the pipe closes
        self._process.start()
        theirs.close()
        arguments = {
            "model": str(model),
            "kv_cache_memory_bytes": settings.kv_memory,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        try:
            self._ask(kind, arguments | settings.common() | dict(settings.engine_args))
        except BaseException:
            self.close()
            raise

    def decode(self, prompts: Sequence[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        """Tokens while all ``prompts`` are decoded."""
        window: DecodeWindow = self._ask("decode", prompts, max_tokens, steps)
        return window

    def answer(self, prompt: list[int], max_tokens: int) -> list[float]:
        """When each token of one answer arrived."""
        times: list[float] = self._ask("answer", prompt, max_tokens)
        return times

    def close(self) -> None:
        """Ends the process, and kills it if it has not exited after 10 s."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def _ask(self, what: str | Callable[[Any], Any], *arguments: Any) -> Any:
        """Sends a request as of ``serve``. Raises PeerFailed if it fails, or the process has exited."""
        try:
            self._pipe.send((what, *arguments))
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            result, error = None, "the process exited"
        if error is None:
            return result
        failure = PeerFailed(f"{self._name} failed in {getattr(what, '__name__', what)!r}: {error}")
        for line in self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if self._log.exists() else ():
            failure.add_note(line)
        raise failure


async def completion_counts(url: str, body: Mapping[str, Any]) -> AsyncGenerator[int, None]:
    """Streams a completion whose events have token counts, and yields the counts.

    It reads no more than these, because the client shares the cores with what is measured.

    Raises:
        RequestFailed: the server refused the request.
    """
    address, content = urlsplit(url), json.dumps(body)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = f"POST {address.path}/completions HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(f"{head}{content}".encode())
        if b" 200 " not in (status := await reader.readline()):
            text = (await reader.read()).partition(b"\r\n\r\n")[2].decode(errors="replace")
            raise RequestFailed(f"{status.decode(errors='replace').strip()}: {error_message(text)}")
        rest = b""
        while received := await reader.read(1 << 16):
            events, _, rest = (rest + received).rpartition(b"\n\n")
            if counts := _TOKENS.findall(events):
                yield int(counts[-1])
    finally:
        writer.close()


@contextmanager
def stack_engines(pairs: Mapping[str, Path], settings: VllmSettings, log: Log) -> Iterator[dict[str, StackEngine]]:
    """Starts a stack with one prefill worker. Yields its tiers by name.

    Args:
        pairs: Name of a tier -> folder of its pair. All pairs have the same full model.

    Raises:
        StartFailed: a process exited.
    """
    tiers = [TierSpec(name=name, pair=str(folder)) for name, folder in pairs.items()]
    own = {"engine": "vllm", "engine_args": json.dumps(dict(settings.engine_args)), "kv_memory": settings.kv_memory}
    of_workers = {**settings.common(), **own, "prefix_cache": False}
    first = next(iter(pairs.values()))
    with served(first, settings=of_workers, log=log, tiers=tiers, threads=settings.threads) as stack:
        yield {name: StackEngine(stack, name) for name in pairs}


class EngineRounds:
    """The turns of the engines: random prompts, pauses and progress."""

    def __init__(self, rounds: int, vocab_size: int, report: Report) -> None:
        self._rounds, self._vocab_size, self._report = rounds, vocab_size, report
        self._rng = random.Random(0)

    def rounds(self, name: str) -> Iterator[None]:
        """Yields once per round, and reports the progress."""
        for done in range(self._rounds):
            self._report(name, done, self._rounds)
            yield
        self._report(name, self._rounds, self._rounds)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Prompts for a turn that begins now. No two prompts share a prefix."""
        time.sleep(_PAUSE)
        return [[self._rng.randrange(2, self._vocab_size) for _ in range(length)] for _ in range(count)]

    def decode(
        self, rows: int, length: int, max_tokens: int, ours: StackEngine, *peers: PlainEngine
    ) -> tuple[DecodeWindow, ...]:
        """A turn of each engine at ``rows`` rows with prompts of ``length`` tokens; peers take as many steps as ours.

        Under our workers, sequences decode while other prompts wait for the prefill worker. Plain vLLM starts all of
        them at nearly the same time. Longer prompts give its sequences the same contexts.
        """
        own = ours.decode(self.prompts(rows, length), max_tokens)
        longer = length + round(own.before)
        return own, *(peer.decode(self.prompts(rows, longer), max_tokens, own.steps) for peer in peers)
