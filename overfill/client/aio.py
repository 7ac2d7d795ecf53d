"""The SDK for asyncio. It calls and waits; the other modules of this package know requests, answers and addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from overfill.client import traces
from overfill.client.answers import Accepted, Answer, AnswerBuilder, Delta
from overfill.client.concurrency import AsyncChannels, AsyncResponses, CallCancelled, async_response, run_as_tasks
from overfill.client.failover import AddressFailover
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
    task_options,
)
from overfill.errors import InvalidRequest, OverfillError, RequestCancelled
from overfill.rpc.addresses import split_addresses
from overfill.rpc.stack_status import AdapterChange, Model, RolloutStatus, StackStatus
from overfill.rpc.tls import ClientTls
from overfill.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

StartCall = Callable[[str, float | None], Any]
StartGenerate = Callable[[str, inference_pb2.GenerateRequest, float | None], Any]


class AsyncStream(AsyncIterator[Delta]):
    """One answer while a model writes it, as ``AsyncClient.stream`` returns it.

    Iterate over it for deltas (``Delta``). Leaving its ``with`` block, or dropping the object, cancels the
    rest of the answer. Each step of the iteration may raise any OverfillError, whose ``produced`` holds the part of the
    answer that has arrived.
    """

    def __init__(
        self,
        start: StartGenerate,
        failover: AddressFailover,
        builder: AnswerBuilder,
        span: traces.RequestSpan | None = None,
    ) -> None:
        self._span = span
        self._start = start
        self._failover = failover
        self._builder = builder
        self._cancelled = False
        self._responses = self._call()

    @property
    def accepted(self) -> Accepted | None:
        """Request id and seed; None until a router has accepted the request."""
        return self._builder.accepted

    @property
    def answer(self) -> Answer:
        """The whole answer, after the last delta.

        Raises:
            InternalError: the answer is not complete.
        """
        return self._builder.answer()

    async def __anext__(self) -> Delta:
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
                response = await self._responses.read()
            except grpc.RpcError as error:
                if self._builder.complete:  # the connection broke after the last message
                    raise StopAsyncIteration from None
                failure = RequestCancelled("the request was cancelled") if self._cancelled else self._fail_over(error)
                if failure is not None:
                    raise self._builder.failed(failure) from None
                continue
            if response is None:
                self._builder.answer()
                raise StopAsyncIteration
            try:
                delta = self._builder.add(response)
            except OverfillError as error:
                self.cancel()
                raise self._builder.failed(error) from None
            if delta is not None:
                self._failover.progressed()
                return delta
            self._failover.accepted()

    def _fail_over(self, error: grpc.RpcError) -> OverfillError | None:
        """Asks the next router for the rest of the answer, and returns None; or returns the error to raise."""
        if isinstance(error, CallCancelled):
            return RequestCancelled("the client is closed")
        failure = self._failover.next_address_or_error(error, self._builder.has_tokens)
        if failure is not None:
            return failure
        try:
            self._responses = self._call()
        except RequestCancelled as closed:
            return closed
        if self._cancelled:  # by another thread, while the call was made
            self._responses.cancel()
            return RequestCancelled("the request was cancelled")
        return None

    def _call(self) -> AsyncResponses:
        """Calls the current router for the answer, or for the rest of it after another router was lost."""
        call = self._start(self._failover.address, self._builder.request(), self._failover.timeout())
        return AsyncResponses(call)

    def cancel(self) -> None:
        """Cancels the request: the next iteration raises RequestCancelled. After the answer, does nothing."""
        if self._span is not None:
            self._span.end()
        self._cancelled = True
        self._responses.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A client of one router or several, for one event loop. Close it, or use it as an async context manager.

    Examples:
        >>> async with AsyncClient("127.0.0.1:7600") as client:  # doctest: +SKIP
        ...     answer = await client.chat([Message("user", "Hello!")])
        ...     print(answer.text)

    Args:
        address: ``host:port`` or ``unix:path``, or several of them separated by commas. A request goes to the first
            router that can be reached. When that router is lost, the next one continues the answer token by token.
        tls: Certificates; None means connections without TLS.
        api_key: Key that is sent with every request; None means no key.
    """

    def __init__(
        self, address: str = "127.0.0.1:7600", *, tls: ClientTls | None = None, api_key: str | None = None
    ) -> None:
        self._addresses = split_addresses(address)
        self._metadata = authorization(api_key)
        self._channels = AsyncChannels(tls)
        self._closed = False

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Answers ``prompt`` and returns the whole answer.

        Args:
            prompt: Text, which is tokenized unchanged; token ids; or a chat as a list of messages.
            **options: Options of the request, by name.

        Raises:
            OverfillError: any of its subclasses; ``produced`` holds the part of the answer that has arrived.
            TypeError: there is no such option.
        """
        return await _whole(self.stream(prompt, **options))

    async def chat(self, messages: Sequence[Message | Mapping[str, Any]], **options: Unpack[Options]) -> Answer:
        """Answers a conversation and returns its whole next turn; the same as ``generate`` with a list of messages.

        Args:
            messages: Turns so far, as ``Message`` or as mappings with its fields.
            **options: Options of the request, by name.

        Raises:
            InvalidRequest: ``messages`` is text.
            OverfillError: as ``generate``.
        """
        check_messages(messages)
        return await self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Answers ``prompt`` as a stream of deltas. The call starts the request and does not wait.

        Args:
            prompt: As in ``generate``.
            **options: Options of the request, by name.

        Raises:
            InvalidRequest: an argument is wrong. The stream itself raises all other errors, as ``generate`` does.
            TypeError: there is no such option.
        """
        timeout = options.get("timeout")
        check_timeout(timeout)
        span = traces.start_span()

        def start(address: str, request: inference_pb2.GenerateRequest, timeout: float | None) -> Any:
            if self._closed:
                raise RequestCancelled("the client is closed")
            stub = inference_pb2_grpc.InferenceStub(self._channels[address])
            return stub.Generate(request, timeout=timeout, metadata=traces.with_span(self._metadata, span))

        builder = AnswerBuilder(build_request(prompt, options))
        return AsyncStream(start, AddressFailover(self._addresses, timeout), builder, span)

    async def samples(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Answer]:
        """Answers one prompt ``n`` times, concurrently and differently. A seed repeats the ``n`` answers, best effort.

        Args:
            prompt: As in ``generate``.
            n: Number of answers, at least 1.
            **options: Options of each request, by name. ``sample_index`` is that of the first answer.

        Raises:
            OverfillError: as ``generate``, of the first request that fails; the others are cancelled at once.
        """
        return await run_as_tasks(_whole, [self.stream(prompt, **one) for one in sample_options(n, options)])

    async def fan_out(
        self,
        prompt: Prompt,
        tasks: Sequence[str],
        **options: Unpack[Options],
    ) -> list[Answer | OverfillError]:
        """Has several tasks answer one prompt, concurrently. They share the KV that the full model computes of it.

        Returns the answers in the order of ``tasks``. Where a task fails, its error is in the list, and the other tasks
        go on.

        Args:
            prompt: As in ``generate``.
            tasks: Names of the tiers and adapters that write an answer each.
            **options: Options of each request, by name. All requests belong to one session, by default one of their
                own. ``timeout`` is the limit for all answers together.

        Raises:
            InvalidRequest: an argument is wrong.
            TypeError: there is no such option.
        """
        streams = [self.stream(prompt, **one) for one in task_options(tasks, options)]
        return await run_as_tasks(_whole_or_error, streams)

    async def tokenize(
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]],
        *,
        special_tokens: bool = True,
        timeout: float | None = 10.0,
    ) -> list[int]:
        """Returns the token ids of a text or a chat, as ``generate`` would compute them.

        Args:
            prompt: Text, or a chat as a list of messages, to which the chat template is applied.
            special_tokens: Whether a text gets the special tokens that the tokenizer adds by itself.
            timeout: Seconds for the call; None means no limit.
        """
        request = inference_pb2.TokenizeRequest(no_special_tokens=not special_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(build_chat(prompt))

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channels[address])
            return stub.Tokenize(request, timeout=timeout, metadata=self._metadata)

        response = await self._unary(start, timeout)
        return list(response.ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = 10.0) -> str:
        """Returns the text of token ids; special tokens have no text.

        Args:
            token_ids: Token ids of the served model.
            timeout: Seconds for the call; None means no limit.
        """
        request = inference_pb2.DetokenizeRequest(ids=token_ids)

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channels[address])
            return stub.Detokenize(request, timeout=timeout, metadata=self._metadata)

        response = await self._unary(start, timeout)
        return str(response.text)

    async def models(self, *, timeout: float | None = 10.0) -> list[Model]:
        """Returns the models that the router serves, one for each name.

        Args:
            timeout: Seconds for the call; None means no limit.
        """

        def start(address: str, timeout: float | None) -> Any:
            stub = inference_pb2_grpc.InferenceStub(self._channels[address])
            return stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout, metadata=self._metadata)

        response = await self._unary(start, timeout)
        return [Model.from_proto(model) for model in response.models]

    async def status(self, *, timeout: float | None = 10.0) -> StackStatus:
        """Returns the status of the router and of every worker it knows; at a worker's own address, of that worker.

        Args:
            timeout: Seconds for the call; None means no limit.
        """
        reached = ""

        def start(address: str, timeout: float | None) -> Any:
            nonlocal reached
            reached = address
            stub = admin_pb2_grpc.AdminStub(self._channels[address])
            return stub.Status(admin_pb2.StatusRequest(), timeout=timeout, metadata=self._metadata)

        message = await self._unary(start, timeout)
        return StackStatus.from_proto(message).reached_at(reached)

    async def drain(self, worker_id: str, *, timeout: float | None = 10.0) -> None:
        """Drains a worker: it accepts no new requests, and exits once its requests have finished or moved.

        Returns as soon as the worker drains; ``status`` lists the worker until it has left.

        Args:
            worker_id: Id of the worker, as ``status`` lists it.
            timeout: Seconds for the call; None means no limit.

        Raises:
            InvalidRequest: the router knows no worker of this id; the message names those that it knows.
            Unavailable: the worker does not answer.
        """
        if not worker_id:
            raise InvalidRequest("worker_id", "is empty; give an id that `status` lists")
        await self._administer("Drain", admin_pb2.DrainRequest(worker_id=worker_id), timeout)

    async def load_adapter(self, name: str, *, timeout: float | None = 90.0) -> list[AdapterChange]:
        """Has all decode workers load an adapter from their folder of adapters, unless they have loaded it.

        Returns what each decode worker that may have the adapter has done.

        Args:
            name: Name of the adapter's folder.
            timeout: Seconds for the call; None means no limit.

        Raises:
            OverfillError: no worker has loaded it; the first worker's reason.
        """
        changed = await self._administer("LoadAdapter", admin_pb2.LoadAdapterRequest(name=name), timeout)
        return [AdapterChange.from_proto(change) for change in changed.workers]

    async def unload_adapter(self, name: str, *, timeout: float | None = 90.0) -> list[AdapterChange]:
        """Has all decode workers unload an adapter. They finish its answers and refuse new ones.

        Returns what each decode worker that may have the adapter has done.

        Args:
            name: Name of the adapter.
            timeout: Seconds for the call; None means no limit.

        Raises:
            OverfillError: no worker has unloaded it; the first worker's reason.
        """
        changed = await self._administer("UnloadAdapter", admin_pb2.UnloadAdapterRequest(name=name), timeout)
        return [AdapterChange.from_proto(change) for change in changed.workers]

    async def rollout(self, *, timeout: float | None = 10.0) -> RolloutStatus:
        """Returns the revisions of the stack, with their shares of new conversations.

        Args:
            timeout: Seconds for the call; None means no limit.
        """
        return await self._change_rollout(admin_pb2.ChangeRolloutRequest(), timeout)

    async def set_rollout(
        self, revision: str, percent: float, *, over: float = 0.0, timeout: float | None = 10.0
    ) -> RolloutStatus:
        """Sets the share of new conversations that a revision gets; the other revision gets the rest.

        Returns the status after the change. The other routers learn of it within seconds.

        Args:
            revision: Name of one of the stack's two revisions; empty for one without a name.
            percent: Its share, 0 to 100.
            over: Seconds in which the share gets there evenly, at most 7 days; 0 means at once.
            timeout: Seconds for the call; None means no limit.

        Raises:
            InvalidRequest: an argument is out of bounds, or the stack has no such revision.
            Incompatible: the router serves one revision only.
        """
        share = admin_pb2.SetShare(revision=revision, percent=percent, over_seconds=over)
        return await self._change_rollout(admin_pb2.ChangeRolloutRequest(set=share), timeout)

    async def pause_rollout(self, *, timeout: float | None = 10.0) -> RolloutStatus:
        """Stops a change before its end: the share stays as it is now. Returns the status after that.

        Args:
            timeout: Seconds for the call; None means no limit.

        Raises:
            Incompatible: the router serves one revision only.
        """
        return await self._change_rollout(admin_pb2.ChangeRolloutRequest(pause=True), timeout)

    async def undo_rollout(self, *, timeout: float | None = 10.0) -> RolloutStatus:
        """Gives all new conversations to the old revision at once. Returns the status after that.

        Args:
            timeout: Seconds for the call; None means no limit.

        Raises:
            Incompatible: the router serves one revision only.
        """
        return await self._change_rollout(admin_pb2.ChangeRolloutRequest(undo=True), timeout)

    async def _change_rollout(self, request: admin_pb2.ChangeRolloutRequest, timeout: float | None) -> RolloutStatus:
        return RolloutStatus.from_proto(await self._administer("ChangeRollout", request, timeout))

    async def _administer(self, rpc: str, request: Any, timeout: float | None) -> Any:
        """Calls an RPC of the Admin service, and returns its answer."""

        def start(address: str, timeout: float | None) -> Any:
            stub = admin_pb2_grpc.AdminStub(self._channels[address])
            return getattr(stub, rpc)(request, timeout=timeout, metadata=self._metadata)

        return await self._unary(start, timeout)

    async def close(self) -> None:
        """Cancels running requests and closes all connections."""
        self._closed = True
        await self._channels.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _unary(self, start: StartCall, timeout: float | None) -> Any:
        check_timeout(timeout)
        failover = AddressFailover(self._addresses, timeout, shared=True)
        while True:
            try:
                return await async_response(start(failover.address, failover.timeout()))
            except CallCancelled:
                raise RequestCancelled("the client is closed") from None
            except grpc.RpcError as error:
                if self._closed:
                    raise RequestCancelled("the client is closed") from None
                failure = failover.next_address_or_error(error)
                if failure is not None:
                    raise failure from None


async def _whole(stream: AsyncStream) -> Answer:
    async with stream:
        async for _ in stream:
            pass
        return stream.answer


async def _whole_or_error(stream: AsyncStream) -> Answer | OverfillError:
    try:
        return await _whole(stream)
    except OverfillError as error:
        return error
