"""The requests of OpenAI's Responses API. Each field is supported, ignored or refused, as in ``openai.schema``.

Unknown fields of a request are refused, those of items and tools are ignored: clients send back what they received.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from overfill.api.chat import MAX_MESSAGES, MAX_PARTS
from overfill.api.openai.schema import Extensible, Generating, Ignored, Items, Strict, refused
from overfill.api.reasoning import Effort
from overfill.api.tools import MAX_TOOLS

MAX_METADATA = 16  # pairs, of at most 64 and 512 characters, as at OpenAI
_STATELESS = "nothing is stored; send all items of the conversation as 'input'"

Name = Annotated[str, Field(max_length=128)]
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class _Open(BaseModel):
    """Base class that keeps unknown fields, to name or to repeat them."""

    model_config = ConfigDict(extra="allow", strict=True)


class ItemPart(_Open):
    """Part of a message, of a tool's output, or of reasoning; only text is supported."""

    type: str
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[Items[ItemPart], Field(max_length=MAX_PARTS)]


class FlatFunctionTool(_Open):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class InputFormat(Extensible):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(_Open):
    """A tool whose argument is text."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: InputFormat | None = None


class OtherTool(_Open):
    """A tool that OpenAI's servers run, or that only some clients know, such as ``web_search``."""

    type: Name


def _type(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _kind_of_member(tool: Any) -> str:
    kind = _type(tool)
    return kind if kind in ("function", "custom") else "other"


def _kind_of_tool(tool: Any) -> str:
    return "namespace" if _type(tool) == "namespace" else _kind_of_member(tool)


_Function = Annotated[FlatFunctionTool, Tag("function")]
_Custom = Annotated[CustomTool, Tag("custom")]
_Other = Annotated[OtherTool, Tag("other")]
Member = Annotated[_Function | _Custom | _Other, Discriminator(_kind_of_member)]


class NamespaceTool(_Open):
    """Tools whose names are unique within the namespace only."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[Items[Member], Field(max_length=MAX_TOOLS)]


Tool = Annotated[
    _Function | _Custom | Annotated[NamespaceTool, Tag("namespace")] | _Other, Discriminator(_kind_of_tool)
]
Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS)]


class MessageItem(Extensible):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class FunctionCallItem(Extensible):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(Extensible):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class CallOutputItem(Extensible):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | Parts


class ReasoningItem(Extensible):
    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: str | None = None


class AdditionalToolsItem(Extensible):
    """Tools beside those of the request. Codex sends its tools so to some models."""

    type: Literal["additional_tools"]
    tools: Tools


class OtherItem(_Open):
    type: str = "item_reference"


ITEM_TYPES = {
    "message": "message",
    "function_call": "function_call",
    "custom_tool_call": "custom_tool_call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
    "reasoning": "reasoning",
    "additional_tools": "additional_tools",
}
"""Items that are supported: the type, and the tag of its class."""


def _kind_of_item(item: Any) -> str:
    if not isinstance(item, dict) or ("role" in item and "type" not in item):
        return "message"
    kind = item.get("type")
    return ITEM_TYPES.get(kind, "other") if isinstance(kind, str) else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[AdditionalToolsItem, Tag("additional_tools")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind_of_item),
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: Ignored
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict):
    effort: Effort | None = None
    context: Ignored
    generate_summary: Ignored
    mode: Ignored
    summary: Ignored


class ChosenTool(_Open):
    """A tool's name in ``tool_choice``."""

    type: Name
    name: Name | None = None
    namespace: Name | None = None


class ToolChoiceObject(ChosenTool):
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[Items[ChosenTool], Field(min_length=1)] | None = None


class ResponsesRequest(Generating):
    """``POST /v1/responses``."""

    ITEMS: ClassVar[str] = "input"

    input: str | Annotated[Items[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    include: Annotated[Items[str], Field(max_length=16)] | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=MAX_METADATA)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    reasoning: ReasoningOptions | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject | None = None
    tools: Tools | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    # An extension, with the name that it has in ``/v1/chat/completions``.
    chat_template_kwargs: dict[str, Any] | None = None

    access_programs: Ignored
    background_options: Ignored
    client_metadata: Ignored
    image: Ignored
    max_tool_calls: Ignored
    prompt_cache_options: Ignored
    prompt_cache_retention: Ignored
    service_tier: Ignored
    stream_options: Ignored

    background: Any = refused(f"{_STATELESS}, and wait for the answer or stream it", False)
    context_management: Any = refused("nothing is compacted here; the client shortens 'input' itself", [])
    conversation: Any = refused(_STATELESS)
    moderation: Any = refused("no moderation model is served; leave it out")
    previous_response_id: Any = refused(_STATELESS)
    prompt: Any = refused("no prompts are stored; send its text as 'instructions' and 'input'")
    store: Any = refused("this server stores no responses; leave it out or send false", False)
    top_logprobs: Any = refused("'/v1/chat/completions' has log-probabilities", 0)

    @property
    def named_session(self) -> str | None:
        return self.prompt_cache_key
