"""The requests of OpenAI's API, field by field: what is taken, what is ignored, what is refused.

Types are strict: a number in quotes is no number. A field that no class here has is refused as unknown, as OpenAI
does. Fields marked ``Ignored`` change nothing in an answer; those in ``refused`` would, and cannot be honoured.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from overfill.api.priority import MOST_PRIORITY
from overfill.params import MAX_LOGPROBS, MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_PROMPTS = 256
INT64 = 1 << 63

Ignored = Annotated[Any, Field(default=None, description="ignored")]
Count = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is told: a list of a million could make a million complaints."""

Ids = Items[int]


class Strict(BaseModel):
    """Unknown fields are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # an extension of vLLM: usage in every chunk
    include_obfuscation: Ignored


class Sampling(Strict):
    """What every request that generates has."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are taken only with one of these values, under which they do nothing."""

    model: str
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Count | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: str | Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    user: Ignored

    # Extensions, as vLLM names them.
    ignore_eos: bool | None = None
    min_p: Share | None = None
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] | None = None  # the smaller goes first
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None = None
    stop_token_ids: Ids | None = None
    top_k: int | None = None


class ContentPart(BaseModel):
    """Part of a message; only text is taken."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Ignored


class Message(Strict):
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (None,), "function_call": (None,)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[ContentPart] | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    name: Ignored
    refusal: Ignored
    annotations: Ignored
    audio: Any = None
    function_call: Any = None


class JsonSchema(Strict):
    name: str
    description: Ignored
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Ignored


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (None,),
        "function_call": (None,),
        "functions": (None,),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: Annotated[Items[Message], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Items[FunctionTool] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    metadata: Ignored
    prompt_cache_key: Ignored
    prompt_cache_options: Ignored
    prompt_cache_retention: Ignored
    safety_identifier: Ignored
    service_tier: Ignored
    store: Ignored

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (None, 1), "suffix": (None, "")}

    prompt: str | Items[str] | Ids | Items[Ids]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Any = None
    suffix: Any = None


class TokenizeRequest(Strict):
    """``POST /tokenize``, as vLLM has it: ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1)] | None = None
    tools: Items[FunctionTool] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ids
