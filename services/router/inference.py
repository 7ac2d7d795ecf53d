"""The public API over gRPC: text in, text out. A ``RequestHandler`` does everything but the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from overfill.api.keys import ApiKey
from overfill.errors import DeadlineExceeded
from overfill.routing.answer import AnswerDelta
from overfill.rpc import shares
from overfill.rpc.access import caller
from overfill.rpc.interceptors import Context
from overfill.rpc.shared_timeout import SharedTimeout
from overfill.v1 import inference_pb2, inference_pb2_grpc
from services.router.limits import STALLED_TIMEOUT
from services.router.revisions import Revisions

_Response = inference_pb2.GenerateResponse


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves Inference. It raises OverfillErrors, which an interceptor maps to gRPC status."""

    def __init__(self, revisions: Revisions) -> None:
        self._revisions = revisions
        self._writes = SharedTimeout()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        received = asyncio.get_running_loop().time()
        caller, handler = _caller(), self._revisions.main
        with handler.requests.hold_quota(caller) as hold, handler.statistics.refusing(hold):
            handler = self._revisions.choose(request, caller)
            checked = await handler.check(request, hold, received, context.time_remaining())
            answer = handler.start(checked, hold)
        try:
            with answer:
                # Without it, a stall of the first message leaves gRPC unable to send a status.
                await context.send_initial_metadata(())
                identity = partial(handler.tiers.identity, job=checked)
                answer.accepted.identity.CopyFrom(identity(answer.accepted.tier))
                await self._write(context, _Response(accepted=answer.accepted))
                last, first = None, True
                while (delta := await answer.next()) is not None:
                    if delta.first_index and answer.complete:
                        last = delta  # it shares a message with the end, which is known
                    else:
                        response = _Response()
                        _fill(response.delta, delta, identity)
                        if first:
                            response.delta.cached_tokens, first = answer.cached_tokens, False
                        await self._write(context, response)
                if last is not None:
                    if answer.rest is not None:
                        last.extend(answer.rest)
                    answer.finished.rest.Clear()  # it is in ``last``
                    _fill(answer.finished.rest, last, identity)
                await self._write(context, _Response(finished=answer.finished))
        except TimeoutError:
            raise DeadlineExceeded(f"the client has read nothing for {STALLED_TIMEOUT:g} s") from None

    async def _write(self, context: Context, response: _Response) -> None:
        """Sends a message. Raises TimeoutError if the client reads nothing; its keepalive cannot tell."""
        try:
            await self._writes.wait(context.write(response), STALLED_TIMEOUT)
        except TimeoutError:
            shares.current.get().give_up(response.ByteSize())
            raise

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        tiers = self._revisions.main.tiers
        key = _caller()
        return inference_pb2.ListModelsResponse(models=[tiers.describe(name, key) for name in tiers.listed(key)])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        handler = self._revisions.main
        with handler.requests.hold_quota(_caller()) as hold:
            ids = await handler.tokenize(request, hold)
        return inference_pb2.TokenizeResponse(ids=ids, max_model_len=handler.tiers.max_model_len())

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        handler = self._revisions.main
        with handler.requests.hold_quota(_caller()) as hold:
            return inference_pb2.DetokenizeResponse(text=await handler.detokenize(request, hold))


def _fill(
    message: inference_pb2.Delta, delta: AnswerDelta, identity: Callable[[str], inference_pb2.AnswerIdentity]
) -> None:
    """Fills in a delta. ``identity`` returns what an answer of a tier depends on."""
    delta.fill(message)
    for part in message.parts:
        part.identity.CopyFrom(identity(part.tier))


def _caller() -> ApiKey | None:
    """The caller's API key; None when the router needs none."""
    key: Any = caller.get()  # the router has no other callers here
    return cast("ApiKey | None", key)
