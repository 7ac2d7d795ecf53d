"""A client's request, checked and tokenized: everything that can be refused is refused here, by field."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from overfill.api.chat import chat_grammar, encode_chat
from overfill.api.priority import check_priority
from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest, PromptTooLong
from overfill.request.grammar import check_grammar
from overfill.request.params import Grammar, SamplingParams, check_token_ids
from overfill.v1 import common_pb2, inference_pb2

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request that can be run.

    Attributes:
        request_id: the client's, or a random one.
        model: as asked for; empty means the only one.
        prompt_token_ids: at least one.
        sampling: ``seed`` and ``max_tokens`` are set; prompt and ``max_tokens`` fit the context together.
        stop: non-empty strings.
        resume_token_ids: at most ``sampling.max_tokens``; as many are a whole answer whose end was not heard.
        trace: whether the client wants the handoff's trace.
        sample_index: which of several answers to the same prompt.
        kv_codec: how the prompt's KV travels; 0 leaves it to the decode worker.
        continues_text: the answer goes on with the prompt's text, so that its first word keeps its space.
        calls_tools: the answer may hold tool calls.
        priority: the smaller goes first.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    resume_token_ids: tuple[int, ...]
    trace: bool
    sample_index: int
    kv_codec: common_pb2.KvCodec
    continues_text: bool
    calls_tools: bool
    priority: int = 0


def validate_generate(
    request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, max_model_len: int, vocab_size: int
) -> GenerationRequest:
    """Checks ``request``, tokenizes its prompt and fills in what it leaves open.

    Args:
        max_model_len: most tokens of prompt and answer together.
        vocab_size: token ids are below it.

    Raises:
        PromptTooLong: the prompt leaves no room for an answer, or not for ``max_tokens`` or ``min_tokens``.
        InvalidRequest: anything else is wrong; ``field`` is its path in the proto.
    """
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidRequest("request_id", f"is longer than {MAX_REQUEST_ID_LENGTH} characters")
    check_priority(request.priority)
    if request.kv_codec not in common_pb2.KvCodec.values():
        raise InvalidRequest("kv_codec", f"{request.kv_codec} is no codec that is known here")
    stop = _check_stop(request.stop)
    sampling = SamplingParams.from_proto(request.sampling)
    sampling.check_vocab(vocab_size)
    tools = chat_grammar(request.chat) if request.HasField("chat") else None
    if tools is not None:
        if sampling.grammar is not None:
            raise InvalidRequest("sampling.grammar", "contradicts tools, whose calls follow a grammar of their own")
        sampling = replace(sampling, grammar=Grammar("lark", tools))
    if sampling.grammar is not None:
        _check_grammar(sampling.grammar, tools is not None)
    prompt = _prompt_token_ids(request, tokenizer, vocab_size)
    if request.HasField("truncate_prompt_tokens"):
        prompt = _truncated(prompt, request.truncate_prompt_tokens, max_model_len - (sampling.max_tokens or 1))
    max_tokens = _resolve_max_tokens(sampling, len(prompt), max_model_len)
    resume = tuple(request.resume_token_ids)
    _check_resume(resume, sampling, max_tokens, vocab_size)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return GenerationRequest(
        request_id=request.request_id or secrets.token_hex(16),
        model=request.model,
        prompt_token_ids=tuple(prompt),
        sampling=replace(sampling, max_tokens=max_tokens, seed=seed),
        stop=stop,
        resume_token_ids=resume,
        trace=request.trace,
        sample_index=request.sample_index,
        kv_codec=request.kv_codec,
        continues_text=request.WhichOneof("prompt") == "text" or request.chat.continue_final_message,
        calls_tools=tools is not None,
        priority=request.priority,
    )


def _check_grammar(grammar: Grammar, of_tools: bool) -> None:
    try:
        check_grammar(grammar)
    except InvalidRequest as error:
        if not of_tools:
            raise
        reason = str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequest("chat.tools", f"cannot be obeyed: {reason}") from error


def _prompt_token_ids(request: inference_pb2.GenerateRequest, tokenizer: Tokenizer, vocab_size: int) -> Sequence[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "is missing: give text, token_ids or chat")
    if kind == "token_ids":
        ids: Sequence[int] = request.token_ids.ids
        check_token_ids("token_ids.ids", ids, vocab_size)
    elif kind == "text":
        # An empty text may still get special tokens.
        ids = tokenizer.encode(request.text) if request.text else ()
    else:
        ids = encode_chat(request.chat, tokenizer)
    if not ids:
        raise InvalidRequest("prompt", f"is empty ({kind})")
    return ids


def _truncated(prompt: Sequence[int], count: int, room: int) -> Sequence[int]:
    """The last ``count`` tokens of ``prompt``; -1: as many as there is room for."""
    if count == 0 or count < -1:
        raise InvalidRequest(
            "truncate_prompt_tokens", f"must be at least 1, or -1 for what the context holds; got {count}"
        )
    return prompt[-max(1, room if count == -1 else count) :]


def _resolve_max_tokens(sampling: SamplingParams, prompt_tokens: int, max_model_len: int) -> int:
    room = max_model_len - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            "prompt",
            f"has {prompt_tokens} tokens; the context of {max_model_len} tokens must hold it and an answer",
        )
    for name, asked in (("max_tokens", sampling.max_tokens), ("min_tokens", sampling.min_tokens)):
        if asked is not None and asked > room:
            raise PromptTooLong(
                f"sampling.{name}",
                f"{asked} tokens after a prompt of {prompt_tokens} do not fit the context of {max_model_len} "
                f"tokens; {room} do",
            )
    return room if sampling.max_tokens is None else sampling.max_tokens


def _check_stop(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"holds {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop[{index}]", "is empty")
        if len(stop) > MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop[{index}]", f"is longer than {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _check_resume(resume: Sequence[int], sampling: SamplingParams, max_tokens: int, vocab_size: int) -> None:
    if not resume:
        return
    check_token_ids("resume_token_ids", resume, vocab_size)
    if len(resume) > max_tokens:
        raise InvalidRequest("resume_token_ids", f"holds {len(resume)} tokens; the answer has at most {max_tokens}")
    if sampling.seed is None and not sampling.greedy:
        raise InvalidRequest("sampling.seed", "resuming a sampled answer needs the first attempt's seed")
