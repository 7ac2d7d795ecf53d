"""Servers under load: any OpenAI endpoint over HTTP, and a stack of ours over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp

from overfill.client import AsyncClient, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.traffic import openai
from overfill.lab.traffic.outcome import RequestFailed
from overfill.rpc.tls import ClientTls


@dataclass(slots=True)
class ReceivedAnswer:
    """What one answer brings besides the times of its tokens. A target fills it while it streams the answer.

    Attributes:
        token_ids: the answer's tokens.
        prompt_tokens, cached_tokens: tokens of the prompt, and those that no worker computed for this request.
        peer_tokens, disk_tokens: parts of ``cached_tokens`` that came from another worker and from disk.
    """

    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    peer_tokens: int = 0
    disk_tokens: int = 0


class OpenAiTarget:
    """Streams ``/completions`` of an OpenAI endpoint. Prompts are token ids.

    Args:
        url: URL of the endpoint, including ``/v1``.
        model: Name of the model. None means the first that the endpoint lists.
        key: API key.
        extensions: Use two extensions that vLLM and our endpoint have, and others may refuse: answers of full length
            (``ignore_eos``), and a token count in every message. Without them, every message counts as one token until
            the usage at the end corrects the number.
    """

    def __init__(self, url: str, model: str | None = None, key: str | None = None, *, extensions: bool = True) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._extensions = extensions
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No limits here: ``run_load`` limits requests and time.
        self._session = aiohttp.ClientSession(
            headers=self._headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        if self._model is None:
            try:
                self._model = await self._first_model(self._session)
            except BaseException:
                await self._session.close()
                raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(
        self, prompt: Sequence[int], max_tokens: int, received: ReceivedAnswer | None = None
    ) -> AsyncIterator[int]:
        """As of ``Target``. Only vLLM's server fills ``received``: ours sends token ids over gRPC alone."""
        asks = {} if received is None else {"return_token_ids": True}
        body = openai.completion_body(self._model, prompt, max_tokens, extensions=self._extensions, **asks)
        if self._session is None:
            raise RequestFailed("the target is not open")
        events = openai.CompletionEvents()
        try:
            async with self._session.post(f"{self._url}/completions", json=body) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {openai.error_message(await response.text())}")
                async for line in response.content:
                    yield events.push(line)
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        events.end()
        if received is not None:
            received.token_ids = events.token_ids
            received.prompt_tokens, received.cached_tokens = events.prompt_tokens, events.cached_tokens

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        try:
            async with session.get(f"{self._url}/models") as response:
                return str((await response.json())["data"][0]["id"])
        except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestFailed(f"{self._url}/models does not answer as an OpenAI endpoint does: {error!r}") from error


class GrpcTarget:
    """Streams from a stack of ours over gRPC. ``tls`` and ``key`` are those of ``AsyncClient``."""

    def __init__(self, address: str, tls: ClientTls | None = None, key: str | None = None) -> None:
        self._address, self._tls, self._key = address, tls, key
        self._client: AsyncClient | None = None

    async def __aenter__(self) -> Self:
        try:
            self._client = AsyncClient(self._address, tls=self._tls, api_key=self._key)
        except ValueError as error:
            raise RequestFailed(str(error)) from error
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def stream(
        self, prompt: Sequence[int], max_tokens: int, received: ReceivedAnswer | None = None
    ) -> AsyncIterator[int]:
        """As of ``Target``; fills ``received``."""
        if self._client is None:
            raise RequestFailed("the target is not open")
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        tokens = 0
        try:
            async with self._client.stream(list(prompt), sampling=sampling) as stream:
                async for delta in stream:
                    tokens += len(delta.token_ids)
                    yield tokens
                answer = stream.answer
        except OverfillError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        if received is not None:
            usage = answer.usage
            received.token_ids = list(answer.token_ids)
            received.prompt_tokens, received.cached_tokens = usage.prompt_tokens, usage.cached_tokens
            received.peer_tokens = usage.peer_tokens
            received.disk_tokens = usage.disk_tokens
