"""Cases for every field, item and tool of the Responses API: tests run them, and the docs' tables are made of them.

``python tests/integration/responses_cases.py`` writes the tables into ``docs/reference/responses.md``. A test fails
when a table or the server differs from the cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import marked_tables
import pytest
from openai_cases import Ask, Case, NotAnswered

from overfill.api.openai.schema import refusals
from overfill.api.responses.schema import ResponsesRequest

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
CUSTOM = {"type": "custom_tool_call", "call_id": "c", "name": "g", "input": "x"}
USER = {"role": "user", "content": "Hi"}


def text(response: dict[str, Any]) -> str:
    """Returns the text of the response's messages."""
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def names(response: dict[str, Any]) -> list[str]:
    """Returns the names of the called tools."""
    return [item["name"] for item in response["output"] if item["type"].endswith("call")]


def prompt(response: dict[str, Any]) -> int:
    return response["usage"]["input_tokens"]


def _refused(ask: Ask, param: str, words: str = "", **fields: Any) -> None:
    with pytest.raises(NotAnswered) as caught:
        ask(**fields)
    assert (caught.value.status, caught.value.error["param"]) == (400, param), caught.value
    assert words in caught.value.error["message"]


def _differs(**fields: Any) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        assert text(ask(**fields)) != text(ask())

    return check


def _same(**fields: Any) -> Callable[[Ask], None]:
    """Returns a check that the field is accepted. What it does to the probabilities does not count."""

    def check(ask: Ask) -> None:
        assert ask(**fields)["status"] == "incomplete"

    return check


def _repeated(**fields: Any) -> Callable[[Ask], None]:
    """Returns a check that the response repeats the field, which does not change the answer."""

    def check(ask: Ask) -> None:
        made = ask(**fields)
        assert {name: made[name] for name in fields} == fields
        assert text(made) == text(ask())

    return check


def _longer(**fields: Any) -> Callable[[Ask], None]:
    """Returns a check that the prompt becomes longer."""

    def check(ask: Ask) -> None:
        assert prompt(ask(**fields)) > prompt(ask())

    return check


def _input(ask: Ask) -> None:
    assert text(ask(input="Hi")) == text(ask(input=[USER]))
    _refused(ask, "input", input=[])


def _include(ask: Ask) -> None:
    assert text(ask(include=["reasoning.encrypted_content"])) == text(ask())


def _max_output_tokens(ask: Ask) -> None:
    made = ask(max_output_tokens=3)
    assert made["usage"]["output_tokens"] == made["max_output_tokens"] == 3
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def _model(ask: Ask) -> None:
    with pytest.raises(NotAnswered) as caught:
        ask(model="other")
    assert caught.value.status == 404


def _parallel(ask: Ask) -> None:
    made = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=400)
    assert names(made) == ["f"]


def _store(ask: Ask) -> None:
    assert ask(store=False)["store"] is False
    _refused(ask, "store", "stores no responses", store=True)


def _stop(ask: Ask) -> None:
    whole = text(ask())
    word = whole.split()[1]
    assert text(ask(stop=word)) == text(ask(stop=[word, "never"])) == whole[: whole.index(word)]


def _stream(ask: Ask) -> None:
    events = ask(stream=True)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text(ask()) == text(events[-1]["response"])


def _seed(ask: Ask) -> None:
    assert text(ask(seed=5)) == text(ask(seed=5))
    assert len({text(ask(seed=seed)) for seed in range(-3, 4)}) > 1


def _text(ask: Ask) -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    made = ask(text={"format": form, "verbosity": "low"}, max_output_tokens=100)
    assert json.loads(text(made))["a"] in (1, 2)
    assert made["text"]["format"] == form


def _tools(ask: Ask) -> None:
    made = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=400)
    assert json.loads(made["output"][0]["arguments"])["a"] in (1, 2)


def _tool_choice(ask: Ask) -> None:
    tools = [TOOL, TOOL | {"name": "g"}]
    for choice in ({"type": "function", "name": "g"}, {"type": "allowed_tools", "mode": "required",
            "tools": [{"type": "function", "name": "g"}]}):  # fmt: skip
        made = ask(tools=tools, tool_choice=choice, max_output_tokens=400)
        assert set(names(made)) == {"g"}
    assert names(ask(tools=tools, tool_choice="none")) == []
    _refused(ask, "tool_choice.type", "runs no tools", tools=tools, tool_choice={"type": "web_search"})


def _truncation(ask: Ask) -> None:
    for value in ("auto", "disabled"):
        assert ask(truncation=value)["truncation"] == "disabled"
        _refused(ask, "input", "context", truncation=value, input="Hi " * 5000)


def _reasoning(ask: Ask) -> None:
    made = ask(reasoning={"effort": "low", "summary": "auto"})
    assert made["reasoning"] == {"effort": "low", "summary": None}


def _template(ask: Ask) -> None:
    assert prompt(ask(chat_template_kwargs={"made_up": 1})) == prompt(ask())
    _refused(ask, "chat_template_kwargs.tools", chat_template_kwargs={"tools": 1})


def _tier(ask: Ask) -> None:
    assert text(ask(tier="default", fallback="none", allow_brownout=True)) == text(ask())


# fmt: off
REQUEST = [
    Case("access_programs", "ignored", "", value={"cyber": "standard"}),
    Case("background", "refused", value=True),
    Case("background_options", "ignored", "", value={}),
    Case("client_metadata", "ignored", "", value={"session_id": "s"}),
    Case("context_management", "refused", value=[{"type": "compaction"}]),
    Case("conversation", "refused", value="conv_1"),
    Case("image", "ignored", "", value={"context_compression": "auto"}),
    Case("include", "supported",
        "`reasoning.encrypted_content` gives reasoning items a text that the client sends back, as Codex does; other "
        "values have no effect", check=_include),
    Case("input", "supported", "a text, or 1 to 4,096 [items](#items)", check=_input),
    Case("instructions", "supported", "the first system message", check=_longer(instructions="Be brief.")),
    Case("max_output_tokens", "supported", "reasoning included; a cut answer has the status `incomplete`",
        check=_max_output_tokens),
    Case("max_tool_calls", "ignored", "it counts calls of hosted tools, of which there are none", value=3),
    Case("metadata", "supported", "repeated; at most 16 pairs, of at most 64 and 512 characters",
        check=_repeated(metadata={"a": "b"})),
    Case("model", "supported", "any of the served names; responses have the first", check=_model),
    Case("moderation", "refused", value={"model": "m"}),
    Case("parallel_tool_calls", "supported", "false: at most one call", check=_parallel),
    Case("previous_response_id", "refused", value="resp_1"),
    Case("prompt", "refused", value={"id": "p"}),
    Case("prompt_cache_key", "supported", "names the [session](openai.md#sessions); repeated",
        check=_repeated(prompt_cache_key="k")),
    Case("prompt_cache_options", "ignored", "prefixes are always cached", value={"mode": "implicit"}),
    Case("prompt_cache_retention", "ignored", "prefixes are always cached", value="24h"),
    Case("reasoning", "supported",
        "`effort` goes to the chat template, as `reasoning_effort` of chats; `summary`, `generate_summary`, `context` "
        "and `mode` have no effect: reasoning items have all of the reasoning as `content`, and no summary",
        check=_reasoning),
    Case("safety_identifier", "supported", "repeated", check=_repeated(safety_identifier="s")),
    Case("service_tier", "ignored", "the response has `default`", value="flex"),
    Case("store", "refused", value=True),
    Case("stream", "supported", "with an event `response.in_progress` after each 10 s of silence", check=_stream),
    Case("stream_options", "ignored", "", value={"include_obfuscation": False}),
    Case("temperature", "supported", "0 to 2; 1 by default", check=_same(temperature=0)),
    Case("text", "supported",
        "`format`: `text`, `json_object` or `json_schema`, [guaranteed](openai.md#structured-answers) by a grammar; "
        "`verbosity` has no effect", check=_text),
    Case("tool_choice", "supported",
        "`none`, `auto`, `required`, a `function` or `custom` tool, with `namespace` if it is in one, or "
        "`allowed_tools`: the prompt shows only the tools that it names; hosted tools get 400", check=_tool_choice),
    Case("tools", "supported", "at most 128, those in namespaces included; see [tools](#tools)", check=_tools),
    Case("top_logprobs", "refused", value=3),
    Case("top_p", "supported", "", check=_same(top_p=0.5)),
    Case("truncation", "supported",
        "`disabled`; `auto` is accepted and drops nothing, and the response has `disabled`: a prompt that does not fit "
        "gets 400 `context_length_exceeded`, and the client decides what to leave out", check=_truncation),
    Case("user", "supported", "repeated", check=_repeated(user="u")),
]

EXTENSIONS = [
    Case("allow_brownout", "supported", "", check=_tier),
    Case("chat_template_kwargs", "supported", "goes before `reasoning`", check=_template),
    Case("fallback", "supported", "", check=_tier),
    Case("frequency_penalty", "supported", "", check=_same(frequency_penalty=1)),
    Case("ignore_eos", "supported", "", check=_same(ignore_eos=True)),
    Case("min_p", "supported", "", check=_same(min_p=0.1)),
    Case("presence_penalty", "supported", "", check=_same(presence_penalty=1)),
    Case("priority", "supported", "", check=_same(priority=1)),
    Case("repetition_penalty", "supported", "", check=_same(repetition_penalty=2)),
    Case("seed", "supported", "", check=_seed),
    Case("stop", "supported", "", check=_stop),
    Case("tier", "supported", "", check=_tier),
    Case("top_k", "supported", "", check=_same(top_k=5)),
]


def _items(*items: dict[str, Any]) -> Callable[[Ask], None]:
    """Returns a check that the prompt holds the items."""
    def check(ask: Ask) -> None:
        assert prompt(ask(input=[USER, *items])) > prompt(ask(input=[USER]))

    return check


def _other_item(kind: str) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        _refused(ask, "input[0].type", f"{kind!r} is not supported", input=[{"type": kind, "id": "x"}])

    return check


def _outputs(kind: str, call: dict[str, Any]) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        made = {"type": kind, "call_id": "c"}
        parts = ask(input=[USER, call, made | {"output": [{"type": "input_text", "text": "x"}]}])
        assert prompt(parts) == prompt(ask(input=[USER, call, made | {"output": "x"}]))
        _refused(ask, "input[1].call_id", "no call before it", input=[USER, made | {"output": "x"}])

    return check


def _additional(ask: Ask) -> None:
    items = [{"type": "additional_tools", "role": "developer", "tools": [TOOL]}, USER]
    assert names(ask(input=items, tool_choice="required", parallel_tool_calls=False, max_output_tokens=400)) == ["f"]


def _reference(ask: Ask) -> None:
    _refused(ask, "input[0].type", "send the items; nothing is stored", input=[{"type": "item_reference", "id": "x"}])


ITEMS = [
    Case("message", "supported",
        "`role` is `user`, `assistant`, `system` or `developer`, anywhere; `content` is a text, or parts `input_text`, "
        "`output_text` and `refusal`. Images, files and audio get 400. The type may be left out",
        check=_items({"role": "developer", "content": "x"})),
    Case("function_call", "supported", "with `namespace` as the response had it", check=_items(CALL)),
    Case("function_call_output", "supported", "a text or parts; its call must precede it",
        check=_outputs("function_call_output", CALL)),
    Case("custom_tool_call", "supported", "", check=_items(CUSTOM)),
    Case("custom_tool_call_output", "supported", "as `function_call_output`",
        check=_outputs("custom_tool_call_output", CUSTOM)),
    Case("reasoning", "supported",
        "its `content`, else the `encrypted_content` of this server, else its `summary`; the chat template decides "
        "which turns show theirs. The `encrypted_content` of other servers is left out",
        check=_items({"type": "reasoning", "summary": []}, {"role": "assistant", "content": "x"})),
    Case("additional_tools", "supported", "its `tools` are added to those of the request", check=_additional),
    Case("item_reference", "refused", "nothing is stored; send the items", check=_reference),
    *(Case(kind, "refused", "this server has no such tool", check=_other_item(kind)) for kind in (
        "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction", "compaction_trigger",
        "computer_call", "computer_call_output", "configuration_update", "file_search_call", "image_generation_call",
        "local_shell_call", "local_shell_call_output", "mcp_approval_request", "mcp_approval_response", "mcp_call",
        "mcp_list_tools", "program", "program_output", "shell_call", "shell_call_output", "tool_search_call",
        "tool_search_output", "web_search_call")),
]


def _custom(ask: Ask) -> None:
    tool = {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"}}
    made = ask(tools=[tool], tool_choice={"type": "custom", "name": "g"}, max_output_tokens=400)["output"][0]
    assert made["type"] == "custom_tool_call"
    assert set(made["input"]) <= {"a", "b"}
    assert len(made["input"]) == 3


def _namespace(ask: Ask) -> None:
    tool = {"type": "namespace", "name": "n", "description": "", "tools": [TOOL]}
    choice = {"type": "function", "namespace": "n", "name": "f"}
    made = ask(tools=[tool], tool_choice=choice, max_output_tokens=400)["output"][0]
    assert (made["type"], made["namespace"], made["name"]) == ("function_call", "n", "f")
    _refused(ask, "tools[1].name", "another namespace's name", tools=[tool, tool])


TOOLS = [
    Case("function", "supported",
        "a call follows the schema as far as a grammar can enforce it; with `strict`, a schema that cannot be enforced "
        "gets 400", check=_tools),
    Case("custom", "supported",
        "its input is text; a `format` of type `grammar`, in llguidance's dialect of Lark or as a regular expression, "
        "is guaranteed. The model sees a function with the argument `input`; items and events have its text",
        check=_custom),
    Case("namespace", "supported",
        "the model sees its tools as `NAMESPACE__NAME`; calls have `namespace` and `name` again", check=_namespace),
    *(Case(kind, "ignored", "left out", value=kind) for kind in (
        "apply_patch", "code_interpreter", "computer", "computer_use_preview", "file_search", "image_generation",
        "local_shell", "mcp", "programmatic_tool_calling", "shell", "tool_search", "web_search",
        "web_search_preview")),
]
# fmt: on

TABLES: dict[str, Sequence[Case]] = {
    "Fields": REQUEST,
    "Extensions, as in chats": EXTENSIONS,
    "Items": ITEMS,
    "Tools": TOOLS,
}


def _note(case: Case) -> str:
    mark = refusals(ResponsesRequest).get(case.name)
    if mark is None:
        return case.note
    neutral = "".join(f"; `{json.dumps(value)}` is taken" for value in mark.neutral)
    return mark.reason.replace("'", "`") + neutral


def render() -> str:
    """Returns the tables in Markdown. Cases with one status and note share a row."""
    lines = []
    for title, cases in TABLES.items():
        column = "field" if cases in (REQUEST, EXTENSIONS) else "type"
        lines += [f"### {title}", "", f"| {column} | support | notes |", "|---|---|---|"]
        rows: dict[tuple[str, str], list[str]] = {}
        for case in cases:
            alone = case.name if case.status == "supported" or not _note(case) else ""
            rows.setdefault((case.status, _note(case), alone), []).append(f"`{case.name}`")
        lines += [f"| {', '.join(names)} | {status} | {note} |" for (status, note, _), names in rows.items()]
        lines.append("")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    marked_tables.write("responses.md", render())
