"""Plays a load on a server, which is running already or is started for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overfill.errors import InvalidRequest, Unavailable
from overfill.lab.bench.serve.load import Progress, run_load
from overfill.lab.bench.serve.targets import GrpcTarget, OpenAiTarget
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

if TYPE_CHECKING:
    from overfill.rpc.tls import ClientTls


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A server to measure.

    Attributes:
        name: Name in rows and tables.
        location: ``http(s)://…/v1``, ``grpc://HOST:PORT`` (or several, separated by commas), or ``vllm:PAIR``: vLLM's
            server with the pair's full model, which the benchmark starts. ``vllm`` alone has the pair ``default``.
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
        target = cls(name, location)
        if not (target.is_vllm or location.startswith(("http://", "https://", "grpc://"))):
            raise InvalidRequest(
                "target", f"{text!r} is not a target; use http://HOST:PORT/v1, grpc://HOST:PORT, vllm or vllm:PAIR"
            )
        return target

    @property
    def is_vllm(self) -> bool:
        """Whether the benchmark starts the server."""
        return self.location.partition(":")[0] == "vllm"


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Settings that all targets share.

    Attributes:
        vocab_size: Upper limit of the token ids in prompts, exclusive.
        model, key, extensions: Arguments of ``OpenAiTarget``.
        concurrency, timeout: Arguments of ``run_load``.
        stack_key, tls: API key and certificates for stacks over gRPC.
    """

    vocab_size: int
    model: str | None
    key: str | None
    extensions: bool
    concurrency: int | None
    timeout: float
    stack_key: str | None = None
    tls: ClientTls | None = None


def play_on(
    spec: TargetSpec, requests: Sequence[TraceRequest], settings: LoadSettings, progress: Progress
) -> list[Outcome]:
    """Plays requests on a server, after a warm-up. Returns their outcomes in the same order.

    Starts the server first, and stops it at the end, if it is vLLM's. Call it on the main thread only.

    Raises:
        Unavailable: The server does not answer the first requests.
        PeerFailed: vLLM's server does not start.
        InvalidRequest: vLLM is not installed.
    """
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    with ExitStack() as exits:
        location = spec.location
        if spec.is_vllm:
            location = exits.enter_context(_vllm(location.partition(":")[2] or "default", longest))
            settings = replace(settings, model=None, key=None, extensions=True)
        output = min(4, longest - 1)
        warm_up = asyncio.run(_play(location, [TraceRequest(0.0, min(64, longest - output), output)] * 2, settings))
        if not any(outcome.ok for outcome in warm_up):
            raise Unavailable(f"{spec.name} answers nothing: {warm_up[0].error}")
        return asyncio.run(_play(location, requests, settings, progress))


async def _play(
    location: str, requests: Sequence[TraceRequest], settings: LoadSettings, progress: Progress | None = None
) -> list[Outcome]:
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


def _target(location: str, settings: LoadSettings) -> OpenAiTarget | GrpcTarget:
    if location.startswith("grpc://"):
        return GrpcTarget(location.removeprefix("grpc://"), settings.tls, settings.stack_key)
    return OpenAiTarget(location, settings.model, settings.key, extensions=settings.extensions)


def _vllm(pair: str, max_model_len: int) -> AbstractContextManager[str]:
    # Imported here: they take seconds to import, and a load on servers does not need them.
    from overfill.lab.bench.engine.peers.environment import NOT_INSTALLED, python_of
    from overfill.lab.bench.engine.peers.vllm_server import vllm_server
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    python = python_of("vllm")
    if python is None:
        raise InvalidRequest("target", f"vllm: {NOT_INSTALLED}")
    return vllm_server(python, Pair.load(resolve_pair(pair)).full_path, max_model_len)
