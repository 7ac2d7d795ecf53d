"""Tests what becomes of a request of the Responses API: messages, tools, options, and the names of wrong fields."""

import json
from types import SimpleNamespace

import pytest
from google.protobuf.json_format import MessageToDict

from overfill.api.chat import MAX_ITEMS, MAX_MESSAGES, encode_chat
from overfill.api.opaque_reasoning import encode_reasoning
from overfill.api.openai.errors import ApiError, from_error
from overfill.api.openai.parse import check_items, parse
from overfill.api.responses.schema import ResponsesRequest
from overfill.api.responses.tools import ToolSet
from overfill.api.responses.translate import _Conversation, responses
from overfill.api.tools import MAX_TOOLS
from overfill.api.tools_grammar import chat_grammar
from overfill.errors import InvalidRequest, PromptTooLong
from overfill.v1 import inference_pb2

USER = {"role": "user", "content": "Hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "d", "parameters": CITY}
PATCH = {"type": "custom", "name": "patch", "description": "Not JSON."}
FILES = {"type": "namespace", "name": "mcp__fs", "description": "", "tools": [WEATHER | {"name": "read"}, PATCH]}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Paris"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Sunny"}


def translate(**fields):
    return responses(parse(ResponsesRequest, json.dumps({"model": "m", "input": "Hi"} | fields).encode()), "resp_1")


def chat(**fields):
    return translate(**fields).generate.chat


def message(role, content="", **more):
    return {"role": role} | ({"content": content} if content else {}) | more


def call(name, arguments, id="c1"):
    return {"id": id, "name": name, "arguments": arguments}


def part(kind, text):
    return {"type": kind, "text": text}


MESSAGES = {
    "text": ("Hi", [message("user", "Hi")]),
    "items without a type": ([USER, {"role": "assistant", "content": "Yes"}],
        [message("user", "Hi"), message("assistant", "Yes")]),
    "developer, early and late": ([{"role": "developer", "content": "A"}, USER, {"role": "system", "content": "B"}],
        [message("system", "A"), message("user", "Hi"), message("system", "B")]),
    "parts": ([{"role": "user", "content": [part("input_text", "a"), part("input_text", "b")]}],
        [message("user", "a\nb")]),
    "an answer, as this server writes it": (
        [{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "final_answer",
            "content": [part("output_text", "a") | {"annotations": [], "logprobs": []}]}],
        [message("assistant", "a")]),
    "a refusal": ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}],
        [message("assistant", "No")]),
    "one turn of reasoning, text and calls is one message": (
        [USER, {"type": "reasoning", "summary": [], "content": [part("reasoning_text", "Hm")]},
            {"role": "assistant", "content": "I look."}, CALL, CALL | {"call_id": "c2"}, RESULT,
            RESULT | {"call_id": "c2", "output": [part("input_text", "a"), part("input_text", "b")]}],
        [message("user", "Hi"),
            message("assistant", "I look.", reasoning="Hm", toolCalls=[
                call("weather", '{"city":"Paris"}'), call("weather", '{"city":"Paris"}', "c2")]),
            message("tool", "Sunny", toolCallId="c1"), message("tool", "a\nb", toolCallId="c2")]),
    "text after calls begins another": ([CALL, {"role": "assistant", "content": "Done"}],
        [message("assistant", toolCalls=[call("weather", '{"city":"Paris"}')]), message("assistant", "Done")]),
    "so does reasoning after text": (
        [{"role": "assistant", "content": "A"}, {"type": "reasoning", "content": [part("text", "Hm")]},
            {"role": "assistant", "content": "B"}],
        [message("assistant", "A"), message("assistant", "B", reasoning="Hm")]),
    "two texts in a row are one": ([{"role": "assistant", "content": t} for t in ("A", "", "B", "")],
        [message("assistant", "A\n\nB")]),
    "reasoning by its summary": ([{"type": "reasoning", "summary": [part("summary_text", "Hm")]}, CALL],
        [message("assistant", reasoning="Hm", toolCalls=[call("weather", '{"city":"Paris"}')])]),
    "reasoning that this server wrote": (
        [{"type": "reasoning", "summary": [], "encrypted_content": encode_reasoning("Hm é")}],
        [message("assistant", reasoning="Hm é")]),
    "reasoning that only another server can read": (
        [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}, USER], [message("user", "Hi")]),
    "a custom call": (
        [{"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": 'a "b"\né'},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done"}],
        [message("assistant", toolCalls=[call("patch", '{"input": "a \\"b\\"\\né"}')]),
            message("tool", "Done", toolCallId="c1")]),
    "a call in a namespace": ([CALL | {"namespace": "mcp__fs", "name": "read"}],
        [message("assistant", toolCalls=[call("mcp__fs__read", '{"city":"Paris"}')])]),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_items_become_messages(case):
    items, messages = MESSAGES[case]
    made = MessageToDict(chat(input=items))["messages"]
    assert made == messages


def test_instructions_come_first():
    assert MessageToDict(chat(instructions="Be brief."))["messages"] == [
        message("system", "Be brief."),
        message("user", "Hi"),
    ]


def test_tools_are_flattened_and_those_that_the_server_cannot_offer_left_out():
    hosted = [{"type": "web_search", "filters": {}}, {"type": "tool_search"}, {"type": "web_search"}]
    made = translate(tools=[WEATHER, PATCH, FILES, *hosted])
    tools = made.generate.chat.tools
    assert [tool.name for tool in tools] == ["weather", "patch", "mcp__fs__read", "mcp__fs__patch"]
    assert json.loads(tools[0].parameters) == json.loads(tools[2].parameters) == CITY
    assert json.loads(tools[1].parameters)["properties"] == {"input": {"type": "string"}}
    assert made.left_out == ["web_search", "tool_search"]


@pytest.mark.parametrize(("syntax", "definition"), [("lark", 'start: "a"+'), ("regex", "a+")])
def test_a_custom_tool_s_grammar_is_enforced_and_shown(syntax, definition):
    tool = PATCH | {"format": {"type": "grammar", "syntax": syntax, "definition": definition}}
    request = chat(tools=[tool])
    assert chat_grammar(request) is not None  # raises if it refuses the tool
    [made] = request.tools
    assert getattr(made.input, syntax) == definition
    assert json.loads(made.parameters)["properties"]["input"]["description"].endswith(definition)


def test_tools_in_items_are_added_once():
    items = [{"type": "additional_tools", "role": "developer", "tools": [FILES]}]
    made = chat(input=[*items, USER, *items], tools=[WEATHER])
    assert [tool.name for tool in made.tools] == ["weather", "mcp__fs__read", "mcp__fs__patch"]
    assert [m.role for m in made.messages] == ["user"]


CHOICES = [
    ("auto", "MODE_AUTO", "", 4, False),
    ("none", "MODE_NONE", "", 4, False),
    ("required", "MODE_REQUIRED", "", 4, False),
    ({"type": "function", "name": "weather"}, "MODE_REQUIRED", "weather", 4, True),
    ({"type": "function", "namespace": "mcp__fs", "name": "read"}, "MODE_REQUIRED", "mcp__fs__read", 4, True),
    ({"type": "custom", "name": "patch"}, "MODE_REQUIRED", "patch", 4, True),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]},
        "MODE_REQUIRED", "", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "mode", "name", "tools", "single"), CHOICES)
def test_tool_choice(choice, mode, name, tools, single):
    made = chat(tools=[WEATHER, PATCH, FILES], tool_choice=choice)
    assert MessageToDict(made.tool_choice) == {"mode": mode} | ({"name": name} if name else {})
    assert (len(made.tools), made.single_tool_call) == (tools, single)


def test_options():
    generate = translate(
        max_output_tokens=7, temperature=0.5, top_p=0.9, seed=-1, stop="x", priority=1, tier="t", fallback="f",
        allow_brownout=True, chat_template_kwargs={"a": 1}, parallel_tool_calls=False, frequency_penalty=1,
        presence_penalty=-1, repetition_penalty=1.5, ignore_eos=True, top_k=5, min_p=0.25,
    ).generate  # fmt: skip
    sampling = generate.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.5, 0.9, (1 << 64) - 1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.ignore_eos, sampling.top_k, sampling.min_p) == (True, 5, 0.25)
    assert (list(generate.stop), generate.priority, generate.tier, generate.fallback) == (["x"], 1, "t", "f")
    assert generate.allow_brownout
    assert generate.chat.single_tool_call
    assert json.loads(generate.chat.chat_template_kwargs) == {"a": 1}
    assert generate.request_id == "resp_1"
    greedy = translate(temperature=0, top_p=0.5, top_k=3).generate.sampling
    assert not greedy.HasField("top_p")
    assert not greedy.HasField("top_k")


def test_reasoning_effort_switches_the_thinking_on_and_off():
    made = [chat(reasoning={"effort": effort}).chat_template_kwargs for effort in ("none", "high")]
    assert [json.loads(variables)["enable_thinking"] for variables in made] == [False, True]
    mine = {"enable_thinking": True}
    made = json.loads(chat(reasoning={"effort": "none"}, chat_template_kwargs=mine).chat_template_kwargs)
    assert made["enable_thinking"] is True
    assert not chat(reasoning={"summary": "auto"}).chat_template_kwargs


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMATS = [
    ({"type": "text"}, {}),
    ({"type": "json_object"}, {"jsonObject": True}),
    ({"type": "json_schema", "name": "n", "schema": SCHEMA}, {"jsonSchema": json.dumps(SCHEMA)}),
    ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
        {"jsonSchema": json.dumps(SCHEMA | {"additionalProperties": False})}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "grammar"), FORMATS)
def test_text_format(form, grammar):
    assert MessageToDict(translate(text={"format": form}).generate.sampling.grammar) == grammar


MANY = [WEATHER | {"name": f"f{i}"} for i in range(MAX_TOOLS)]
BAD = [
    ({"input": []}, "input", "at least 1 item"),
    ({"input": 5}, "input", "valid string"),
    ({"input": [5]}, "input[0]", "object"),
    ({"input": [{}]}, "input[0].type", "nothing is stored"),
    ({"input": [{"role": "root", "content": "x"}]}, "input[0].role", "'developer'"),
    ({"input": [USER, {"role": "user"}]}, "input[1].content", "Missing"),
    ({"input": [{"role": "user", "content": None}]}, "input[0].content", "valid string"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "send the items; nothing is stored"),
    ({"input": [{"type": "computer_call", "action": 5}]}, "input[0].type", "'computer_call' is not supported"),
    ({"input": [{"type": 7}]}, "input[0].type", "valid string"),
    ({"input": [{"role": "user", "content": [part("input_text", None)]}]}, "input[0].content[0]", "no text"),
    *(({"input": [{"role": "user", "content": [{"type": kind}]}]}, "input[0].content[0].type", "text only")
        for kind in ("input_image", "input_file", "input_audio")),
    ({"input": [CALL, RESULT | {"output": [{"type": "input_image"}]}]}, "input[1].output[0].type", "text only"),
    ({"input": [RESULT]}, "input[0].call_id", "'c1', but no call before it"),
    ({"input": [CALL, RESULT | {"call_id": "c2"}]}, "input[1].call_id", "'c2', but no call before it"),
    ({"input": [CALL, RESULT | {"type": "custom_tool_call_output"}]}, "input[1].type", "a 'function_call_output'"),
    ({"input": [CALL | {"arguments": {"a": 1}}]}, "input[0].arguments", "valid string"),
    ({"input": [USER] * (MAX_MESSAGES + 1)}, "input", f"at most {MAX_MESSAGES} items"),
    ({"tools": [{"name": "x"}]}, "tools[0].type", "Missing"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "'weather', which is another tool's name too"),
    ({"tools": [FILES, FILES]}, "tools[1].name", "'mcp__fs', which is another namespace's name too"),
    ({"tools": [WEATHER | {"name": "mcp__fs__read"}, FILES]}, "tools[1].tools[0].name", "another tool's name too"),
    ({"tools": [FILES | {"tools": [FILES]}]}, "tools[0].tools[0].type", "no namespaces in them"),
    ({"tools": [*MANY, PATCH]}, "tools", f"at most {MAX_TOOLS} items"),
    ({"tools": [FILES | {"tools": MANY}, PATCH]}, "tools[1]", f"at most {MAX_TOOLS} tools"),
    ({"tools": [PATCH | {"format": {"type": "grammar", "syntax": "lark"}}]}, "tools[0].format", "'definition'"),
    ({"tools": [PATCH | {"format": {"type": "grammar", "syntax": "gbnf"}}]}, "tools[0].format.syntax", "'lark' or"),
    ({"tool_choice": "required"}, "tool_choice", "no tool"),
    ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice", "no tool"),
    ({"tool_choice": {"type": "web_search"}, "tools": [WEATHER]}, "tool_choice.type", "runs no tools"),
    ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "tool_choice.name", "'x'"),
    ({"tool_choice": {"type": "custom", "name": "weather"}, "tools": [WEATHER]}, "tool_choice.name", "custom tools"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}, "tools": [WEATHER]}, "tool_choice", "needs 'mode'"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, "tools": [WEATHER]},
        "tool_choice.tools[0].type", "runs no tools"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "is missing"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "'json_schema'"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 1 << 40}, "max_output_tokens", "2^32"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'minimal'"),
    ({"truncation": "middle"}, "truncation", "'disabled'"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "at most 512"),
    ({"made_up": 1}, "made_up", "Unrecognized"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[f"{param}-{words}" for _, param, words in BAD])
def test_a_wrong_request_is_refused_with_the_client_s_name_of_the_field(fields, param, words):
    with pytest.raises(ApiError) as caught:
        translate(**fields)
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert param in error.message


ROUTER = [
    ("chat.messages[0].role", "instructions.role"),
    ("chat.messages[1]", "input[0]"),
    ("chat.messages[2].tool_calls[1].name", "input[3].name"),
    ("chat.messages[3].content", "input[4].content"),
    ("chat.messages", "input"),
    ("prompt", "input"),
    ("chat.tools[0].parameters", "tools[1].parameters"),
    ("chat.tools[2].input.lark", "tools[2].tools[1].format.definition"),
    ("chat.tools[3].name", "input[5].tools[0].name"),
    ("chat.tools", "tools"),
    ("chat.chat_template_kwargs.tools", "chat_template_kwargs.tools"),
    ("chat.documents", "chat_template_kwargs.documents"),
    ("sampling.max_tokens", "max_output_tokens"),
    ("sampling.top_k", "top_k"),
    ("sampling.grammar.json_schema", "text.format.schema"),
    ("tier", "tier"),
]


@pytest.mark.parametrize("kind", [InvalidRequest, PromptTooLong])
@pytest.mark.parametrize(("field", "param"), ROUTER)
def test_errors_of_the_router_get_the_client_s_name_of_the_field(kind, field, param):
    made = translate(
        instructions="x",
        input=[USER, {"role": "assistant", "content": "a"}, CALL, CALL | {"call_id": "c2"}, RESULT,
            {"type": "additional_tools", "tools": [WEATHER | {"name": "x"}]}],
        tools=[{"type": "web_search"}, WEATHER, FILES],
    )  # fmt: skip
    shown = from_error(made.own_field(kind(field, "is wrong")))
    assert (shown.param, shown.message) == (param, f"'{param}' is wrong")
    assert shown.code == ("context_length_exceeded" if kind is PromptTooLong else "invalid_value")


def test_what_the_router_finds_wrong_with_a_tool_has_its_place_in_the_request(byte_level_tokenizer):
    made = translate(tools=[WEATHER | {"name": "a b"}])
    with pytest.raises(InvalidRequest) as caught:
        encode_chat(made.generate.chat, byte_level_tokenizer)
    assert from_error(made.own_field(caught.value)).param == "tools[0].name"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "user", "content": [part("input_text", "x")] * MAX_ITEMS}]}, "input"),
        ({"input": [USER], "tools": [FILES | {"tools": [WEATHER] * MAX_ITEMS}]}, "tools"),
        ({"input": [{"type": "additional_tools", "tools": [FILES | {"tools": [WEATHER] * MAX_ITEMS}]}]}, "input"),
    ],
)
def test_long_lists_are_counted_before_they_are_parsed(fields, param):
    with pytest.raises(ApiError, match=f"at most {MAX_ITEMS} are allowed") as caught:
        check_items(json.dumps(fields).encode(), "input")
    assert caught.value.param == param


def test_nesting_is_bounded():
    body = b'{"model": "m", "input": [{"role": "user", "content": %b}]}' % (b"[" * 5000 + b"]" * 5000)
    with pytest.raises(ApiError):
        parse(ResponsesRequest, body)


def test_thousands_of_items_of_one_message_are_joined_once():
    sets = []

    class Message:
        tool_calls = ()

        def __setattr__(self, name, value):
            sets.append((name, len(value)))

    kept = SimpleNamespace(messages=SimpleNamespace(add=lambda role: Message()))
    items = [{"type": "reasoning", "content": [part("text", "Hm")]}] * 9 + [{"role": "assistant", "content": "A"}] * 9
    request = parse(ResponsesRequest, json.dumps({"model": "m", "input": items}).encode())
    _Conversation(kept, ToolSet(inference_pb2.Chat().tools)).add(request.input)
    assert sets == [("reasoning", 18), ("content", 25)]
