"""Opens one server after the other, and plays a load on it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from overfill.errors import InvalidRequest, Unavailable
from overfill.lab.bench.serve.load import Progress, run_load
from overfill.lab.bench.serve.targets import GrpcTarget, OpenAiTarget
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

if TYPE_CHECKING:
    from overfill.lab.bench.serve.colocated import TimedRequest
    from overfill.model.manifest import Pair
    from overfill.rpc.tls import ClientTls

LOCAL_ENGINES = ("colocated", "openvino", "vllm")
"""Engines that the benchmark starts and stops itself.

``colocated`` is our engine in this process, with both halves of the pair. The others run the full model only:
``openvino`` is OpenVINO GenAI in another process, ``vllm`` is vLLM's server.
"""

_BATCH = 64
_MAX_NUM_BATCHED_TOKENS = 2048

Play = Callable[[Sequence[TraceRequest], Progress | None], list[Outcome]]
"""Plays requests on an open server. Returns their outcomes in the same order."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A server to measure.

    Attributes:
        name: Name in rows and tables.
        location: ``http(s)://…/v1``, ``grpc://HOST:PORT`` (or several, separated by commas), or one of
            ``LOCAL_ENGINES``, optionally with ``:PAIR``.
    """

    name: str
    location: str

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """Parses ``NAME=LOCATION`` or ``LOCATION``, which is then also the name.

        Raises:
            InvalidRequest: The location has none of the allowed forms.
        """
        name, separator, location = text.partition("=")
        if not separator:
            name, location = text, text
        if not (location.startswith(("http://", "https://", "grpc://")) or location.partition(":")[0] in LOCAL_ENGINES):
            raise InvalidRequest(
                "target",
                f"{text!r} is not a target; use http://HOST:PORT/v1, grpc://HOST:PORT, {' or '.join(LOCAL_ENGINES)}",
            )
        return cls(name, location)


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Settings that all targets share.

    Attributes:
        vocab_size: Upper limit of the token ids in prompts, exclusive.
        model, key, extensions: Arguments of ``OpenAiTarget``.
        concurrency, timeout: Arguments of ``run_load``.
        pair, threads: Model pair and CPU threads of the engines that the benchmark starts.
        stack_key, tls: API key and certificates for stacks over gRPC.
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
def open_target(spec: TargetSpec, max_model_len: int, settings: LoadSettings) -> Iterator[Play]:
    """Opens a server, starts it if it is a local engine, and warms it up. Call it on the main thread only.

    Args:
        max_model_len: Maximum tokens of a prompt and its answer.

    Raises:
        Unavailable: The server does not answer the first requests.
        PeerFailed: A local engine does not start.
        InvalidRequest: A local engine is not installed, or cannot run a closed loop.
    """
    kind, _, pair = spec.location.partition(":")
    if kind not in LOCAL_ENGINES:
        play = _of_server(spec.location, settings)
        _warm_up(spec, play, max_model_len)
        yield play
        return
    if settings.concurrency is not None and kind != "vllm":
        raise InvalidRequest(
            "concurrency", f"{kind} has no server and cannot run a closed loop; use --rate, or leave --concurrency out"
        )
    start = {"colocated": _colocated, "openvino": _openvino, "vllm": _vllm}[kind]
    with start(pair or settings.pair, max_model_len, settings) as play:
        _warm_up(spec, play, max_model_len)
        yield play


def _warm_up(spec: TargetSpec, play: Play, max_model_len: int) -> None:
    output = min(4, max_model_len - 1)
    found = play([TraceRequest(0.0, min(64, max_model_len - output), output)] * 2, None)
    if not any(outcome.ok for outcome in found):
        raise Unavailable(f"{spec.name} answers nothing: {found[0].error}")


def _of_server(location: str, settings: LoadSettings) -> Play:
    async def played(requests: Sequence[TraceRequest], progress: Progress | None) -> list[Outcome]:
        try:
            async with _target(location, settings) as target:
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


def _target(location: str, settings: LoadSettings) -> OpenAiTarget | GrpcTarget:
    if location.startswith("grpc://"):
        return GrpcTarget(location.removeprefix("grpc://"), settings.tls, settings.stack_key)
    return OpenAiTarget(location, settings.model, settings.key, extensions=settings.extensions)


# The functions below import torch themselves: it takes seconds to import, and a load on servers does not need it.


@contextmanager
def _vllm(pair: str, max_model_len: int, settings: LoadSettings) -> Iterator[Play]:
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
        max_model_len=max_model_len,
        max_num_seqs=_BATCH,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
    ) as url:
        yield _of_server(url, replace(settings, model=None, key=None, extensions=True))


@contextmanager
def _openvino(pair: str, max_model_len: int, settings: LoadSettings) -> Iterator[Play]:
    import torch

    from overfill.lab.bench.engine.overfill_engine import EngineWorkload
    from overfill.lab.bench.engine.peers.choose import Missing, PeerSettings, open_process

    with tempfile.TemporaryDirectory(prefix="overfill-bench-") as logs:
        peer = open_process(
            "openvino",
            PeerSettings(
                _loaded(pair),
                torch.bfloat16,
                torch.device("cpu"),
                settings.threads,
                EngineWorkload(_BATCH, max_model_len),
                _MAX_NUM_BATCHED_TOKENS,
                Path(logs),
                kv_bytes=4 << 30,
            ),
        )
        if isinstance(peer, Missing):
            raise InvalidRequest("target", f"openvino: {peer.hint}")
        with closing(peer):
            yield lambda requests, progress: _outcomes(requests, peer.serve(_timed_requests(requests, settings)))


@contextmanager
def _colocated(pair: str, max_model_len: int, settings: LoadSettings) -> Iterator[Play]:
    from overfill.lab.bench.serve.colocated import serve_colocated
    from overfill.pair.llm import LLM

    llm = LLM(
        pair,
        threads=settings.threads,
        max_model_len=max_model_len,
        max_num_seqs=_BATCH,
        max_num_batched_tokens=_MAX_NUM_BATCHED_TOKENS,
        prefix_cache=False,  # the same load may be played more than once
    )

    yield lambda requests, progress: _outcomes(
        requests, serve_colocated(llm, _timed_requests(requests, settings), progress)
    )


def _loaded(pair: str) -> Pair:
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    return Pair.load(resolve_pair(pair))


def _outcomes(requests: Sequence[TraceRequest], times: Sequence[Sequence[float]]) -> list[Outcome]:
    return [Outcome(r.arrival, tuple(of_one)) for r, of_one in zip(requests, times, strict=True)]


def _timed_requests(requests: Sequence[TraceRequest], settings: LoadSettings) -> list[TimedRequest]:
    return [(r.arrival, r.prompt(settings.vocab_size, seed), r.output_tokens) for seed, r in enumerate(requests)]
