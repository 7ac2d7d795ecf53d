"""Requests of ``schema`` as our own messages. What can be wrong here is said as OpenAI says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.api.openai import schema
from overfill.api.openai.errors import ApiError
from overfill.v1 import common_pb2, inference_pb2

DEFAULT_COMPLETION_TOKENS = 16
"""Of ``/v1/completions``, where OpenAI has this default."""

_Choice = inference_pb2.ToolChoice
_MODES = {"auto": _Choice.MODE_AUTO, "none": _Choice.MODE_NONE, "required": _Choice.MODE_REQUIRED}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants.

    Attributes:
        prompts: one request for each; of a chat, one.
        n: answers to each of them.
        echo: text that goes before the answers to each prompt, or None.
    """

    prompts: tuple[inference_pb2.GenerateRequest, ...]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: tuple[str | Sequence[int], ...] | None = None


def chat(request: schema.ChatRequest, request_id: str) -> Asked:
    """Raises ApiError."""
    generate = inference_pb2.GenerateRequest(
        model=request.model,
        chat=_chat(request.messages, request.tools),
        sampling=_sampling(request, request.max_completion_tokens or request.max_tokens),
        stop=_stop(request.stop),
        request_id=request_id,
        priority=request.priority or 0,
    )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise _invalid("max_tokens", "and 'max_completion_tokens' mean the same; give one of them")
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", "needs 'logprobs' to be true")
    if request.logprobs:
        generate.sampling.logprobs = request.top_logprobs or 0
    _tool_choice(request, generate.chat)
    _response_format(request, generate)
    return _asked(request, (generate,))


def completion(request: schema.CompletionRequest, request_id: str) -> Asked:
    """Raises ApiError."""
    prompts = _prompts(request.prompt)
    if len(prompts) > schema.MAX_PROMPTS:
        raise _invalid("prompt", f"holds {len(prompts)} prompts; at most {schema.MAX_PROMPTS} are taken")
    if request.echo and request.logprobs is not None:
        raise _invalid("echo", "cannot be combined with 'logprobs': prompts are not scored here")
    sampling = _sampling(request, request.max_tokens or DEFAULT_COMPLETION_TOKENS)
    if request.logprobs is not None:
        sampling.logprobs = request.logprobs
    made = []
    for index, prompt in enumerate(prompts):
        generate = inference_pb2.GenerateRequest(
            model=request.model,
            sampling=sampling,
            stop=_stop(request.stop),
            request_id=f"{request_id}.{index}" if index else request_id,
            priority=request.priority or 0,
        )
        if isinstance(prompt, str):
            generate.text = prompt
        else:
            _set_ids(generate.token_ids.ids, prompt, "prompt")
        made.append(generate)
    return _asked(request, tuple(made), tuple(prompts) if request.echo else None)


def tokenize(request: schema.TokenizeRequest) -> inference_pb2.TokenizeRequest:
    """Raises ApiError."""
    if (request.prompt is None) == (request.messages is None):
        raise _invalid("prompt", "or 'messages' is wanted, one of them")
    if request.messages is not None:
        chat = _chat(request.messages, request.tools)
        return inference_pb2.TokenizeRequest(model=request.model or "", chat=chat)
    return inference_pb2.TokenizeRequest(
        model=request.model or "", text=request.prompt, no_special_tokens=not request.add_special_tokens
    )


def detokenize(request: schema.DetokenizeRequest) -> inference_pb2.DetokenizeRequest:
    """Raises ApiError."""
    message = inference_pb2.DetokenizeRequest(model=request.model or "")
    _set_ids(message.ids, request.tokens, "tokens")
    return message


def _asked(
    request: schema.Sampling,
    prompts: tuple[inference_pb2.GenerateRequest, ...],
    echo: tuple[str | Sequence[int], ...] | None = None,
) -> Asked:
    options = request.stream_options
    if options is not None and not request.stream:
        raise _invalid("stream_options", "is only allowed when 'stream' is true")
    n = request.n or 1
    if len(prompts) * n > schema.MAX_PROMPTS:
        raise _invalid("n", f"answers to each of {len(prompts)} prompts are more than {schema.MAX_PROMPTS} in all")
    return Asked(
        prompts,
        n,
        bool(request.stream),
        bool(options and options.include_usage),
        bool(options and options.continuous_usage_stats),
        echo,
    )


def _sampling(request: schema.Sampling, max_tokens: int | None) -> common_pb2.SamplingParams:
    temperature = 1.0 if request.temperature is None else request.temperature
    if request.top_p == 0:  # the smallest set there is: one token
        temperature = 0.0
    params = common_pb2.SamplingParams(
        temperature=temperature,
        seed=None if request.seed is None else request.seed % (1 << 64),
        ignore_eos=bool(request.ignore_eos),
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias={_token_id(token): bias for token, bias in (request.logit_bias or {}).items()},
    )
    if max_tokens is not None:
        params.max_tokens = _uint32("max_tokens", max_tokens)
    _set_ids(params.stop_token_ids, request.stop_token_ids or (), "stop_token_ids")
    if temperature > 0:  # greedy needs no filters
        if request.top_p is not None:
            params.top_p = request.top_p
        if request.min_p is not None:
            params.min_p = request.min_p
        if request.top_k not in (None, 0, -1):  # vLLM's words for all of them
            assert request.top_k is not None
            params.top_k = _uint32("top_k", request.top_k)
    return params


def _chat(messages: Sequence[schema.Message], tools: Sequence[schema.FunctionTool] | None) -> inference_pb2.Chat:
    chat = inference_pb2.Chat()
    for index, message in enumerate(messages):
        made = chat.messages.add(
            role="system" if message.role == "developer" else message.role,
            content=_content(message.content, f"messages[{index}].content"),
            tool_call_id=message.tool_call_id or "",
        )
        for call in message.tool_calls or ():
            made.tool_calls.add(id=call.id, name=call.function.name, arguments=call.function.arguments)
        if message.role == "tool" and message.tool_call_id is None:
            raise _invalid(f"messages[{index}].tool_call_id", "is wanted in a message of role 'tool'")
    for tool in tools or ():
        function = tool.function
        chat.tools.add(
            name=function.name,
            description=function.description or "",
            parameters=json.dumps(function.parameters) if function.parameters else "",
        )
    return chat


def _content(content: str | Sequence[schema.ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise _invalid(f"{place}[{index}].type", f"{part.type[:50]!r} is not supported: this model reads text only")
    return "\n".join(part.text or "" for part in content)


def _tool_choice(request: schema.ChatRequest, chat: inference_pb2.Chat) -> None:
    choice = request.tool_choice
    if choice is not None and not request.tools:
        raise _invalid("tool_choice", "is only allowed when 'tools' are given")
    if isinstance(choice, schema.NamedTool):
        chat.tool_choice.mode, chat.tool_choice.name = _Choice.MODE_REQUIRED, choice.function.name
    elif choice is not None:
        chat.tool_choice.mode = _MODES[choice]
    if request.parallel_tool_calls is not None and not request.tools:
        raise _invalid("parallel_tool_calls", "is only allowed when 'tools' are given")
    # As at OpenAI, a tool that is named is called once.
    chat.single_tool_call = request.parallel_tool_calls is False or isinstance(choice, schema.NamedTool)


def _response_format(request: schema.ChatRequest, generate: inference_pb2.GenerateRequest) -> None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return
    if request.tools and request.tool_choice != "none":
        raise _invalid("response_format", "cannot be combined with 'tools'; set 'tool_choice' to 'none'")
    if wanted.type == "json_object":
        generate.sampling.grammar.json_object = True
        return
    if wanted.json_schema is None:
        raise _invalid("response_format.json_schema", "is wanted with type 'json_schema'")
    if wanted.json_schema.schema_ is None:
        generate.sampling.grammar.json_object = True
    else:
        generate.sampling.grammar.json_schema = json.dumps(wanted.json_schema.schema_)


def _prompts(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[str | Sequence[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _invalid("prompt", "is empty")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _stop(stop: str | Sequence[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or ()


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise _invalid("logit_bias", f"keys are token ids, such as '50256'; got {text[:50]!r}")
    return int(text)


def _set_ids(target: object, ids: Sequence[int], name: str) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < 1 << 32:
            raise _invalid(f"{name}[{index}]", f"is not a token id: {str(token)[:50]}")
    target.extend(ids)  # type: ignore[attr-defined]


def _uint32(name: str, value: int) -> int:
    if not 0 < value < 1 << 32:
        raise _invalid(name, "is out of range")
    return value


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"'{param}' {message}", param=param, code="invalid_value")
