"""Plays the same load on one server after the other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overfill.bench.serve.load import Progress, RequestFailed, run_load
from overfill.bench.serve.outcome import Outcome
from overfill.bench.serve.targets import GrpcTarget, OpenAiTarget
from overfill.errors import InvalidRequest, Unavailable
from overfill.simulate.traces import TraceRequest

IN_PROCESS = ("openvino", "vllm")
"""Engines of ``overfill bench peers`` that are loaded for the run and driven without a server."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One server.

    Attributes:
        where: ``http(s)://…/v1``, ``grpc://HOST:PORT`` (or several, separated by commas), or one of ``IN_PROCESS``.
    """

    name: str
    where: str

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """From ``NAME=WHERE``; a bare ``WHERE`` is its own name.

        Raises:
            InvalidRequest: ``WHERE`` is nothing that can be reached.
        """
        name, separator, where = text.partition("=")
        if not separator:
            name, where = text, text
        if not (where.startswith(("http://", "https://", "grpc://")) or where in IN_PROCESS):
            raise InvalidRequest(
                "target", f"{text!r} is none of http://HOST:PORT/v1, grpc://HOST:PORT, {', '.join(IN_PROCESS)}"
            )
        return cls(name, where)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a load is played.

    Attributes:
        vocab_size: prompts hold ids below.
        model, key, extensions: of OpenAI endpoints.
        concurrency, timeout: as ``run_load`` takes them.
        pair, threads: of engines in process.
    """

    vocab_size: int
    model: str | None
    key: str | None
    extensions: bool
    concurrency: int | None
    timeout: float
    pair: str
    threads: int


def play(
    spec: TargetSpec, requests: Sequence[TraceRequest], settings: LoadSettings, progress: Progress | None = None
) -> list[Outcome]:
    """Warms the server up with two short requests, then plays ``requests``.

    Raises:
        Unavailable: the server does not even answer the first request.
        InvalidRequest: an engine in process is not installed, or was asked for a closed loop.
    """
    warmup = [TraceRequest(0.0, min(64, r.prompt_tokens), 4) for r in requests[:2]]
    if spec.where in IN_PROCESS:
        return _in_process(spec, warmup, requests, settings)
    return asyncio.run(_served(spec, warmup, requests, settings, progress))


async def _served(
    spec: TargetSpec,
    warmup: Sequence[TraceRequest],
    requests: Sequence[TraceRequest],
    settings: LoadSettings,
    progress: Progress | None,
) -> list[Outcome]:
    try:
        async with _open(spec, settings) as target:
            first = await run_load(target, warmup, settings.vocab_size, timeout=settings.timeout)
            if not any(outcome.ok for outcome in first):
                raise Unavailable(f"{spec.name} answers nothing: {first[0].error}")
            return await run_load(
                target,
                requests,
                settings.vocab_size,
                concurrency=settings.concurrency,
                timeout=settings.timeout,
                progress=progress,
            )
    except RequestFailed as error:
        raise Unavailable(str(error)) from error


def _open(spec: TargetSpec, settings: LoadSettings) -> OpenAiTarget | GrpcTarget:
    if spec.where.startswith("grpc://"):
        return GrpcTarget(spec.where.removeprefix("grpc://"))
    return OpenAiTarget(spec.where, settings.model, settings.key, extensions=settings.extensions)


def _in_process(
    spec: TargetSpec, warmup: Sequence[TraceRequest], requests: Sequence[TraceRequest], settings: LoadSettings
) -> list[Outcome]:
    # Not at the top: torch takes seconds to import, and servers need none here.
    import torch

    from overfill.bench.ours import Workload
    from overfill.bench.peers.choose import Missing, PeerSetting, open_process
    from overfill.pair.manifest import Pair
    from overfill.pair.store import resolve_pair

    if settings.concurrency is not None:
        raise InvalidRequest("concurrency", f"{spec.where} runs in process, where only arrivals are played")
    longest = max(r.prompt_tokens + r.output_tokens for r in requests)
    pair = Pair.load(resolve_pair(settings.pair))
    workload = Workload(64, longest)
    with tempfile.TemporaryDirectory(prefix="overfill-bench-") as logs:
        given = PeerSetting(
            pair, torch.bfloat16, torch.device("cpu"), settings.threads, workload, 2048, Path(logs), kv_bytes=4 << 30
        )
        peer = open_process(spec.where, given)
        if isinstance(peer, Missing):
            raise InvalidRequest("target", f"{spec.where} is {peer.hint}")
        try:
            peer.serve(_asked(warmup, settings.vocab_size))
            times = peer.serve(_asked(requests, settings.vocab_size))
        finally:
            peer.close()
    return [Outcome(r.arrival, tuple(of_one)) for r, of_one in zip(requests, times, strict=True)]


def _asked(requests: Sequence[TraceRequest], vocab_size: int) -> list[tuple[float, list[int], int]]:
    return [(r.arrival, r.prompt(vocab_size, seed), r.output_tokens) for seed, r in enumerate(requests)]
