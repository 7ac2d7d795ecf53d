"""The requests of OpenAI's API with vLLM's additions. Each field is supported, ignored or refused.

Types are strict: a number in quotes is an error. Unknown fields are refused, as by OpenAI, but ignored inside messages
and tools. Fields marked ``Ignored``
have no effect on an answer. Fields that are ``refused`` would have one, but are not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from overfill.api.chat import MAX_DOCUMENTS, MAX_MESSAGES, MAX_PARTS
from overfill.api.reasoning import Effort
from overfill.api.tools import MAX_TOOLS
from overfill.request.params import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_STREAM_INTERVAL,
    MIN_REPETITION_PENALTY,
    REQUEST_ID_CHARACTERS,
)

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_GUIDED_CHOICES = 4096
INT64 = 1 << 63
MAX_INT32 = (1 << 31) - 1

Ignored = Annotated[Any, Field(default=None, description="ignored")]
Count = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Field(ge=0, le=2)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that reports only its first wrong item; a million wrong items would make a million errors."""

Ids = Items[int]
Choices = Annotated[Items[str], Field(max_length=MAX_GUIDED_CHOICES)]
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID_CHARACTERS}{{1,100}}$")]


@dataclass(frozen=True, slots=True)
class RefusedField:
    """Marks a field that is refused, except with a value that has no effect.

    Args:
        reason: Why the field is refused, and what to do instead. It is part of the error message and of
            docs/reference/openai.md.
        neutral: Values without effect that are allowed, besides None.
    """

    reason: str
    neutral: tuple[Any, ...] = ()


def refused(reason: str, *neutral: Any) -> Any:
    """The default of a field that is refused; see ``RefusedField``."""
    field: Any = Field(default=None)
    field.metadata.append(RefusedField(reason, neutral))
    return field


class Strict(BaseModel):
    """Base class that refuses unknown fields, converts no types, and allows finite numbers only."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ITEMS: ClassVar[str] = "messages"
    """Name of the field with the conversation's items."""

    @property
    def named_session(self) -> str | None:
        """The session that the body names; see ``overfill.api.sessions``."""
        return None


class Extensible(Strict):
    """Base class that ignores unknown fields.

    Messages and tools have it, as at OpenAI and vLLM: clients send back whole answers, with what they have read from
    them, and add marks for other servers, such as ``cache_control``.
    """

    model_config = ConfigDict(extra="ignore")


@functools.cache
def refusals(kind: type[BaseModel]) -> Mapping[str, RefusedField]:
    """The refused fields of ``kind`` by name."""
    return {
        name: mark
        for name, field in kind.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, RefusedField)
    }


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # an extension of vLLM: usage in every chunk
    include_obfuscation: Ignored


class JsonSchema(Strict):
    name: str
    description: Ignored
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


_FORMATS = ("text", "json_object", "json_schema")


class ResponseFormat(Strict):
    type: Annotated[
        Literal["text", "json_object", "json_schema", "structural_tag"],
        RefusedField("write what a 'structural_tag' describes as a 'grammar' of 'structured_outputs'", _FORMATS),
    ]
    json_schema: JsonSchema | None = None
    format: Any = refused("it is part of a structural tag")
    structures: Any = refused("it is part of a structural tag")
    triggers: Any = refused("it is part of a structural tag")


class StructuredOutputs(Strict):
    """vLLM's grammar of an answer; a request sets one of the first five fields."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_additional_properties: bool | None = None
    disable_any_whitespace: Ignored  # JSON never has optional white space here
    disable_fallback: Ignored
    structural_tag: Any = refused("use 'grammar' instead: describe the same text there")
    whitespace_pattern: Any = refused("JSON is written in one way, without white space to choose")


class Generating(Strict):
    """Fields of every request that generates text, in all of OpenAI's APIs."""

    model: str
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: str | Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: UnitInterval | None = None

    # Extensions, with vLLM's names.
    ignore_eos: bool | None = None
    min_p: UnitInterval | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None  # smaller numbers go first
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    top_k: int | None = None

    # Extensions of our own.
    allow_brownout: bool | None = None
    fallback: str | None = None
    tier: str | None = None


class Sampling(Generating):
    """Fields of chats and completions."""

    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIASES)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 is for scores of the prompt
    n: Count | None = None
    stream_options: StreamOptions | None = None
    user: Ignored

    # OpenAI supports this for chats only; vLLM supports it for both.
    response_format: ResponseFormat | None = None

    # Extensions, with vLLM's names.
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    request_id: RequestId | None = None
    session_id: str | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    structured_outputs: StructuredOutputs | None = None
    # the router's own counts if it is larger
    stream_interval: Annotated[int, Field(ge=1, le=MAX_STREAM_INTERVAL)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None

    guided_decoding_backend: Ignored  # this server has only one
    return_mm_kwargs: Ignored  # vLLM also ignores this and the next field here
    return_token_offsets: Ignored
    spaces_between_special_tokens: Ignored  # answers never show special tokens

    allowed_token_ids: Any = refused(
        "say what an answer may look like with 'structured_outputs', or give tokens a 'logit_bias'"
    )
    bad_words: Any = refused("give the tokens of these words a 'logit_bias' of -100", [])
    cache_salt: Any = refused("give each tenant an API key; requests with different keys share no cached prompt")
    ec_transfer_params: Any = refused("this model reads text only", {})
    guided_whitespace_pattern: Any = refused("JSON is written in one way, without white space to choose")
    include_stop_str_in_output: Any = refused(
        "the string that ended the answer is in 'overfill.choices[].stop'; append it", False
    )
    kv_transfer_params: Any = refused("the router chooses the workers between which KV travels", {})
    length_penalty: Any = refused("only beam search has one", 1)
    logprob_token_ids: Any = refused("'logprobs' scores the likeliest tokens; no others can be named")
    logits_processors: Any = refused("the server runs no code that requests name", [])
    repetition_detection: Any = refused("use 'frequency_penalty' or 'repetition_penalty'", {})
    return_token_ids: Any = refused("use the gRPC client, whose answers have 'token_ids', or '/tokenize'", False)
    return_tokens_as_token_ids: Any = refused("'logprobs' has the bytes of every token", False)
    routed_experts_prompt_start: Any = refused("answers do not show which experts computed them", 0)
    skip_special_tokens: Any = refused("answers never show special tokens", True)
    thinking_token_budget: Any = refused("nothing ends the thinking before the model does; use 'max_tokens'", -1)
    truncation_side: Any = refused("'truncate_prompt_tokens' keeps the prompt's last tokens, which is 'left'", "left")
    use_beam_search: Any = refused("ask for several answers with 'n'", False)
    vllm_xargs: Any = refused("no extension reads it", {})
    watermarking: Any = refused("the sampler draws without a watermark", False)

    @property
    def named_session(self) -> str | None:
        return self.session_id


class ContentPart(BaseModel):
    """Part of a message; only text is supported."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class FunctionCall(Extensible):
    name: str
    arguments: str


class ToolCall(Extensible):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Extensible):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[Items[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # of an assistant, as answers have it
    reasoning: str | None = None  # vLLM's name of it
    audio: Any = refused("this model reads text only")
    function_call: Any = refused("use 'tool_calls'")


class Function(Extensible):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Extensible):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ToolChoices(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[Items[NamedTool], Field(min_length=1)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: ToolChoices


class Templated(Strict):
    """Fields of every request that is rendered with the chat template."""

    tools: Annotated[Items[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    documents: Annotated[Items[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    parse_special: bool | None = None  # llama.cpp's name
    chat_template: Any = refused("the model brings its own; 'chat_template_kwargs' sets its variables")
    media_io_kwargs: Any = refused("this model reads text only", {})
    mm_processor_kwargs: Any = refused("this model reads text only", {})


class ChatRequest(Sampling, Templated):
    """``POST /v1/chat/completions``."""

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    include_reasoning: bool | None = None  # vLLM's name
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: Effort | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    metadata: Ignored
    prediction: Ignored
    prompt_cache_options: Ignored
    prompt_cache_retention: Ignored
    safety_identifier: Ignored
    service_tier: Ignored
    store: Ignored
    verbosity: Ignored

    audio: Any = refused("answers are text")
    function_call: Any = refused("use 'tool_choice'")
    functions: Any = refused("use 'tools'")
    modalities: Any = refused("answers are text; leave it out", ["text"])
    moderation: Any = refused("no moderation model is served; leave it out")
    web_search_options: Any = refused("nothing is searched; give the model 'tools'")

    add_special_tokens: Any = refused("the chat template writes special tokens itself", False)
    best_of: Any = refused("ask for several answers with 'n'", 1)
    echo: Any = refused("put the last message before the answer yourself", False)

    return_prompt_text: Any = refused("'/tokenize' gives the prompt's tokens, and '/detokenize' their text", False)

    @property
    def named_session(self) -> str | None:
        return self.prompt_cache_key or self.session_id


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: str | Items[str] | Ids | Items[Ids]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    # An extension of our own.
    answer_start: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None

    best_of: Any = refused("give 1 or the value of 'n', which asks for several answers", 1)
    suffix: Any = refused("leave it out: models here only continue a text", "")

    add_special_tokens: Any = refused("send token ids; '/tokenize' makes them without special tokens", True)
    prompt_embeds: Any = refused("send text or token ids")


class TokenizeRequest(Templated):
    """``POST /tokenize`` in vLLM's format: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: Any = refused("'/detokenize' gives the text of tokens", False)


class LoadAdapterRequest(Strict):
    """Loads an adapter of the workers' folder of adapters. No path comes from a client."""

    lora_name: str
    lora_path: Any = refused("the workers load the folder of this name in their --adapters; give the name only")
    load_inplace: Any = refused("unload the adapter first, and then load it", False)
    is_3d_lora_weight: Ignored


class UnloadAdapterRequest(Strict):
    """Unloads an adapter; the answers that it writes are finished."""

    lora_name: str
    lora_int_id: Ignored


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ids
