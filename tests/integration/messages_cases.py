"""Cases for every field of Anthropic's Messages API: tests run them, and the table in the docs is made of them.

``python tests/integration/messages_cases.py`` writes the tables into ``docs/reference/messages.md``. A test fails when
the table or the server differs from the cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import marked_tables

Fields = dict[str, Any]
Ask = Callable[..., Fields]
"""Sends the plain request with more fields; returns the message, or the error as ``{"error": TEXT}``."""


@dataclass(frozen=True)
class Case:
    """A field of a request, or a type of a block or tool.

    Attributes:
        note: text for the table.
        fields: fields of a request that has it.
        check: raises unless a supported one has its effect. An ignored one leaves the answer as it is. A refused one
            is an error that names it.
    """

    name: str
    status: Literal["supported", "ignored", "left out", "refused"]
    note: str = ""
    fields: Fields | None = None
    check: Callable[[Ask], None] | None = None


HI = [{"role": "user", "content": "Hi"}]
READ = {"name": "read", "description": "Reads.", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "a"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
ONE = {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}


def text(answer: Fields) -> str:
    return "".join(block["text"] for block in answer["content"] if block["type"] == "text")


def tokens(answer: Fields) -> int:
    """Number of tokens of the prompt."""
    usage = answer["usage"]
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"])


def longer(**fields: Any) -> Callable[[Ask], None]:
    """Checks that the fields add to the prompt."""

    def check(ask: Ask) -> None:
        assert tokens(ask(**fields)) > tokens(ask())

    return check


def turns(*contents: Any) -> Fields:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def _max_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=3)
    assert (answer["usage"]["output_tokens"], answer["stop_reason"]) == (3, "max_tokens")
    assert ask(max_tokens=0)["content"] == []
    assert ask(max_tokens=1 << 30)["stop_reason"] == "model_context_window_exceeded"
    assert "'max_tokens'" in ask(max_tokens=None)["error"]


def _model(ask: Ask) -> None:
    assert ask(model="second")["model"] == ask()["model"] == "first"
    assert "'third' does not exist" in ask(model="third")["error"]


def _stop_sequences(ask: Ask) -> None:
    whole = text(ask())
    word = whole.split()[1]
    answer = ask(stop_sequences=["never", word])
    assert (text(answer), answer["stop_reason"], answer["stop_sequence"]) == (
        whole[: whole.index(word)], "stop_sequence", word,
    )  # fmt: skip
    assert "'stop_sequences'" in ask(stop_sequences=["x"] * 17)["error"]


def _temperature(ask: Ask) -> None:
    assert text(ask(temperature=0)) == text(ask(temperature=0))
    assert len({text(ask(temperature=1)) for _ in range(8)}) > 1


def _accepted(name: str, *wrong: Any, **fields: Any) -> Callable[[Ask], None]:
    """Checks that the field is accepted, and what is wrong refused. Tests with real workers check its effect."""

    def check(ask: Ask) -> None:
        assert ask(**fields)["content"]
        for value in wrong:
            assert f"'{name}" in ask(**{name: value})["error"]

    return check


def _top_p(ask: Ask) -> None:
    _accepted("top_p", 2, "x", top_p=0.5, temperature=1)(ask)
    assert text(ask(top_p=0, temperature=1)) == text(ask(temperature=0))


def _output_config(ask: Ask) -> None:
    config = {"effort": "low", "format": {"type": "json_schema", "schema": ONE}}
    assert json.loads(text(ask(output_config=config))) == {"n": 1}
    assert "'output_config.effort'" in ask(output_config={"effort": "huge"})["error"]


def _tools(ask: Ask) -> None:
    longer(tools=[READ])(ask)
    tools = [READ | {"name": "pick", "input_schema": ONE, "type": "custom"}]
    (call,) = ask(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "pick", {"n": 1})
    assert "'tools'" in ask(tools=[READ] * 129)["error"]


def _tool_choice(ask: Ask) -> None:
    tools = [READ, READ | {"name": "pick", "input_schema": ONE}]
    (call,) = ask(tools=tools, tool_choice={"type": "tool", "name": "pick"})["content"]
    assert call["name"] == "pick"
    assert ask(tools=tools, tool_choice={"type": "none"})["content"][0]["type"] == "text"
    assert tokens(ask(tools=tools, tool_choice={"type": "none"})) == tokens(ask())
    assert "'tool_choice.name'" in ask(tools=tools, tool_choice={"type": "tool", "name": "other"})["error"]


def _messages(ask: Ask) -> None:
    once = tokens(ask(messages=[{"role": "user", "content": "Hi\nHi"}]))
    assert tokens(ask(messages=[*HI, *HI])) == once
    longer(**turns("Hi", "Ho", "Hi"))(ask)
    longer(messages=[*HI, {"role": "system", "content": "s"}])(ask)
    assert tokens(ask(**turns("Hi", "It is"))) < tokens(ask(**turns("Hi", "It is", "Hi")))
    assert "'messages[0].role'" in ask(messages=[{"role": "tool", "content": "x"}])["error"]


def _deferred(ask: Ask) -> None:
    tools = [READ | {"defer_loading": True}]
    assert tokens(ask(tools=tools)) == tokens(ask())
    found = turns("Hi", [CALL], [RESULT | {"content": [{"type": "tool_reference", "tool_name": "read"}]}])
    assert tokens(ask(tools=tools, **found)) > tokens(ask(**found))


def _changes(ask: Ask) -> None:
    def change(kind: str) -> Fields:
        return {"type": kind, "tool": {"type": "tool_reference", "name": "read"}}

    tools = [READ | {"defer_loading": True}]
    added = [*HI, {"role": "system", "content": [change("tool_addition")]}]
    assert tokens(ask(tools=tools, messages=added)) > tokens(ask(messages=added))
    removed = [*added, {"role": "system", "content": [change("tool_removal")]}]
    assert tokens(ask(tools=tools, messages=removed)) == tokens(ask(messages=added))


def _is_error(ask: Ask) -> None:
    results = [tokens(ask(**turns("Hi", [CALL], [RESULT | {"is_error": failed}]))) for failed in (False, True)]
    assert results[0] < results[1]
    assert "no 'tool_use' block" in ask(**turns([RESULT]))["error"]


def _stream(ask: Ask) -> None:
    assert text(ask(stream=True)) == text(ask())


def _thinking(ask: Ask) -> None:
    for kind in ("enabled", "adaptive", "disabled", "between_tools"):
        assert ask(thinking={"type": kind, "budget_tokens": 1024, "display": "omitted"})["content"]
    assert "'thinking.type'" in ask(thinking={"type": "deep"})["error"]


def _ignored(name: str, value: Any, note: str = "") -> Case:
    return Case(name, "ignored", note, {name: value})


# fmt: off
REQUEST = [
    Case("max_tokens", "supported",
        "required. More than the context leaves counts as what it leaves; an answer that reaches this end has the "
        "`stop_reason` `model_context_window_exceeded`. 0 reads the prompt into the prefix cache and answers nothing",
        check=_max_tokens),
    Case("messages", "supported",
        "1 to 4,096; roles `user`, `assistant`, and `system` anywhere. Consecutive messages of one role are joined. "
        "A last message of the assistant is continued", check=_messages),
    Case("model", "supported", "any of the served names; answers have the first", check=_model),
    Case("output_config", "supported",
        "`format` is guaranteed by a grammar; `effort` goes to the chat template, as `reasoning_effort` of chats",
        check=_output_config),
    Case("stop_sequences", "supported", "at most 16, of at most 256 characters", check=_stop_sequences),
    Case("stream", "supported", "with a `ping` after each 10 s of silence, as while a long prompt is read",
        check=_stream),
    Case("system", "supported", "a text, or text blocks, which are joined by line breaks", check=longer(system="s")),
    Case("temperature", "supported", "0 to 2; 1 by default", check=_temperature),
    Case("thinking", "supported",
        "`disabled` switches the thinking of a reasoning model off, `enabled` on; the others leave it to the chat "
        "template and to `effort`. With `display: omitted` thinking blocks have no text: their `signature` carries it, "
        "so that the model finds it in the next turn. `budget_tokens` is ignored: thinking counts towards `max_tokens`",
        check=_thinking),
    Case("tool_choice", "supported", "with `tool`, the model calls the tool once", check=_tool_choice),
    Case("tools", "supported", "at most 128; see [tools](#tools)", check=_tools),
    Case("top_k", "supported", "0 means all tokens", check=_accepted("top_k", -1, "x", top_k=5, temperature=1)),
    Case("top_p", "supported", "", check=_top_p),
    Case("metadata", "supported",
        "`user_id` names the [session](openai.md#sessions); of Claude Code's value, the session in it",
        check=_accepted("metadata", {"user_id": 5}, 5, metadata={"user_id": "u"})),
    Case("mcp_servers", "left out", "the server connects to none; the client calls tools",
        {"mcp_servers": [{"type": "url", "name": "x", "url": "https://x"}]}),
    _ignored("billing_policy", {"x": 1}),
    _ignored("cache_control", {"type": "ephemeral"}, "here and in every block and tool: prefixes are always cached"),
    _ignored("compaction", {"x": 1}),
    _ignored("container", "c"),
    _ignored("context_management", {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    _ignored("diagnostics", {"previous_message_id": "msg_1"}),
    _ignored("fallback_credit_token", "x"),
    _ignored("fallbacks", [{"model": "other"}]),
    _ignored("inference_geo", "eu"),
    _ignored("service_tier", "auto"),
    _ignored("speed", "fast"),
    Case("thread", "refused",
        "the server stores nothing. Anthropic's tool runner then sends the whole conversation",
        {"thread": {"type": "create"}}),
    _ignored("user_profile_id", "u"),
    _ignored("workspace_id", "w"),
]

BLOCKS = [
    Case("text", "supported", "", check=longer(**turns([{"type": "text", "text": "Hi you"}]))),
    Case("thinking", "supported", "of the assistant; any `signature` is accepted",
        check=_accepted("messages", **turns("Hi", [{"type": "thinking", "thinking": "t", "signature": "s"}], "Hi"))),
    Case("redacted_thinking", "ignored", "of the assistant",
        turns("Hi", [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Ho"}], "Hi")),
    Case("tool_use", "supported", "of the assistant", check=longer(**turns("Hi", [CALL], [RESULT]))),
    Case("tool_result", "supported",
        "of the user; a text or text blocks. The order of a message is kept, so text may stand before and after it. "
        "With `is_error` the model sees `Error:` before the text", check=_is_error),
    Case("tool_reference", "supported", "in a `tool_result`: offers a tool with `defer_loading` from then on",
        check=_deferred),
    Case("tool_addition", "supported", "of the system: offers a tool with `defer_loading`", check=_changes),
    Case("tool_removal", "supported", "of the system: takes it back", check=_changes),
    *(Case(kind, "refused", "", turns([{"type": kind}])) for kind in (
        "advisor_tool_result", "bash_code_execution_tool_result", "code_execution_tool_result", "compaction",
        "container_upload", "document", "fallback", "image", "mcp_tool_listing", "mcp_tool_result", "mcp_tool_use",
        "search_result", "server_tool_use", "text_editor_code_execution_tool_result", "tool_search_tool_result",
        "web_fetch_tool_result", "web_search_tool_result",
    )),
]

TOOLS = [
    Case("without a type, or `custom`", "supported",
        "`input_schema` is required. A call always parses, and follows its schema as "
        "[tools of chats](openai.md#structured-answers) do; `strict` means the same as there. "
        "Names have up to 128 letters, digits, `_` and `-`. `allowed_callers`, `eager_input_streaming` and "
        "`input_examples` are ignored", check=_tools),
    Case("with `defer_loading`", "supported",
        "offered once the conversation refers to it; at once beside one of Anthropic's tools that search, which are "
        "left out",
        check=_deferred),
    Case("of another type", "left out",
        "such as `web_search_20250305`, `bash_20250124` and `computer_…`: the server has none of Anthropic's tools",
        {"tools": [SEARCH]}),
]
# fmt: on

TABLES = {
    "Fields": ("field", REQUEST),
    "Content blocks": ("type", BLOCKS),
    "Tools": ("tool", TOOLS),
}


def render() -> str:
    """Returns the tables in Markdown."""
    lines = []
    for title, (head, cases) in TABLES.items():
        lines += [f"### {title}", "", f"| {head} | support | notes |", "|---|---|---|"]
        rows = cases if title == "Tools" else sorted(cases, key=lambda case: case.name)
        for case in rows:
            name = case.name if title == "Tools" else f"`{case.name}`"
            lines.append(f"| {name} | {case.status} | {case.note} |")
        lines.append("")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    marked_tables.write("messages.md", render())
