"""Turns requests of ``schema`` into our messages, with error messages in OpenAI's words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overfill.api.openai import schema
from overfill.api.openai.fields import (
    function_tool,
    grammar_of,
    invalid,
    json_text,
    router_request,
    sampling_params,
    schema_grammar,
    uint32,
)
from overfill.api.reasoning import thinking_variables
from overfill.errors import InvalidRequest, OverfillError
from overfill.request.json_schemas import close_objects
from overfill.request.params import Grammar
from overfill.v1 import common_pb2, inference_pb2

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for ``/v1/completions``."""

_Choice = inference_pb2.ToolChoice
_MODES = {"auto": _Choice.MODE_AUTO, "none": _Choice.MODE_NONE, "required": _Choice.MODE_REQUIRED}


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One HTTP request as requests to the router.

    Attributes:
        prompts: One router request per prompt; a chat has one.
        n: Number of answers to each prompt.
        stream: Whether the response is streamed.
        include_usage: Whether the stream ends with token counts.
        continuous_usage: Whether every chunk has token counts.
        echo: For each prompt, the text that precedes its answers; None means no text.
        grammar_field: Name of the field that sets the grammar of the answers; empty means that none does.
        include_reasoning: Whether the response shows what the model thinks before it answers.
        without_answer: Whether the prompt is scored and no answer is asked for. The router computes one token then.
    """

    prompts: tuple[inference_pb2.GenerateRequest, ...]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: tuple[str | Sequence[int], ...] | None = None
    grammar_field: str = ""
    without_answer: bool = False
    include_reasoning: bool = True

    @property
    def echoes_scores(self) -> bool:
        """Whether the prompt's log-probabilities are part of ``logprobs``, before the answer's."""
        return self.echo is not None and self.prompts[0].sampling.HasField("logprobs")

    @property
    def prompt_logprobs(self) -> bool:
        """Whether the response has vLLM's ``prompt_logprobs``."""
        return self.prompts[0].sampling.HasField("prompt_logprobs") and not self.echoes_scores

    def own_field(self, error: OverfillError) -> OverfillError:
        """``error`` with the name of this request's field, if it is about the grammar or the prompt's scores."""
        if not isinstance(error, InvalidRequest):
            return error
        reason = error.reason
        if error.field == "sampling.prompt_logprobs" and self.echoes_scores:
            return InvalidRequest("echo", f"with 'logprobs' {reason}")
        if not error.field.startswith("sampling.grammar"):
            return error
        if error.field == "sampling.grammar.lark" and self.grammar_field.endswith("grammar"):
            reason += "; write the grammar in llguidance's dialect of Lark"
        return InvalidRequest(self.grammar_field, reason)


def chat(request: schema.ChatRequest, request_id: str) -> ApiRequest:
    """Translates a chat request. Raises ApiError."""
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    generate = _generate(request, request_id, _sampling(request, max_tokens, request.prompt_logprobs))
    generate.chat.CopyFrom(_chat(request.messages, request, thinking_variables(request.reasoning_effort)))
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("max_tokens", "and 'max_completion_tokens' mean the same; give one of them")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "needs 'logprobs' to be true")
    if request.logprobs:
        generate.sampling.logprobs = request.top_logprobs or 0
    _tool_choice(request, generate.chat)
    field = _set_grammar(request, generate.sampling) or ("tools" if request.tools else "")
    return replace(_api_request(request, (generate,), field), include_reasoning=request.include_reasoning is not False)


def completion(request: schema.CompletionRequest, request_id: str) -> ApiRequest:
    """Translates a completion request. Raises ApiError."""
    prompts = _prompts(request.prompt)
    if len(prompts) > schema.MAX_PROMPTS:
        raise invalid("prompt", f"holds {len(prompts)} prompts; at most {schema.MAX_PROMPTS} are allowed")
    scores = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        if scores is not None:
            raise invalid("prompt_logprobs", "and 'echo' with 'logprobs' both score the prompt; give one of them")
        scores = request.logprobs
    if request.echo and request.truncate_prompt_tokens is not None:
        raise invalid("echo", "cannot be combined with 'truncate_prompt_tokens', which leaves part of the prompt out")
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    sampling = _sampling(request, max_tokens, scores)
    field = _set_grammar(request, sampling)
    if request.logprobs is not None:
        sampling.logprobs = request.logprobs
        # lm-eval cuts one token off the echoed scores, also where the one token of the answer would end it.
        sampling.ignore_eos |= bool(request.echo) and max_tokens == 1 and not field
    made = []
    for index, prompt in enumerate(prompts):
        generate = _generate(request, f"{request_id}.{index}" if index else request_id, sampling)
        if isinstance(prompt, str):
            generate.text = prompt
        else:
            _set_ids(generate.token_ids.ids, prompt, "prompt")
        if request.answer_start is not None:
            generate.answer_start = request.answer_start
        made.append(generate)
    return _api_request(request, tuple(made), field, tuple(prompts) if request.echo else None)


def tokenize(request: schema.TokenizeRequest) -> inference_pb2.TokenizeRequest:
    """Translates a request to tokenize. Raises ApiError."""
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "or 'messages' must be given, and not both")
    if request.messages is not None:
        chat = _chat(request.messages, request)
        return inference_pb2.TokenizeRequest(model=request.model or "", chat=chat)
    for name in schema.Templated.model_fields:
        if getattr(request, name):
            raise invalid(name, "is for 'messages'; leave it out with 'prompt'")
    return inference_pb2.TokenizeRequest(
        model=request.model or "", text=request.prompt, no_special_tokens=not request.add_special_tokens
    )


def detokenize(request: schema.DetokenizeRequest) -> inference_pb2.DetokenizeRequest:
    """Translates a request to detokenize. Raises ApiError."""
    message = inference_pb2.DetokenizeRequest(model=request.model or "")
    _set_ids(message.ids, request.tokens, "tokens")
    return message


def _api_request(
    request: schema.Sampling,
    prompts: tuple[inference_pb2.GenerateRequest, ...],
    grammar_field: str,
    echo: tuple[str | Sequence[int], ...] | None = None,
) -> ApiRequest:
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("stream_options", "is only allowed when 'stream' is true")
    n = request.n or 1
    if prompts[0].sampling.HasField("prompt_logprobs"):
        if request.stream:
            raise invalid("stream", "must be false where the prompt is scored: its scores are not streamed")
        if n > 1:
            raise invalid("n", "must be 1 where the prompt is scored")
    if len(prompts) * n > schema.MAX_PROMPTS:
        raise invalid(
            "n",
            f"asks for {n * len(prompts)} answers to {len(prompts)} prompts; at most {schema.MAX_PROMPTS} are allowed",
        )
    return ApiRequest(
        prompts,
        n,
        bool(request.stream),
        bool(options and options.include_usage),
        bool(options and options.continuous_usage_stats),
        echo,
        grammar_field,
        without_answer=request.max_tokens == 0,
    )


def _generate(
    request: schema.Sampling, request_id: str, sampling: common_pb2.SamplingParams
) -> inference_pb2.GenerateRequest:
    """A router request without its prompt."""
    generate = router_request(request, request_id, sampling)
    if (count := request.truncate_prompt_tokens) is not None:
        if count == 0:
            raise invalid("truncate_prompt_tokens", "must be at least 1, or -1 for all that fit the context; got 0")
        generate.truncate_prompt_tokens = count
    if request.stream_interval is not None:
        generate.stream_interval = request.stream_interval
    return generate


def _sampling(
    request: schema.Sampling, max_tokens: int | None, prompt_logprobs: int | None
) -> common_pb2.SamplingParams:
    if max_tokens == 0 and prompt_logprobs is None:
        raise invalid("max_tokens", "must be at least 1, or 0 where the prompt is scored")
    params = sampling_params(request)
    if request.min_tokens:
        params.min_tokens = uint32("min_tokens", request.min_tokens)
    if request.logit_bias:
        params.logit_bias.update({_token_id(token): bias for token, bias in request.logit_bias.items()})
    if prompt_logprobs is not None:
        params.prompt_logprobs = prompt_logprobs
    if max_tokens is not None:
        params.max_tokens = uint32("max_tokens", max(1, max_tokens))
    _set_ids(params.stop_token_ids, request.stop_token_ids or (), "stop_token_ids")
    return params


def _chat(
    messages: Sequence[schema.Message], how: schema.Templated, thinking: Mapping[str, Any] | None = None
) -> inference_pb2.Chat:
    """The chat of a request. ``thinking`` are variables of the template that the request may set otherwise."""
    chat = inference_pb2.Chat(
        continue_final_message=bool(how.continue_final_message), parse_special=bool(how.parse_special)
    )
    if how.add_generation_prompt is not None:
        chat.add_generation_prompt = how.add_generation_prompt
    variables = {**(thinking or {}), **(how.chat_template_kwargs or {})}
    if how.documents is not None:
        if "documents" in variables:
            raise invalid("documents", "and 'chat_template_kwargs.documents' mean the same; give one of them")
        variables["documents"] = how.documents
    if variables:
        chat.chat_template_kwargs = json_text("chat_template_kwargs", variables)
    for index, message in enumerate(messages):
        # This server, as OpenAI's, writes null for an assistant's content if the answer has no text.
        if message.content is None and message.role != "assistant":
            raise invalid(f"messages[{index}].content", f"is missing; a message of role {message.role!r} needs it")
        made = chat.messages.add(
            role="system" if message.role == "developer" else message.role,
            content=_content(message.content, f"messages[{index}].content"),
            tool_call_id=message.tool_call_id or "",
            # Clients send answers back whole, and some add the field to every message.
            reasoning=_reasoning(message) if message.role == "assistant" else "",
        )
        for call in message.tool_calls or ():
            made.tool_calls.add(id=call.id, name=call.function.name, arguments=call.function.arguments)
        if message.role == "tool" and message.tool_call_id is None:
            raise invalid(f"messages[{index}].tool_call_id", "is missing; a message of role 'tool' needs it")
    for index, tool in enumerate(how.tools or ()):
        function = tool.function
        field = f"tools[{index}].function.parameters"
        chat.tools.append(
            function_tool(function.name, function.description, field, function.parameters, strict=function.strict)
        )
    return chat


def _reasoning(message: schema.Message) -> str:
    return message.reasoning_content or message.reasoning or ""


def _content(content: str | Sequence[schema.ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise invalid(f"{place}[{index}].type", f"{part.type[:50]!r} is not supported: this model reads text only")
    return "\n".join(part.text or "" for part in content)


def _tool_choice(request: schema.ChatRequest, chat: inference_pb2.Chat) -> None:
    choice = request.tool_choice
    if choice is not None and not request.tools:
        raise invalid("tool_choice", "is only allowed when 'tools' are given")
    if isinstance(choice, schema.NamedTool):
        chat.tool_choice.mode, chat.tool_choice.name = _Choice.MODE_REQUIRED, choice.function.name
    elif isinstance(choice, schema.AllowedTools):
        chat.tool_choice.mode = _MODES[choice.allowed_tools.mode]
        _keep_tools(choice.allowed_tools.tools, chat)
    elif choice is not None:
        chat.tool_choice.mode = _MODES[choice]
    if request.parallel_tool_calls is not None and not request.tools:
        raise invalid("parallel_tool_calls", "is only allowed when 'tools' are given")
    # As with OpenAI, a model calls a named tool once.
    chat.single_tool_call = request.parallel_tool_calls is False or isinstance(choice, schema.NamedTool)


def _keep_tools(allowed: Sequence[schema.NamedTool], chat: inference_pb2.Chat) -> None:
    """Removes the tools of ``chat`` that are not ``allowed``."""
    known = {tool.name for tool in chat.tools}
    for index, tool in enumerate(allowed):
        if tool.function.name not in known:
            place = f"tool_choice.allowed_tools.tools[{index}].function.name"
            raise invalid(place, f"is {tool.function.name[:80]!r}, which is not one of the tools")
    names = {tool.function.name for tool in allowed}
    kept = [tool for tool in chat.tools if tool.name in names]
    del chat.tools[:]
    chat.tools.extend(kept)


def _set_grammar(request: schema.Sampling, sampling: common_pb2.SamplingParams) -> str:
    """Sets the grammar of the answers. Returns the field that sets it, or ""; raises ApiError if two fields do."""
    grammars = [*_response_format(request), *_structured_outputs(request), *_guided(request)]
    if not grammars:
        return ""
    (field, grammar), *others = grammars
    if others:
        raise invalid(others[0][0], f"and '{field}' both set the form of the answer; give one of them")
    sampling.grammar.CopyFrom(grammar.to_proto())
    return field


_FieldGrammars = Iterator[tuple[str, Grammar]]
"""Pairs of a field that sets the grammar of the answer, and this grammar."""


def _response_format(request: schema.Sampling) -> _FieldGrammars:
    given, field = request.response_format, "response_format"
    if given is None or given.type == "text":
        return
    if given.type == "json_object":
        yield field, Grammar("json_object")
        return
    described = given.json_schema
    if described is None:
        raise invalid(f"{field}.json_schema", "is missing; type 'json_schema' needs it")
    if described.schema_ is None:
        yield field, Grammar("json_object")
    elif described.strict:
        yield field, schema_grammar(field, described.schema_, strict=True)
    else:
        yield field, _schema(request, field, described.schema_)


def _structured_outputs(request: schema.Sampling) -> _FieldGrammars:
    given, field = request.structured_outputs, "structured_outputs"
    if given is None:
        return
    if given.json_ is not None:
        yield f"{field}.json", _schema(request, f"{field}.json", given.json_)
    if given.regex is not None:
        yield f"{field}.regex", grammar_of(f"{field}.regex", "regex", given.regex)
    if given.choice is not None:
        yield f"{field}.choice", _choice(f"{field}.choice", given.choice)
    if given.grammar is not None:
        yield f"{field}.grammar", grammar_of(f"{field}.grammar", "lark", given.grammar)
    if given.json_object:
        yield f"{field}.json_object", Grammar("json_object")


def _guided(request: schema.Sampling) -> _FieldGrammars:
    if request.guided_json is not None:
        yield "guided_json", _schema(request, "guided_json", request.guided_json)
    if request.guided_regex is not None:
        yield "guided_regex", grammar_of("guided_regex", "regex", request.guided_regex)
    if request.guided_choice is not None:
        yield "guided_choice", _choice("guided_choice", request.guided_choice)
    if request.guided_grammar is not None:
        yield "guided_grammar", grammar_of("guided_grammar", "lark", request.guided_grammar)


def _schema(request: schema.Sampling, field: str, given: dict[str, Any] | str) -> Grammar:
    """A grammar for the schema that ``field`` holds."""
    grammar = grammar_of(field, "json_schema", given if isinstance(given, str) else json_text(field, given))
    options = request.structured_outputs
    if options is not None and options.disable_additional_properties is False:
        return Grammar.json_schema(close_objects(json.loads(grammar.text), allow_more=True))
    return grammar


def _choice(field: str, texts: Sequence[str]) -> Grammar:
    if not texts:
        raise invalid(field, "is empty")
    return Grammar("regex", f"(?:{'|'.join(map(re.escape, texts))})")


def _prompts(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[str | Sequence[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "is empty")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise invalid("logit_bias", f"keys are token ids, such as '50256'; got {text[:50]!r}")
    return int(text)


def _set_ids(target: object, ids: Sequence[int], name: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < 1 << 32):
        index, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < 1 << 32)
        raise invalid(f"{name}[{index}]", f"is not a token id: {str(token)[:50]}")
    target.extend(ids)  # type: ignore[attr-defined]
