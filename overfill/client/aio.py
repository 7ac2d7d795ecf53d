"""The SDK for asyncio: ``overfill.client.sync`` with awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from overfill.client import traces
from overfill.client.answers import Accepted, Answer, AnswerBuilder, Delta
from overfill.client.attempts import Attempts
from overfill.client.requests import (
    Message,
    Options,
    Prompt,
    authorization,
    build_chat,
    build_request,
    check_messages,
    check_timeout,
    sample_options,
    split_addresses,
)
from overfill.client.status import Model, StackStatus
from overfill.errors import InvalidRequest, OverfillError, RequestCancelled
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import ClientTls
from overfill.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

StartCall = Callable[[str, float | None], Any]
StartGenerate = Callable[[str, inference_pb2.GenerateRequest, float | None], Any]


class AsyncStream(AsyncIterator[Delta]):
    """An answer as it is written; iterate for deltas. Leaving it as a context manager cancels the rest."""

    def __init__(
        self,
        start: StartGenerate,
        attempts: Attempts,
        builder: AnswerBuilder,
        span: traces.RequestSpan | None = None,
    ) -> None:
        self._span = span
        self._start = start
        self._attempts = attempts
        self._builder = builder
        self._cancelled = False
        self._call = self._begin()

    @property
    def accepted(self) -> Accepted | None:
        """Request id and seed, once the router has taken the request."""
        return self._builder.accepted

    @property
    def answer(self) -> Answer:
        """The whole answer, after the last delta. Raises InternalError before that."""
        return self._builder.answer()

    async def __anext__(self) -> Delta:
        """Raises any OverfillError; its ``produced`` is what there is of the answer."""
        if self._span is None:
            return await self._next()
        try:
            return await self._next()
        except StopAsyncIteration:
            self._span.end()
            raise
        except OverfillError as error:
            self._span.end(error)
            raise

    async def _next(self) -> Delta:
        while True:
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                # gRPC raises this for its own cancelled call as well as for the awaiting task's cancellation.
                if self._cancelled and not _task_is_cancelled():
                    raise self._builder.failed(RequestCancelled("the request was cancelled")) from None
                raise
            except grpc.RpcError as error:
                if self._builder.complete:  # lost after its last word
                    raise StopAsyncIteration from None
                failure = RequestCancelled("the request was cancelled") if self._cancelled else self._go_on(error)
                if failure is not None:
                    raise self._builder.failed(failure) from None
                continue
            if response is grpc.aio.EOF:  # type: ignore[attr-defined]
                self._builder.answer()
                raise StopAsyncIteration
            try:
                delta = self._builder.add(response)
            except OverfillError as error:
                self.cancel()
                raise self._builder.failed(error) from None
            if delta is not None:
                self._attempts.progressed()
                return delta
            self._attempts.taken()

    def _go_on(self, error: grpc.RpcError) -> OverfillError | None:
        """Asks for what is missing, if there is anyone to ask; else what to raise."""
        failure = self._attempts.failed(error)
        if failure is not None:
            return failure
        try:
            self._call = self._begin()
        except RequestCancelled as closed:
            return closed
        return None

    def _begin(self) -> Any:
        """The call that asks for the answer, or for what is missing of it after a router was lost."""
        return self._start(self._attempts.address, self._builder.request(), self._attempts.timeout())

    def cancel(self) -> None:
        """Gives the request up; iterating further raises RequestCancelled. Does nothing after the end."""
        if self._span is not None:
            self._span.end()
        self._cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """Talks to a router from one event loop; close it, or use it as an async context manager.

    Args:
        address: ``host:port`` or ``unix:path``, or several separated by commas: a request goes to the first
            that can be reached, and goes on at the next, token by token, when that one is lost.
        tls: certificates; None talks in the clear.
        api_key: shown to the router; None shows none.
    """

    def __init__(
        self, address: str = "127.0.0.1:7600", *, tls: ClientTls | None = None, api_key: str | None = None
    ) -> None:
        self._addresses = split_addresses(address)
        self._metadata = authorization(api_key)
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = False

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """A whole answer; arguments and errors as in ``Client.generate``."""
        stream = self.stream(prompt, **options)
        async with stream:
            async for _ in stream:
                pass
            return stream.answer

    async def chat(self, messages: Sequence[Message | Mapping[str, Any]], **options: Unpack[Options]) -> Answer:
        """The whole next turn of a conversation; as ``generate`` with a list of messages."""
        check_messages(messages)
        return await self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """As ``generate``, but token by token."""
        timeout = options.get("timeout")
        check_timeout(timeout)
        span = traces.begin()

        def start(address: str, request: inference_pb2.GenerateRequest, timeout: float | None) -> Any:
            if self._closed:
                raise RequestCancelled("the client is closed")
            stub = inference_pb2_grpc.InferenceStub(self._channel(address))
            return stub.Generate(request, timeout=timeout, metadata=traces.joined(self._metadata, span))

        builder = AnswerBuilder(build_request(prompt, options))
        return AsyncStream(start, Attempts(self._addresses, timeout), builder, span)

    async def samples(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Answer]:
        """``n`` answers to one prompt, computed at the same time; with one seed, the same ``n`` every time.

        Raises:
            OverfillError: any of its kinds.
        """
        each = sample_options(n, options)
        return list(await asyncio.gather(*[self.generate(prompt, **one) for one in each]))

    async def tokenize(
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]],
        *,
        special_tokens: bool = True,
        timeout: float | None = 10.0,
    ) -> list[int]:
        """Token ids of text, with the special tokens that the tokenizer adds by itself, or of a chat."""
        request = inference_pb2.TokenizeRequest(no_special_tokens=not special_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(build_chat(prompt))

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channel(address))
            return stub.Tokenize(request, timeout=timeout, metadata=self._metadata)

        return list((await self._unary(start, timeout)).ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = 10.0) -> str:
        """Text of token ids; special tokens have none."""
        request = inference_pb2.DetokenizeRequest(ids=token_ids)

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channel(address))
            return stub.Detokenize(request, timeout=timeout, metadata=self._metadata)

        return str((await self._unary(start, timeout)).text)

    async def models(self, *, timeout: float | None = 10.0) -> list[Model]:
        """The models that the router serves."""

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channel(address))
            return stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout, metadata=self._metadata)

        return [Model.from_proto(model) for model in (await self._unary(start, timeout)).models]

    async def status(self, *, timeout: float | None = 10.0) -> StackStatus:
        """The router and every worker it knows; a worker's own address answers for itself."""

        def start(address: str, timeout: float | None) -> Any:
            stub = admin_pb2_grpc.AdminStub(self._channel(address))
            return stub.Status(admin_pb2.StatusRequest(), timeout=timeout, metadata=self._metadata)

        return StackStatus.from_proto(await self._unary(start, timeout))

    async def drain(self, worker_id: str, *, timeout: float | None = 10.0) -> None:
        """Has a worker take nothing new and leave once its requests have finished or moved to another.

        Returns when the worker has begun; ``status`` lists it until it has left.

        Raises:
            InvalidRequest: the router knows no such worker; those that it knows are named.
            Unavailable: the worker does not answer.
        """
        if not worker_id:
            raise InvalidRequest("worker_id", "is empty")
        request = admin_pb2.DrainRequest(worker_id=worker_id)

        def start(address: str, timeout: float | None) -> Any:
            return admin_pb2_grpc.AdminStub(self._channel(address)).Drain(
                request, timeout=timeout, metadata=self._metadata
            )

        await self._unary(start, timeout)

    async def close(self) -> None:
        """Cancels what runs and closes the connections."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        # Not in the constructor: a channel belongs to the event loop that is running when it is made.
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._tls)
        return self._channels[address]

    async def _unary(self, start: StartCall, timeout: float | None) -> Any:
        check_timeout(timeout)
        attempts = Attempts(self._addresses, timeout, shared=True)
        while True:
            try:
                return await start(attempts.address, attempts.timeout())
            except grpc.RpcError as error:
                failure = attempts.failed(error)
                if failure is not None:
                    raise failure from None


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
