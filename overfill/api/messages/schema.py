"""The requests of Anthropic's Messages API. Each field is supported, ignored or refused.

Types are strict: a number in quotes is an error. Unknown fields are ignored, because betas add them. Fields marked
``Ignored`` have no effect on an answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from overfill.api.chat import MAX_MESSAGES, MAX_PARTS
from overfill.api.openai.schema import MAX_INT32, Extensible, Ignored, Items, Temperature, UnitInterval
from overfill.api.sessions import session_of_user
from overfill.api.tools import MAX_TOOLS
from overfill.request.params import MAX_STOPS


class TextBlock(Extensible):
    type: Literal["text"]
    text: str


class ToolUseBlock(Extensible):
    type: Literal["tool_use"]
    id: str
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


class ThinkingBlock(Extensible):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Extensible):
    type: Literal["redacted_thinking"]
    data: Ignored


class ToolReferenceBlock(Extensible):
    """The name of a tool that a search has found."""

    type: Literal["tool_reference"]
    tool_name: str


class ToolReference(Extensible):
    name: str = ""  # references to the tools of a server have others


class ToolChangeBlock(Extensible):
    """Offers a tool from here on, or no longer."""

    type: Literal["tool_addition", "tool_removal"]
    tool: ToolReference


class OtherBlock(Extensible):
    """A block that is refused, such as an image."""

    type: str


_TAGS = {
    "text": "text block",
    "tool_use": "tool use",
    "tool_result": "tool result",
    "thinking": "thinking block",
    "redacted_thinking": "redacted block",
    "tool_reference": "reference",
    "tool_addition": "change",
    "tool_removal": "change",
}
"""Tags of the blocks' classes by type. No field has a tag's name, so that errors show only names of fields."""


def _tagged(*kinds: str) -> Discriminator:
    """Chooses the class of a block by its type, among those of ``kinds`` and ``OtherBlock``."""

    def tag(block: Any) -> str:
        kind = block.get("type") if isinstance(block, dict) else None
        return _TAGS[kind] if isinstance(kind, str) and kind in kinds else "other block"

    return Discriminator(tag)


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ToolReferenceBlock, Tag("reference")]
    | Annotated[OtherBlock, Tag("other block")],
    _tagged("text", "tool_reference"),
]


class ToolResultBlock(Extensible):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[Items[ResultBlock], Field(max_length=MAX_PARTS)] | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ToolUseBlock, Tag("tool use")]
    | Annotated[ToolResultBlock, Tag("tool result")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted block")]
    | Annotated[ToolChangeBlock, Tag("change")]
    | Annotated[OtherBlock, Tag("other block")],
    _tagged(*(_TAGS.keys() - {"tool_reference"})),
]


class Message(Extensible):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[Items[Block], Field(max_length=MAX_PARTS)]


class ToolParam(Extensible):
    """A tool of the client, which brings its schema, or one that Anthropic defines, which has a type."""

    type: str | None = None
    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(Extensible):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Extensible):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Extensible):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Extensible):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Extensible):
    user_id: str | None = None


class CountTokensRequest(Extensible):
    """``POST /v1/messages/count_tokens``, and the fields that both requests have."""

    model: str
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[Items[TextBlock], Field(max_length=MAX_PARTS)] | None = None
    thinking: Thinking | None = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[Items[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    output_config: OutputConfig | None = None

    cache_control: Ignored
    context_management: Ignored
    mcp_servers: Any = None


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)]
    metadata: Metadata | None = None
    stop_sequences: Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    thread: Any = None  # refused
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    top_p: UnitInterval | None = None

    container: Ignored
    diagnostics: Ignored
    inference_geo: Ignored
    service_tier: Ignored
    speed: Ignored
    user_profile_id: Ignored
    workspace_id: Ignored

    @property
    def named_session(self) -> str | None:
        user_id = None if self.metadata is None else self.metadata.user_id
        return None if user_id is None else session_of_user(user_id)
