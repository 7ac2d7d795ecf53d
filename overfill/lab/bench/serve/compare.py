"""Opens servers one after the other, and plays loads on them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from overfill.errors import InvalidRequest, Unavailable
from overfill.lab.bench.serve.load import Progress, RequestFailed, run_load
from overfill.lab.bench.serve.targets import GrpcTarget, OpenAiTarget
from overfill.lab.traffic.outcome import Outcome
from overfill.lab.traffic.traces import TraceRequest

if TYPE_CHECKING:
    from overfill.lab.bench.serve.colocated import Asked
    from overfill.model.manifest import Pair
    from overfill.rpc.tls import ClientTls

STARTED = ("colocated", "openvino", "vllm")
"""Engines that are started for the run and ended after it: ours in one process, with both halves of ``--pair``;
OpenVINO GenAI in a process of its own, and vLLM's server, with its full model."""

_BATCH = 64
_TOKEN_BUDGET = 2048

Play = Callable[[Sequence[TraceRequest], Progress | None], list[Outcome]]
"""Plays requests on a server that is open; their outcomes in the same order."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One server.

    Attributes:
        where: ``http(s)://…/v1``, ``grpc://HOST:PORT`` (or several, separated by commas), or one of ``STARTED``,
            which may be followed by ``:PAIR``.
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
        if not (where.startswith(("http://", "https://", "grpc://")) or where.partition(":")[0] in STARTED):
            raise InvalidRequest(
                "target", f"{text!r} is none of http://HOST:PORT/v1, grpc://HOST:PORT, {', '.join(STARTED)}"
            )
        return cls(name, where)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a load is played.

    Attributes:
        vocab_size: prompts hold ids below.
        model, key, extensions: of OpenAI endpoints.
        stack_key, tls: of stacks over gRPC.
        concurrency, timeout: as ``run_load`` takes them.
        pair, threads: of engines that are started.
    """

    vocab_size: int
    model: str | None
    key: str | None
    extensions: bool
    concurrency: int | None
    timeout: float
    pair: str
    threads: int
    stack_key: str | None = None
    tls: ClientTls | None = None


@contextmanager
def opened(spec: TargetSpec, longest: int, settings: LoadSettings) -> Iterator[Play]:
    """A server, started if need be, that has answered two short requests. On the main thread only.

    Args:
        longest: most tokens of a prompt and its answer.

    Raises:
        Unavailable: the server does not even answer the first request.
        PeerFailed: an engine does not start.
        InvalidRequest: an engine is not installed, or was asked for a closed loop.
    """
    kind, _, pair = spec.where.partition(":")
    if kind not in STARTED:
        play = _of_server(spec.where, settings)
        _warm_up(spec, play, longest)
        yield play
        return
    if settings.concurrency is not None and kind != "vllm":
        raise InvalidRequest("concurrency", f"{kind} runs without a server, where only arrivals are played")
    start = {"colocated": _colocated, "openvino": _openvino, "vllm": _vllm}[kind]
    with start(pair or settings.pair, longest, settings) as play:
        _warm_up(spec, play, longest)
        yield play


def _warm_up(spec: TargetSpec, play: Play, longest: int) -> None:
    output = min(4, longest - 1)
    found = play([TraceRequest(0.0, min(64, longest - output), output)] * 2, None)
    if not any(outcome.ok for outcome in found):
        raise Unavailable(f"{spec.name} answers nothing: {found[0].error}")


def _of_server(where: str, settings: LoadSettings) -> Play:
    async def played(requests: Sequence[TraceRequest], progress: Progress | None) -> list[Outcome]:
        try:
            async with _target(where, settings) as target:
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

    return lambda requests, progress: asyncio.run(played(requests, progress))


def _target(where: str, settings: LoadSettings) -> OpenAiTarget | GrpcTarget:
    if where.startswith("grpc://"):
        return GrpcTarget(where.removeprefix("grpc://"), settings.tls, settings.stack_key)
    return OpenAiTarget(where, settings.model, settings.key, extensions=settings.extensions)


# Imports of the following are not at the top: torch takes seconds to import, and servers need none here.


@contextmanager
def _vllm(pair: str, longest: int, settings: LoadSettings) -> Iterator[Play]:
    from overfill.lab.bench.engine.peers.environment import NOT_INSTALLED, python_of
    from overfill.lab.bench.engine.peers.vllm_server import vllm_server

    python = python_of("vllm")
    if python is None:
        raise InvalidRequest("target", f"vllm: {NOT_INSTALLED}")
    model = _loaded(pair).full_path
    with vllm_server(
        python,
        model,
        threads=settings.threads,
        max_model_len=longest,
        max_num_seqs=_BATCH,
        token_budget=_TOKEN_BUDGET,
    ) as url:
        yield _of_server(url, replace(settings, model=None, key=None, extensions=True))


@contextmanager
def _openvino(pair: str, longest: int, settings: LoadSettings) -> Iterator[Play]:
    import torch

    from overfill.lab.bench.engine.overfill_engine import Workload
    from overfill.lab.bench.engine.peers.choose import Missing, PeerSettings, open_process

    with tempfile.TemporaryDirectory(prefix="overfill-bench-") as logs:
        peer = open_process(
            "openvino",
            PeerSettings(
                _loaded(pair),
                torch.bfloat16,
                torch.device("cpu"),
                settings.threads,
                Workload(_BATCH, longest),
                _TOKEN_BUDGET,
                Path(logs),
                kv_bytes=4 << 30,
            ),
        )
        if isinstance(peer, Missing):
            raise InvalidRequest("target", f"openvino: {peer.hint}")
        with closing(peer):
            yield lambda requests, progress: _timed(requests, peer.serve(_asked(requests, settings)))


@contextmanager
def _colocated(pair: str, longest: int, settings: LoadSettings) -> Iterator[Play]:
    from overfill.lab.bench.serve.colocated import serve_colocated
    from overfill.pair.llm import LLM

    llm = LLM(
        pair,
        threads=settings.threads,
        max_model_len=longest,
        max_num_seqs=_BATCH,
        token_budget=_TOKEN_BUDGET,
        prefix_cache=False,  # a workload is played more than once
    )

    yield lambda requests, progress: _timed(requests, serve_colocated(llm, _asked(requests, settings), progress))


def _loaded(pair: str) -> Pair:
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    return Pair.load(resolve_pair(pair))


def _timed(requests: Sequence[TraceRequest], times: Sequence[Sequence[float]]) -> list[Outcome]:
    return [Outcome(r.arrival, tuple(of_one)) for r, of_one in zip(requests, times, strict=True)]


def _asked(requests: Sequence[TraceRequest], settings: LoadSettings) -> list[Asked]:
    return [(r.arrival, r.prompt(settings.vocab_size, seed), r.output_tokens) for seed, r in enumerate(requests)]
