"""Tests how requests of the Messages API become the router's, and which are refused, by the name of which field."""

import json

import pytest

from overfill.api.messages.schema import CountTokensRequest, MessagesRequest
from overfill.api.messages.translate import count_tokens, messages
from overfill.api.opaque_reasoning import encode_reasoning
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import check_items, parse
from overfill.api.reasoning import thinking_variables
from overfill.errors import InvalidRequest, Overloaded, PromptTooLong
from overfill.v1.inference_pb2 import Chat, ToolChoice

HI = [{"role": "user", "content": "Hi"}]
READ = {"name": "read", "description": "Reads.", "input_schema": {"type": "object", "properties": {}}}
EDIT = {"name": "edit", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "é"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1"}


def translate(**fields):
    body = {"model": "m", "max_tokens": 9, "messages": HI} | fields
    return messages(parse(MessagesRequest, json.dumps(body).encode()), "msg_1")


def text(value):
    return {"type": "text", "text": value}


def chat_of(*turns, **fields):
    """The chat's messages as tuples: role, content, and what else is set."""
    chat = translate(messages=[{"role": role, "content": content} for role, content in turns], **fields).generate.chat
    found = []
    for message in chat.messages:
        calls = [(call.id, call.name, json.loads(call.arguments)) for call in message.tool_calls]
        more = tuple(filter(None, (calls, message.tool_call_id, message.reasoning)))
        found.append((message.role, message.content, *more))
    return found


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a")], [("user", "a")]),
        ([("user", [text("a"), text("b")]), ("user", "c")], [("user", "a\nb\nc")]),
        ([("user", "a"), ("assistant", "b"), ("user", [])], [("user", "a"), ("assistant", "b"), ("user", "")]),
        ([("user", "a"), ("system", [text("s")])], [("user", "a"), ("system", "s")]),
        ([("user", "a"), ("system", "s"), ("system", "t")], [("user", "a"), ("system", "s\nt")]),
        (
            [("user", "a"), ("assistant", [text("b"), CALL]), ("user", [RESULT | {"content": "r"}])],
            [("user", "a"), ("assistant", "b", [("t1", "read", {"path": "é"})]), ("tool", "r", "t1")],
        ),
        (  # the order of a turn is kept, and what follows another role opens a message
            [("assistant", [CALL]), ("user", [text("x"), RESULT, text("y"), text("z")]), ("user", "w")],
            [
                ("assistant", "", [("t1", "read", {"path": "é"})]),
                ("user", "x"),
                ("tool", "", "t1"),
                ("user", "y\nz\nw"),
            ],
        ),
        (  # parts of one turn in several messages
            [("assistant", [CALL]), ("assistant", [CALL | {"id": "t2"}]), ("user", [RESULT, RESULT])],
            [
                ("assistant", "", [("t1", "read", {"path": "é"}), ("t2", "read", {"path": "é"})]),
                ("tool", "", "t1"),
                ("tool", "", "t1"),
            ],
        ),
        (
            [("assistant", [CALL]), ("user", [RESULT | {"content": [text("a"), text("b")], "is_error": True}])],
            [("assistant", "", [("t1", "read", {"path": "é"})]), ("tool", "Error:\na\nb", "t1")],
        ),
        (
            [("assistant", [{"type": "thinking", "thinking": "hm", "signature": "?"}, text("b")]), ("user", "c")],
            [("assistant", "b", "hm"), ("user", "c")],
        ),
        (  # the signature has what the client did not want to see
            [
                ("assistant", [{"type": "thinking", "thinking": "", "signature": encode_reasoning("hm é")}, text("b")]),
                ("user", "c"),
                ("assistant", [{"type": "thinking", "thinking": "", "signature": "b3RoZXI="}]),
                ("user", "d"),
                ("assistant", [{"type": "redacted_thinking", "data": "x"}]),
                ("user", "e"),
            ],
            [
                ("assistant", "b", "hm é"),
                ("user", "c"),
                ("assistant", ""),
                ("user", "d"),
                ("assistant", ""),
                ("user", "e"),
            ],
        ),
    ],
)
def test_turns_become_the_messages_of_a_chat(turns, expected):
    assert chat_of(*turns) == expected


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("s", [("system", "s"), ("user", "Hi")]),
        ([text("s") | {"cache_control": {"type": "ephemeral"}}, text("t")], [("system", "s\nt"), ("user", "Hi")]),
        ("", [("user", "Hi")]),
        ([], [("user", "Hi")]),
        (None, [("user", "Hi")]),
    ],
)
def test_the_system_prompt_is_the_first_message(system, expected):
    assert chat_of(("user", "Hi"), system=system) == expected


def test_a_last_message_of_the_assistant_is_continued():
    assert translate(messages=[*HI, {"role": "assistant", "content": "It is"}]).generate.chat.continue_final_message
    assert not translate().generate.chat.continue_final_message
    after = [*HI, {"role": "assistant", "content": "It is"}, {"role": "system", "content": "s"}]
    assert not translate(messages=after).generate.chat.continue_final_message


def test_sampling():
    generate = translate(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["a", "b"], max_tokens=128_000).generate
    assert (generate.sampling.temperature, generate.sampling.top_p, generate.sampling.top_k) == (0.5, 0.9, 3)
    assert (generate.sampling.max_tokens, generate.fit_max_tokens, list(generate.stop)) == (128_000, True, ["a", "b"])
    plain = translate(max_tokens=0, top_k=0).generate.sampling
    assert (plain.temperature, plain.max_tokens, plain.HasField("top_k")) == (1.0, 1, False)
    assert translate(top_p=0).generate.sampling.temperature == 0
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    assert json.loads(translate(output_config=config).generate.sampling.grammar.json_schema) == schema


@pytest.mark.parametrize(
    ("fields", "names", "left_out"),
    [
        ({"tools": [READ, EDIT | {"type": "custom"}]}, ["read", "edit"], []),
        (
            {
                "tools": [
                    {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
                    READ,
                    {"type": "bash_20250124"},
                ]
            },
            ["read"],
            ["web_search_20250305", "bash_20250124"],
        ),
        ({"mcp_servers": [{"type": "url", "name": "x", "url": "https://x"}]}, [], ["mcp_servers"]),
        ({"tools": [READ, EDIT | {"defer_loading": True}]}, ["read"], []),
        (
            {"tools": [{"type": "tool_search_tool_regex_20251119", "name": "s"}, EDIT | {"defer_loading": True}]},
            ["edit"],
            ["tool_search_tool_regex_20251119"],
        ),
        (
            {
                "tools": [READ, EDIT | {"defer_loading": True}],
                "messages": [
                    {"role": "assistant", "content": [CALL]},
                    {
                        "role": "user",
                        "content": [RESULT | {"content": [{"type": "tool_reference", "tool_name": "edit"}]}],
                    },
                ],
            },
            ["read", "edit"],
            [],
        ),
        (
            {
                "tools": [READ | {"defer_loading": True}, EDIT | {"defer_loading": True}],
                "messages": [
                    *HI,
                    {
                        "role": "system",
                        "content": [
                            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "edit"}},
                            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "read"}},
                            {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "edit"}},
                        ],
                    },
                ],
            },
            ["read"],
            [],
        ),
    ],
)
def test_tools_are_offered_left_out_or_deferred(fields, names, left_out):
    asked = translate(**fields)
    assert [tool.name for tool in asked.generate.chat.tools] == names
    assert asked.left_out == left_out


def test_a_strict_tool_has_only_the_keys_that_it_names():
    (tool,) = translate(tools=[EDIT | {"strict": True}]).generate.chat.tools
    assert (tool.strict, json.loads(tool.parameters)) == (True, {"type": "object", "additionalProperties": False})
    schema = {"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}]}
    with pytest.raises(ApiError, match=r"'tools\[0\].input_schema'.*'strict'"):
        translate(tools=[EDIT | {"strict": True, "input_schema": schema}])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, Chat()),
        ({"type": "auto"}, Chat(tool_choice=ToolChoice(mode="MODE_AUTO"))),
        ({"type": "none"}, Chat(tool_choice=ToolChoice(mode="MODE_NONE"))),
        ({"type": "any"}, Chat(tool_choice=ToolChoice(mode="MODE_REQUIRED"))),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            Chat(tool_choice=ToolChoice(mode="MODE_REQUIRED"), single_tool_call=True),
        ),
        (
            {"type": "tool", "name": "read"},
            Chat(tool_choice=ToolChoice(mode="MODE_REQUIRED", name="read"), single_tool_call=True),
        ),
    ],
)
def test_the_choice_of_tools(choice, expected):
    chat = translate(tools=[READ], tool_choice=choice).generate.chat
    assert (chat.tool_choice, chat.single_tool_call) == (expected.tool_choice, expected.single_tool_call)


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "disabled"}}, thinking_variables(enabled=False)),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, thinking_variables(enabled=True)),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, thinking_variables("high", False)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"}}, thinking_variables("medium")),
    ],
)
def test_thinking_is_a_variable_of_the_chat_template(fields, variables):
    assert json.loads(translate(**fields).generate.chat.chat_template_kwargs or "{}") == variables


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
TOO_MANY = [text("a")] * 1025
LAST_USES = [*HI, {"role": "assistant", "content": [CALL]}]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": []}, "'messages'"),
        ({"messages": "Hi"}, "'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user"}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": 5}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": TOO_MANY}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "'messages[0].content[0].type'"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "'messages[0].content[0].type'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0].text'"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "'messages[0].content[0].type' 'image' is not supported",
        ),
        (
            {"messages": [*LAST_USES, {"role": "user", "content": [RESULT | {"content": [text("a"), IMAGE]}]}]},
            "'messages[2].content[0].content[1].type' 'image' is not supported",
        ),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "'messages[0].content[0].tool_use_id' is 't1'"),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "'messages[0].content[0].type' 'tool_use' is not allowed",
        ),
        ({"messages": [{"role": "system", "content": [RESULT]}]}, "'messages[0].content[0].type' 'tool_result' is not"),
        (
            {"messages": [{"role": "assistant", "content": [CALL | {"input": "x"}]}]},
            "'messages[0].content[0].input'",
        ),
        ({"messages": [{"role": "assistant", "content": [CALL | {"name": ""}]}]}, "'messages[0].content[0].name'"),
        ({"messages": LAST_USES}, "'messages[1]' is the last message and uses tools"),
        (
            {"messages": [{"role": "system", "content": [{"type": "tool_addition", "tool": {}}]}]},
            "'messages' have no text",
        ),
        ({"system": [IMAGE]}, "'system[0].type'"),
        ({"system": 5}, "'system'"),
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": -1}, "'max_tokens'"),
        ({"max_tokens": "9"}, "'max_tokens'"),
        ({"max_tokens": 1 << 40}, "'max_tokens'"),
        ({"temperature": 3}, "'temperature'"),
        ({"top_p": 1.5}, "'top_p'"),
        ({"top_k": -1}, "'top_k'"),
        ({"stream": "yes"}, "'stream'"),
        ({"stop_sequences": "x"}, "'stop_sequences'"),
        ({"stop_sequences": ["x"] * 17}, "'stop_sequences'"),
        ({"thinking": {"type": "deep"}}, "'thinking.type'"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "'thinking.budget_tokens'"),
        ({"output_config": {"effort": "huge"}}, "'output_config.effort'"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "'output_config.format.type'"),
        ({"metadata": {"user_id": 5}}, "'metadata.user_id'"),
        ({"thread": {"type": "create"}}, "'thread' is not supported"),
        ({"tools": [READ] * 129}, "'tools'"),
        ({"tools": [{"name": "read"}]}, "'tools[0].input_schema' is missing"),
        ({"tools": [READ | {"input_schema": "x"}]}, "'tools[0].input_schema'"),
        ({"tool_choice": "auto"}, "'tool_choice'"),
        ({"tool_choice": {"type": "all"}}, "'tool_choice.type'"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice.type' is 'any', but"),
        ({"tool_choice": {"type": "tool"}, "tools": [READ]}, "'tool_choice.name' is ''"),
        ({"tool_choice": {"type": "tool", "name": "edit"}, "tools": [READ]}, "'tool_choice.name' is 'edit'"),
    ],
)
def test_a_wrong_request_names_its_field(fields, told):
    with pytest.raises(ApiError) as caught:
        translate(**fields)
    assert caught.value.status == 400
    assert told in caught.value.message


PLACES = {
    "input": {"messages": [{"role": "assistant", "content": [CALL | {"input": "HERE"}]}, *HI]},
    "tool": {"tools": [READ | {"input_schema": "HERE"}]},
    "format": {"output_config": {"format": {"type": "json_schema", "schema": "HERE"}}},
}
HOSTILE = {
    "deep": '{"a":' * 300 + "1" + "}" * 300,
    "deeper": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "surrogate": '{"a":"\\ud800"}',
    "not a number": '{"a":NaN}',
    "beyond a double": '{"a":1e999}',
    "digits": '{"a":' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("place", PLACES)
def test_json_that_is_not_json_is_refused(place, hostile):
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": HI} | PLACES[place])
    with pytest.raises(ApiError) as caught:
        messages(parse(MessagesRequest, body.replace('"HERE"', HOSTILE[hostile]).encode()), "msg_1")
    assert caught.value.status == 400


def test_parts_of_results_count_as_items():
    def body(count):
        result = {"type": "tool_result", "tool_use_id": "t", "content": [text("a")] * 1000}
        return json.dumps({"messages": [{"role": "user", "content": [result] * count}]}).encode()

    check_items(body(16), "messages")
    with pytest.raises(ApiError, match="'messages' has 17018 items"):
        check_items(body(17), "messages")


@pytest.mark.parametrize(
    ("field", "message", "told"),
    [
        ("stop[1]", "is empty", "'stop_sequences[1]' is empty"),
        ("chat.tools[0].parameters", "is not a JSON object", "'tools[1].input_schema' is not a JSON object"),
        ("chat.tools[1].name", "is used twice", "'tools[3].name' is used twice"),
        ("chat.messages[7].tool_calls", "has 2000 tool calls", "'messages' has 2000 tool calls"),
        ("chat.messages", "are refused by the chat template", "'messages' are refused by the chat template"),
        (
            "chat.continue_final_message",
            "needs a last message that has text",
            "'messages' needs a last message that has text",
        ),
        ("sampling.grammar.json_schema", "has no type", "'output_config.format' has no type"),
        ("chat", "becomes too long", "'messages' becomes too long"),
        ("prompt", "is empty", "'messages' is empty"),
        ("sampling.top_k", "is more than the vocabulary", "'top_k' is more than the vocabulary"),
        ("", "the request has 9 bytes", "the request has 9 bytes"),
    ],
)
def test_errors_of_the_router_name_the_client_s_field(field, message, told):
    server_tool = {"type": "web_search_20250305"}
    asked = translate(tools=[server_tool, READ, server_tool, EDIT])
    assert str(asked.own_field(InvalidRequest(field, message))) == told


def test_other_errors_and_a_prompt_that_is_too_long():
    asked = translate()
    overloaded = Overloaded("full", 2.0)
    assert asked.own_field(overloaded) is overloaded
    told = asked.own_field(PromptTooLong("prompt", "has 9 tokens", 9, 8))
    assert (str(told), type(told)) == ("prompt is too long: 9 tokens > 8 maximum", PromptTooLong)
    told = asked.own_field(PromptTooLong("prompt", "needs 9 tokens; the largest worker holds 8"))
    assert str(told) == "prompt is too long: needs 9 tokens; the largest worker holds 8"
    told = asked.own_field(PromptTooLong("sampling.max_tokens", "9 tokens do not fit"))
    assert (str(told), type(told)) == ("'max_tokens' 9 tokens do not fit", PromptTooLong)


def test_tokens_are_counted_of_the_same_chat():
    fields = {"model": "m", "messages": HI, "system": "s", "tools": [READ], "tool_choice": {"type": "auto"}}
    asked, own_field = count_tokens(parse(CountTokensRequest, json.dumps(fields).encode()))
    assert asked.chat == translate(**fields).generate.chat
    assert str(own_field(InvalidRequest("chat.messages", "are odd"))) == "'messages' are odd"
