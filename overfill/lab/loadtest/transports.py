"""Transports of a load test: our gRPC protocol, and OpenAI endpoints. Calls block; gevent makes them yield."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter

from overfill.client import Client, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.loadtest.measure import Reported
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic import openai
from overfill.lab.traffic.outcome import RequestFailed
from overfill.rpc.tls import ClientTls

_CONNECT_SECONDS = 10.0
_CONNECTIONS = 1000
"""Maximum connections that are kept open for later requests."""


class GrpcTransport:
    """Sends requests to a stack over gRPC. Has its own connections."""

    def __init__(self, plan: LoadPlan) -> None:
        ca, cert, key = (None if name is None else Path(name) for name in (plan.tls_ca, plan.tls_cert, plan.tls_key))
        tls = ClientTls(ca, cert, key, plan.tls_name) if ca or cert or key else None
        self._fallback, self._allow_brownout = plan.fallback, plan.allow_brownout or None
        self._client = Client(plan.address, tls=tls, api_key=plan.api_key)

    def ask(
        self, prompt: Sequence[int], max_tokens: int, timeout: float, on_tokens: Callable[[int], None], tier: str
    ) -> Reported:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        tokens = 0
        try:
            with self._client.stream(
                list(prompt),
                sampling=sampling,
                timeout=timeout,
                tier=tier,
                fallback=self._fallback,
                allow_brownout=self._allow_brownout,
            ) as stream:
                for delta in stream:
                    tokens += len(delta.token_ids)
                    on_tokens(tokens)
                return Reported(stream.answer.timing, stream.answer.tier)
        except OverfillError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._client.close()


class OpenAiTransport:
    """Sends requests to ``/completions`` of an OpenAI endpoint and streams the answers."""

    def __init__(self, plan: LoadPlan) -> None:
        self._url = plan.target.rstrip("/")
        self._model = plan.model
        self._own = {"fallback": plan.fallback, "allow_brownout": plan.allow_brownout or None}
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=_CONNECTIONS))
        if plan.tls_ca is not None:
            self._session.verify = plan.tls_ca
        if plan.tls_cert is not None:
            self._session.cert = plan.tls_cert if plan.tls_key is None else (plan.tls_cert, plan.tls_key)
        if plan.api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {plan.api_key}"

    def ask(
        self, prompt: Sequence[int], max_tokens: int, timeout: float, on_tokens: Callable[[int], None], tier: str
    ) -> Reported:
        deadline = time.monotonic() + timeout
        events = openai.CompletionEvents()
        try:
            body = openai.completion_body(self._name(), prompt, max_tokens, extensions=True, tier=tier, **self._own)
            with self._session.post(
                f"{self._url}/completions", json=body, stream=True, timeout=(_CONNECT_SECONDS, timeout)
            ) as response:
                if response.status_code != 200:
                    raise RequestFailed(f"HTTP {response.status_code}: {openai.error_message(response.text)}")
                for line in _lines(response.iter_content(None)):
                    on_tokens(events.push(line))
                    if time.monotonic() > deadline:
                        raise RequestFailed(f"not finished after {timeout:g} s")
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        events.end()
        return Reported(events.timing, events.tier)

    def close(self) -> None:
        self._session.close()

    def _name(self) -> str:
        if self._model is None:
            with self._session.get(f"{self._url}/models", timeout=_CONNECT_SECONDS) as response:
                if response.status_code != 200:
                    raise RequestFailed(f"HTTP {response.status_code}: {openai.error_message(response.text)}")
                self._model = str(response.json()["data"][0]["id"])
        return self._model


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields each line as soon as it is complete, independent of the chunks' boundaries."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
