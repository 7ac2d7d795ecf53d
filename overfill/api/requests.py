"""Checks and tokenizes a client's request; every refusal names the field."""

from __future__ import annotations

import hashlib
import re
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import replace

from overfill.api.chat import encode_with_generation_prompt, read_tools
from overfill.api.reasoning import Reasoning
from overfill.api.reasoning_grammar import after_thinking
from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest, PromptTooLong
from overfill.request.answer_start import answer_start
from overfill.request.params import (
    MAX_STOPS,
    MAX_STREAM_INTERVAL,
    REQUEST_ID_CHARACTERS,
    Grammar,
    SamplingParams,
    check_token_ids,
)
from overfill.routing.job import Job
from overfill.routing.tier import Adapter
from overfill.v1 import common_pb2, decode_pb2, inference_pb2

MAX_STOP_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 128
MAX_PROMPT_LOGPROBS = 1 << 18
"""Log-probabilities of one prompt's tokens: each token has its own and those of its alternatives. They take 2 MiB."""

_REQUEST_ID = re.compile(f"{REQUEST_ID_CHARACTERS}*")
_CODECS = frozenset(common_pb2.KvCodec.values())


def validate_generate(
    request: inference_pb2.GenerateRequest,
    tokenizer: Tokenizer,
    max_model_len: int,
    vocab_size: int,
    tools: Grammar | None = None,
    reasoning: Reasoning | None = None,
    adapter: Adapter | None = None,
) -> Job:
    """Checks ``request``, tokenizes its prompt, and sets request id, seed and ``max_tokens`` where they are missing.

    Args:
        max_model_len: Maximum number of tokens of prompt and answer together.
        vocab_size: Size of the vocabulary; token ids are below it.
        tools: Result of ``tried_grammar``, which checks the request's grammars: the grammar that its tools need.
        reasoning: How the model marks what it thinks; None if that is not separated from answers.
        adapter: The adapter that writes the answer; None without one. It decides from where on the decoder computes the
            prompt, unless the request says so.

    Raises:
        PromptTooLong: the context has no space after the prompt for an answer, ``max_tokens`` or ``min_tokens``.
        InvalidRequest: another field is wrong; ``field`` is its path in the proto.
    """
    _check_request_id(request.request_id)
    if request.kv_codec not in _CODECS:
        raise InvalidRequest("kv_codec", f"{request.kv_codec} is not a codec that this router knows")
    if request.stream_interval > MAX_STREAM_INTERVAL:
        raise InvalidRequest("stream_interval", f"must be at most {MAX_STREAM_INTERVAL}, got {request.stream_interval}")
    stop = _check_stop(request.stop)
    sampling = SamplingParams.from_proto(request.sampling)
    sampling.check_vocab(vocab_size)
    if tools is not None:
        sampling = replace(sampling, grammar=tools)
    if request.HasField("resume_identity"):
        _check_room(request.resume_identity.prompt_tokens, max_model_len)
    prompt, generation_prompt = _prompt_token_ids(request, tokenizer, max_model_len, vocab_size, adapter is not None)
    if request.HasField("truncate_prompt_tokens"):
        room = max_model_len - (sampling.max_tokens or 1)
        if request.HasField("resume_identity"):  # another router, of another capacity, may have truncated the prompt
            room = request.resume_identity.prompt_tokens
        prompt = _truncated(prompt, request.truncate_prompt_tokens, room)
    thinking = None
    if reasoning is not None and request.HasField("chat"):
        continues = request.chat.continue_final_message
        thinking = reasoning.thinking(prompt, request.chat.messages[-1].content if continues else None)
        if thinking is not None and sampling.grammar is not None:
            sampling = replace(sampling, grammar=after_thinking(sampling.grammar, thinking))
    max_tokens = _resolve_max_tokens(sampling, len(prompt), max_model_len, request.fit_max_tokens)
    decoder_from = _answer_start(request, len(prompt), adapter, generation_prompt)
    _check_resume(request.resume_token_ids, sampling, max_tokens, vocab_size)
    drawn = secrets.token_bytes(24)  # one system call for the id and the seed
    start = decode_pb2.StartDecode(
        request_id=request.request_id or drawn[:16].hex(),
        prompt_token_ids=prompt,
        emitted_token_ids=request.resume_token_ids,
        sampling=request.sampling,
        eos_token_ids=tokenizer.eos_token_ids,
        trace=request.trace,
        codec=request.kv_codec,
        sample_index=request.sample_index,
        answer_start=decoder_from,
        adapter_digest="" if adapter is None else adapter.digest,
    )
    start.sampling.max_tokens = max_tokens
    if sampling.seed is None:
        start.sampling.seed = int.from_bytes(drawn[16:], "little")
    if sampling.grammar is not None:
        start.sampling.grammar.CopyFrom(sampling.grammar.to_proto())
    job = Job(
        start=start,
        prompt_token_ids=prompt,
        stop=stop,
        continues_text=request.WhichOneof("prompt") == "text" or request.chat.continue_final_message,
        tools=() if tools is None else read_tools(request.chat),
        answer_digest=None if tools is None else _answer_digest(prompt, start.sampling, sampling.greedy),
        thinking=thinking,
        adapter=adapter,
    )
    _check_num_scores(job, vocab_size)
    return job


def _check_request_id(id: str) -> None:
    if len(id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidRequest("request_id", f"has {len(id)} characters; at most {MAX_REQUEST_ID_LENGTH} are allowed")
    if not _REQUEST_ID.fullmatch(id):
        raise InvalidRequest("request_id", f"is {id!r}; only letters, digits and _ . : / - are allowed")


def _answer_digest(prompt: Sequence[int], sampling: common_pb2.SamplingParams, greedy: bool) -> str:
    digest = hashlib.sha256(array("I", prompt))
    if not greedy:  # to resume a greedy answer, clients need no seed
        digest.update(sampling.seed.to_bytes(8, "little"))
    return digest.hexdigest()


def _prompt_token_ids(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, max_model_len: int, vocab_size: int, count: bool
) -> tuple[Sequence[int], int]:
    """Returns the prompt, and with ``count`` the number of tokens of its generation prompt."""
    generation_prompt = 0
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "is missing: give text, token_ids or chat")
    if kind == "token_ids":
        # No loop over millions of them holds the interpreter lock.
        if not request.HasField("truncate_prompt_tokens"):
            _check_room(len(request.token_ids.ids), max_model_len)
        ids: Sequence[int] = tuple(request.token_ids.ids[-max_model_len:])
        check_token_ids("token_ids.ids", ids, vocab_size)
    elif kind == "text":
        # The tokenizer may add special tokens even to an empty text, so do not call it.
        ids = tokenizer.encode(request.text) if request.text else ()
    else:
        ids, generation_prompt = encode_with_generation_prompt(request.chat, tokenizer, count=count)
    if not ids:
        raise InvalidRequest("prompt", f"is empty: {kind} has no tokens")
    return ids, generation_prompt


def _truncated(prompt: Sequence[int], count: int, room: int) -> Sequence[int]:
    """The last ``count`` tokens of ``prompt``; -1 means the last ``room``, but at least one."""
    if count == 0 or count < -1:
        raise InvalidRequest(
            "truncate_prompt_tokens", f"must be at least 1, or -1 for all that fit the context; got {count}"
        )
    return prompt[-max(1, room if count == -1 else count) :]


def _resolve_max_tokens(sampling: SamplingParams, prompt_tokens: int, max_model_len: int, fit: bool) -> int:
    room = _check_room(prompt_tokens, max_model_len)
    max_tokens = None if fit and (sampling.max_tokens or 0) > room else sampling.max_tokens
    for name, asked in (("max_tokens", max_tokens), ("min_tokens", sampling.min_tokens)):
        if asked is not None and asked > room:
            raise PromptTooLong(
                f"sampling.{name}",
                f"{asked} tokens after a prompt of {prompt_tokens} do not fit the context of {max_model_len} "
                f"tokens; at most {room} fit",
            )
    return room if max_tokens is None else max_tokens


def _check_room(prompt_tokens: int, max_model_len: int) -> int:
    """Tokens that the context has left for the answer. Raises PromptTooLong if there are none."""
    room = max_model_len - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            "prompt",
            f"has {prompt_tokens} tokens; the context of {max_model_len} tokens must also hold an answer",
            prompt_tokens,
            max_model_len - 1,
        )
    return room


def _answer_start(
    request: inference_pb2.GenerateRequest, prompt_tokens: int, adapter: Adapter | None, generation_prompt: int
) -> int | None:
    """Returns the index of the first prompt token that the decoder computes; None if it computes none."""
    if not request.HasField("answer_start"):
        if adapter is None:
            return None
        if prompt_tokens < 2:
            raise InvalidRequest(
                "prompt",
                f"has 1 token; with the adapter {adapter.name!r} the full model computes the prompt's beginning and "
                "the decoder its end, so at least 2 are needed",
            )
        return answer_start(prompt_tokens, adapter.tail_tokens, generation_prompt)
    if not request.sampling.HasField("prompt_logprobs"):
        raise InvalidRequest("answer_start", "is only for requests that score their prompt; set prompt_logprobs")
    if request.HasField("truncate_prompt_tokens"):
        raise InvalidRequest("answer_start", "counts tokens of the whole prompt; leave truncate_prompt_tokens out")
    if not 1 <= request.answer_start < prompt_tokens:
        allowed = f"must be at least 1 and less than the prompt's {prompt_tokens} tokens"
        raise InvalidRequest("answer_start", f"{allowed}; got {request.answer_start}")
    return request.answer_start


def _check_num_scores(job: Job, vocab_size: int) -> None:
    count, scores = job.start.sampling.prompt_logprobs, job.num_scores
    if count > vocab_size:
        raise InvalidRequest("sampling.prompt_logprobs", f"is {count}, more than the {vocab_size} token ids")
    if scores is not None and scores.logprobs > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            "sampling.prompt_logprobs",
            f"{count} for each of {scores.tokens} tokens make {scores.logprobs} log-probabilities, with the tokens' "
            f"own; at most {MAX_PROMPT_LOGPROBS} are allowed; ask for fewer, or score a shorter prompt",
        )


def _check_stop(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop[{index}]", "is empty")
        if len(stop) > MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop[{index}]", f"has {len(stop)} characters; at most {MAX_STOP_LENGTH} are allowed")
    return tuple(stops)


def _check_resume(resume: Sequence[int], sampling: SamplingParams, max_tokens: int, vocab_size: int) -> None:
    if not resume:
        return
    if len(resume) > max_tokens:
        raise InvalidRequest("resume_token_ids", f"has {len(resume)} tokens; the answer may have at most {max_tokens}")
    check_token_ids("resume_token_ids", resume, vocab_size)
    if sampling.seed is None and not sampling.greedy:
        raise InvalidRequest("sampling.seed", "is missing; to resume a sampled answer, give the first request's seed")
