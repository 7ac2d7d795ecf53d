"""The public API over gRPC: text in, text out, one relay per request."""

from __future__ import annotations

import asyncio

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.requests import GenerationRequest, validate_generate
from overfill.api.tokenizer import Tokenizer
from overfill.errors import ModelNotFound, OverfillError, ShuttingDown
from overfill.pair.manifest import Pair
from overfill.routing.answer import Finish
from overfill.routing.gate import Gate
from overfill.routing.pool import Roster
from overfill.routing.relay import Relay, RelayRequest
from overfill.routing.stream import DecodeConnector
from overfill.rpc.interceptors import Context
from overfill.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from services.router.text import AnswerText

LONG_REQUEST = 16 << 10
"""Bytes from which on a request is tokenized in a thread, so that the streams of others go on meanwhile."""


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves one pair.

    Args:
        model: the name that clients ask for.
        max_attempts: workers lost in a row, without a new token, after which a request is given up.
    """

    def __init__(
        self,
        model: str,
        pair: Pair,
        tokenizer: Tokenizer,
        roster: Roster,
        gate: Gate,
        connector: DecodeConnector,
        *,
        max_attempts: int,
    ) -> None:
        self._model = model
        self._pair = pair
        self._tokenizer = tokenizer
        self._roster = roster
        self._gate = gate
        self._connector = connector
        self._max_attempts = max_attempts
        self._running: set[Relay] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together: what the model takes and some decode worker holds."""
        capacity = self._roster.decode.capacity_tokens
        limit = self._pair.full_config.max_positions
        return limit if capacity is None else min(limit, capacity)

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        received = asyncio.get_running_loop().time()
        if self._draining:
            raise ShuttingDown("this router is shutting down")
        if request.model not in ("", self._model):
            raise ModelNotFound(f"there is no model {request.model!r} here; this router serves {self._model!r}")
        checked = await self._validate(request)
        left = context.time_remaining()
        relay = Relay(
            RelayRequest(
                id=checked.request_id,
                prompt_token_ids=checked.prompt_token_ids,
                sampling=checked.sampling.to_proto(),
                eos_token_ids=self._tokenizer.eos_token_ids,
                received=received,
                deadline=None if left is None else asyncio.get_running_loop().time() + left,
                emitted_token_ids=checked.resume_token_ids,
                trace=checked.trace,
            ),
            self._gate,
            self._connector,
            max_attempts=self._max_attempts,
        )
        continued = checked.prompt_token_ids if request.WhichOneof("prompt") == "text" else ()
        text = AnswerText(
            StreamDetokenizer(self._tokenizer, continued), checked.stop, replayed=checked.resume_token_ids
        )
        relay.start()
        self._running.add(relay)
        self._idle.clear()
        try:
            await context.write(self._accepted(checked))
            finished = await self._stream(relay, text, context)
            # The worker stops now, not when the client has read everything.
            await relay.close()
            finished.timing.total_ns = _nanoseconds_since(received)
            await context.write(inference_pb2.GenerateResponse(finished=finished))
        finally:
            # Even when this task is cancelled again meanwhile: a relay that runs on holds slots.
            closing = asyncio.ensure_future(self._close(relay))
            await asyncio.shield(closing)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        worker = next(iter(self._roster.workers()), None)
        model = inference_pb2.Model(
            name=self._model,
            max_model_len=self.max_model_len,
            full_digest=self._pair.full_digest,
            decoder_digest=self._pair.decoder_digest,
            dtype=worker.info.identity.kv.dtype if worker else "",
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def _close(self, relay: Relay) -> None:
        await relay.close()
        self._running.discard(relay)
        if not self._running:
            self._idle.set()

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns once no request runs."""
        await self._idle.wait()

    def abort_all(self, error: OverfillError) -> None:
        """Ends every running request with ``error``."""
        for relay in self._running:
            relay.abort(error)

    async def _validate(self, request: inference_pb2.GenerateRequest) -> GenerationRequest:
        arguments = (request, self._tokenizer, self.max_model_len, self._pair.full_config.vocab_size)
        if request.ByteSize() < LONG_REQUEST:
            return validate_generate(*arguments)
        return await asyncio.to_thread(validate_generate, *arguments)

    def _accepted(self, checked: GenerationRequest) -> inference_pb2.GenerateResponse:
        accepted = inference_pb2.Accepted(
            request_id=checked.request_id,
            prompt_tokens=len(checked.prompt_token_ids),
            seed=checked.sampling.seed,
            max_tokens=checked.sampling.max_tokens,
            model=self._model,
        )
        return inference_pb2.GenerateResponse(accepted=accepted)

    async def _stream(self, relay: Relay, text: AnswerText, context: Context) -> inference_pb2.Finished:
        """Writes deltas until the answer is complete or a stop string cuts it."""
        ttft_ns: int | None = None
        finish: Finish | None = None
        rest = ""
        while finish is None and text.stop is None:
            event = await relay.next()
            if isinstance(event, Finish):
                finish, rest = event, text.finish()
                continue
            await context.write(inference_pb2.GenerateResponse(delta=text.push(event)))
            # A resumed answer has its first token already: nothing was waited for.
            if ttft_ns is None and not relay.resumed:
                ttft_ns = _nanoseconds_since(relay.answer.received)
                if relay.answer.timing.HasField("return_path_ns"):
                    relay.answer.timing.return_path_ns += _nanoseconds_since(event.received_at)
        return _finished(relay, text, rest, finish, ttft_ns)


def _finished(
    relay: Relay, text: AnswerText, rest: str, finish: Finish | None, ttft_ns: int | None
) -> inference_pb2.Finished:
    if finish is None:  # cut by a stop string before the worker was done
        finish = Finish(common_pb2.FINISH_REASON_STOP, relay.usage)
    timing = common_pb2.Timing()
    timing.CopyFrom(relay.answer.timing)
    if ttft_ns is not None:
        timing.ttft_ns = ttft_ns
    usage = common_pb2.Usage()
    usage.CopyFrom(finish.usage)
    usage.completion_tokens = text.num_tokens
    return inference_pb2.Finished(
        reason=finish.reason if text.stop is None else common_pb2.FINISH_REASON_STOP,
        usage=usage,
        timing=timing,
        prefill_worker=relay.answer.prefill_worker,
        decode_worker=relay.decode_worker,
        migrations=relay.answer.migrations,
        stop=text.stop or "",
        text=rest,
        trace=finish.trace,
    )


def _nanoseconds_since(then: float) -> int:
    return round((asyncio.get_running_loop().time() - then) * 1e9)
