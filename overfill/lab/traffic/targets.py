"""Servers under load: any OpenAI endpoint over HTTP, and a stack of ours over gRPC."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import aiohttp

from overfill.client import AsyncClient, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.traffic import openai
from overfill.lab.traffic.openai import Message
from overfill.lab.traffic.outcome import RequestFailed
from overfill.lab.traffic.play import ReceivedAnswer
from overfill.rpc.tls import ClientTls

_MODELS_TIMEOUT = aiohttp.ClientTimeout(total=30.0)


class OpenAiTarget:
    """Streams from an OpenAI endpoint: ``/completions`` of token ids, and ``/chat/completions`` of messages.

    Args:
        url: URL of the endpoint, including ``/v1``.
        model: Name of the model. None means the first that the endpoint lists.
        key: API key.
        tls: Certificates for https; ``name`` is not used. None trusts the system's.
        extensions: Use two extensions that vLLM and our endpoint have, and others may refuse: answers of full length
            (``ignore_eos``), and a token count in every message. Without them, every message counts as one token until
            the usage at the end corrects the number.
        own: Fields of every request that only our endpoint has: ``fallback`` and ``allow_brownout``.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        tls: ClientTls | None = None,
        extensions: bool = True,
        **own: Any,
    ) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._tls = tls
        self._extensions = extensions
        self._own = own
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def __aenter__(self) -> Self:
        # No limits here: ``run_load`` limits requests and time.
        connector = aiohttp.TCPConnector(limit=0, ssl=_context(self._tls))
        self._session = aiohttp.ClientSession(
            headers=self._headers, connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        )
        try:
            self._model = self._model or str((await self.models())[0]["id"])
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def stream(
        self, prompt: Sequence[int] | Sequence[Message], max_tokens: int, received: ReceivedAnswer, tier: str = ""
    ) -> AsyncIterator[int]:
        """As of ``Target``. Only our endpoint tells the timing and the tier."""
        body = openai.completion_body(
            self._model, prompt, max_tokens, extensions=self._extensions, tier=tier, **self._own
        )
        events, path = openai.CompletionEvents(), "completions" if "prompt" in body else "chat/completions"
        try:
            async with self._session.post(f"{self._url}/{path}", json=body) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {openai.error_message(await response.text())}")
                async for line in response.content:
                    yield events.push(line)
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        events.end()
        received.timing, received.tier, received.text = events.timing, events.tier, events.text

    async def models(self) -> list[dict[str, Any]]:
        """Returns what the endpoint says about its models, at least one. Raises RequestFailed if it lists none."""
        try:
            async with self._session.get(f"{self._url}/models", timeout=_MODELS_TIMEOUT) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {openai.error_message(await response.text())}")
                models: list[dict[str, Any]] = (await response.json())["data"]
                models[0]["id"]
                return models
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
            raise RequestFailed(f"{self._url}/models does not answer as an OpenAI endpoint does: {error!r}") from error


class GrpcTarget:
    """Streams from a stack of ours over gRPC.

    Args:
        tls, key: Those of ``AsyncClient``.
        own: Options of every request: ``fallback`` and ``allow_brownout``.
    """

    def __init__(self, address: str, tls: ClientTls | None = None, key: str | None = None, **own: Any) -> None:
        self._own = own
        try:
            self._client = AsyncClient(address, tls=tls, api_key=key)
        except ValueError as error:
            raise RequestFailed(str(error)) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.close()

    async def stream(
        self, prompt: Sequence[int], max_tokens: int, received: ReceivedAnswer, tier: str = ""
    ) -> AsyncIterator[int]:
        """As of ``Target``."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        tokens = 0
        try:
            async with self._client.stream(list(prompt), sampling=sampling, tier=tier, **self._own) as stream:
                async for delta in stream:
                    tokens += len(delta.token_ids)
                    yield tokens
                received.timing, received.tier = stream.answer.timing, stream.answer.tier
        except OverfillError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error


def _context(tls: ClientTls | None) -> ssl.SSLContext | bool:
    """Returns how HTTPS checks the server and shows a certificate. True means as usual."""
    if tls is None:
        return True
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:
        raise RequestFailed(f"the TLS files {tls.ca}, {tls.cert} and {tls.key} cannot be used: {error}") from error
    return context
