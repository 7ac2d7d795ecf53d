"""Tests the Responses API with OpenAI's own SDK: each case streamed and not, both with the same items."""

import json
import re
import socket

import openai
import pytest
from http_calls import call, num_held
from mocks import mock_stack
from openai.types.responses import Response
from pydantic import BaseModel
from stacks import wait_until

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Weather of a city.", "parameters": SCHEMA}
TIME = WEATHER | {"name": "time"}
PATCH = {"type": "custom", "name": "patch", "description": "Not JSON."}
FILES = {"type": "namespace", "name": "mcp__fs", "description": "Files.", "tools": [WEATHER | {"name": "read"}, PATCH]}
LARK = 'start: "*** " NAME LF\nNAME: /[a-z]+/\n%import common.LF\n'

PARIS = {"name": "weather", "arguments": {"city": "Paris"}}
ROME = {"name": "weather", "arguments": {"city": "Rome"}}

SCRIPT = [
    {"text": "Bonjour, é 😀. One two three four five six seven eight nine ten."},
    {"when": "weather?", "tool_calls": [PARIS]},
    {"when": "both?", "text": "I look.", "tool_calls": [PARIS, ROME]},
    {"when": "file?", "tool_calls": [{"name": "mcp__fs__read", "arguments": {"city": "a.txt"}}]},
    {"when": "patch?", "tool_calls": [{"name": "patch", "arguments": {"input": "*** abc\n"}}]},
    {"when": "patches?", "tool_calls": [{"name": "mcp__fs__patch", "arguments": {"input": 'a "b" \\ c\n\td'}}]},
    {"when": "object?", "text": '{"city":"Oslo"}'},
    {"when": "Sunny", "text": "It is sunny."},
]


def part(kind, text):
    return {"type": kind, "text": text}


def user(text):
    return {"role": "user", "content": text}


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Paris"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "Sunny"}
CUSTOM = {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** a"}
CUSTOM_RESULT = {"type": "custom_tool_call_output", "call_id": "c2", "output": "Sunny"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [part("reasoning_text", "Hm")]}


def grammar(syntax, definition):
    return PATCH | {"format": {"type": "grammar", "syntax": syntax, "definition": definition}}


def chosen(kind, name, **more):
    return {"type": kind, "name": name, **more}


def allowed(mode, *tools):
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


def shown(form):
    return {"input": "object?", "text": {"format": form}}


def texts(wanted):
    """Returns a check of the whole text, by a regular expression."""
    return lambda response: re.fullmatch(wanted, response.output_text, re.DOTALL)


def calls(*wanted):
    """Returns a check of the calls: namespace, name, and what they pass."""

    def check(response):
        made = [
            (getattr(item, "namespace", None), item.name, getattr(item, "input", None) or item.arguments)
            for item in response.output
            if item.type.endswith("call")
        ]
        return made == list(wanted)

    return check


def told(**wanted):
    """Returns a check of fields of the response."""
    return lambda response: {name: response.to_dict()[name] for name in wanted} == wanted


ANY, SUN = texts("Bonjour, é 😀. .*"), texts("It is sunny.")
IN_PARIS = (None, "weather", '{"city": "Paris"}')
CASES = {
    "text": ({"input": "Hi"}, ANY),
    "instructions": ({"input": "Hi", "instructions": "Be brief."}, told(instructions="Be brief.")),
    "messages without a type": ({"input": [user("Hi"), {"role": "assistant", "content": "Yes?"}, user("Go")]}, ANY),
    "parts": ({"input": [user([part("input_text", "Hi"), part("input_text", "you")])]}, ANY),
    "developer": ({"input": [{"role": "developer", "content": "Be brief."}, user("Hi")]}, ANY),
    "a late developer": ({"input": [user("Hi"), {"role": "developer", "content": "Be brief."}]}, ANY),
    "a reasoning item": ({"input": [user("Hi"), THOUGHT, {"role": "assistant", "content": "A"}, user("Go")]}, ANY),
    "a cut": ({"input": "Hi", "max_output_tokens": 5}, told(status="incomplete", max_output_tokens=5)),
    "a stop string": ({"input": "Hi", "extra_body": {"stop": "One"}}, texts("Bonjour, é 😀. ")),
    "greedy": ({"input": "Hi", "temperature": 0}, told(temperature=0.0)),
    "top_p": ({"input": "Hi", "top_p": 0.5}, told(top_p=0.5)),
    "metadata": ({"input": "Hi", "metadata": {"a": "b"}}, told(metadata={"a": "b"})),
    "prompt_cache_key": ({"input": "Hi", "prompt_cache_key": "k"}, told(prompt_cache_key="k")),
    "user": ({"input": "Hi", "user": "u", "safety_identifier": "s"}, told(user="u", safety_identifier="s")),
    "store": ({"input": "Hi", "store": False}, told(store=False)),
    "truncation": ({"input": "Hi", "truncation": "auto"}, told(truncation="disabled")),
    "reasoning": ({"input": "Hi", "reasoning": {"effort": "low", "summary": "auto"}}, ANY),
    "include": ({"input": "Hi", "include": ["reasoning.encrypted_content"]}, ANY),
    "verbosity": ({"input": "Hi", "text": {"verbosity": "low"}}, ANY),
    "service_tier": ({"input": "Hi", "service_tier": "auto"}, told(service_tier="default")),
    "text format": (shown({"type": "text"}), texts('{"city":"Oslo"}')),
    "json_object": (shown({"type": "json_object"}), texts(r"\{.*\}")),
    "json_schema": (shown({"type": "json_schema", "name": "city", "schema": SCHEMA}), texts(r'\{"city":.*\}')),
    "a strict schema": (
        shown({"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}), texts(r'\{"city":.*\}')),
    "a function": ({"input": "weather?", "tools": [WEATHER]}, calls(IN_PARIS)),
    "a strict function": ({"input": "weather?", "tools": [WEATHER | {"strict": True}]}, calls(IN_PARIS)),
    "a required call": ({"input": "weather?", "tools": [WEATHER], "tool_choice": "required"}, calls(IN_PARIS)),
    "a named function": (
        {"input": "weather?", "tools": [TIME, WEATHER], "tool_choice": chosen("function", "weather")},
        calls(IN_PARIS)),
    "allowed tools": (
        {"input": "weather?", "tools": [TIME, WEATHER],
            "tool_choice": allowed("required", chosen("function", "weather"))},
        calls(IN_PARIS)),
    "no call": ({"input": "Hi", "tools": [WEATHER], "tool_choice": "none"}, ANY),
    "text and calls": (
        {"input": "both?", "tools": [WEATHER]}, calls(IN_PARIS, (None, "weather", '{"city": "Rome"}'))),
    "one call at most": (
        {"input": "both?", "tools": [WEATHER], "parallel_tool_calls": False}, told(parallel_tool_calls=False)),
    "a cut call": ({"input": "weather?", "tools": [WEATHER], "max_output_tokens": 50}, told(status="incomplete")),
    "a result": ({"input": [user("weather?"), CALL, RESULT], "tools": [WEATHER]}, SUN),
    "a result in parts": (
        {"input": [user("weather?"), CALL, RESULT | {"output": [part("input_text", "Sunny")]}], "tools": [WEATHER]},
        SUN),
    "a namespace": ({"input": "file?", "tools": [WEATHER, FILES]}, calls(("mcp__fs", "read", '{"city": "a.txt"}'))),
    "a named function in a namespace": (
        {"input": "file?", "tools": [WEATHER, FILES], "tool_choice": chosen("function", "read", namespace="mcp__fs")},
        calls(("mcp__fs", "read", '{"city": "a.txt"}'))),
    "a call in a namespace": (
        {"input": [user("file?"), CALL | {"namespace": "mcp__fs", "name": "read"}, RESULT], "tools": [FILES]}, SUN),
    "a custom tool": ({"input": "patch?", "tools": [PATCH]}, calls((None, "patch", "*** abc\n"))),
    "a custom tool in a namespace": (
        {"input": "patches?", "tools": [FILES]}, calls(("mcp__fs", "patch", 'a "b" \\ c\n\td'))),
    "a named custom tool": (
        {"input": "patch?", "tools": [WEATHER, PATCH], "tool_choice": chosen("custom", "patch")},
        calls((None, "patch", "*** abc\n"))),
    "a custom tool of a Lark grammar": (
        {"input": "patch?", "tools": [grammar("lark", LARK)]}, calls((None, "patch", "*** abc\n"))),
    "a custom tool of a regular expression": (
        {"input": "patch?", "tools": [grammar("regex", r"\*\*\* [a-z]+\n")]}, calls((None, "patch", "*** abc\n"))),
    "a custom result": ({"input": [user("patch?"), CUSTOM, CUSTOM_RESULT], "tools": [PATCH]}, SUN),
    "tools in an item": (
        {"input": [{"type": "additional_tools", "role": "developer", "tools": [WEATHER]}, user("weather?")]},
        calls(IN_PARIS)),
    "a hosted tool": ({"input": "weather?", "tools": [WEATHER, {"type": "web_search"}]}, calls(IN_PARIS)),
}  # fmt: skip


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="m", workers={"script": SCRIPT}) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def shape(item):
    """Returns the item without its ids, which derive from that of the response."""
    return {key: value for key, value in item.to_dict().items() if key not in ("id", "call_id")}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_has_what_the_whole_response_has(client, case):
    fields, check = CASES[case]
    fields = fields | {"extra_body": {"seed": 1} | fields.get("extra_body", {})}
    whole = client.responses.create(model="m", **fields)
    *events, last = client.responses.create(model="m", stream=True, **fields)
    for response in (whole, last.response):
        Response.model_validate(response.to_dict(), strict=True)
        assert check(response), response.output
    assert [shape(item) for item in last.response.output] == [shape(item) for item in whole.output]
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert [event.sequence_number for event in (*events, last)] == list(range(len(events) + 1))
    assert [event.item for event in events if event.type == "response.output_item.done"] == last.response.output
    if whole.status == "completed":
        with client.responses.stream(model="m", **fields) as stream:  # the SDK follows the items
            assert stream.get_final_response().output_text == whole.output_text


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"
)
THOUGHTS = [
    {"text": "I think. 世 <tool_call>\n</think>\n\nIt is so.<|im_end|>"},
    {"when": "[I think", "text": "You thought.\n</think>\n\nYou did.<|im_end|>"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_as_an_item_and_goes_back_as_one(tmp_path, stream):
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    script = {"script": THOUGHTS, "answer_tokens": None}
    with (
        mock_stack("mock", workers=script, chat_template=template) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(items, **fields):
            made = client.responses.create(model="mock", input=items, stream=stream, **fields)
            return list(made)[-1].response if stream else made

        first = ask([user("Is it so?")], include=["reasoning.encrypted_content"])
        Response.model_validate(first.to_dict(), strict=True)
        thought, said = first.output
        assert [part.text for part in thought.content] == ["I think. 世 <tool_call>"]
        assert said.content[0].text == "It is so."
        assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
        as_codex = thought.to_dict() | {"content": None}  # Codex sends back the encrypted text only
        for back in (thought.to_dict(), as_codex):
            second = ask([user("Is it so?"), back, said.to_dict(), user("Sure?")])
            assert second.output_text == "You did."
        cut = ask([user("Is it so?")], max_output_tokens=3)
        assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]
        assert ask([user("Is it so?")], reasoning={"effort": "none"}).output[0].type == "message"


class City(BaseModel):
    city: str


def test_the_sdk_parses_an_answer_into_a_class(client):
    answer = client.responses.parse(model="m", input="object?", text_format=City, extra_body={"seed": 1})
    assert isinstance(answer.output_parsed, City)


def test_tools_that_were_left_out_are_in_a_header(client):
    hosted = [{"type": "web_search"}, {"type": "tool_search"}]
    raw = client.responses.with_raw_response.create(model="m", input="weather?", tools=[WEATHER, *hosted])
    assert raw.headers["x-overfill-left-out"] == "web_search, tool_search"
    assert [tool.name for tool in raw.parse().tools] == ["weather"]


REFUSED = [
    (400, "store", "unsupported_parameter", {"store": True}),
    (400, "background", "unsupported_parameter", {"background": True}),
    (400, "previous_response_id", "unsupported_parameter", {"previous_response_id": "resp_1"}),
    (400, "conversation", "unsupported_parameter", {"conversation": "c"}),
    (400, "input[0].call_id", "invalid_value", {"input": [RESULT]}),
    (400, "tools[0].name", "invalid_value", {"tools": [WEATHER | {"name": "a b"}]}),
    (400, "tools[1].tools[0].name", "invalid_value",
        {"tools": [WEATHER, FILES | {"tools": [WEATHER | {"name": "x" * 128}]}]}),
    (400, "tools[0].format.definition", "invalid_value", {"tools": [grammar("lark", "start: nothing")]}),
    (400, "tools", "invalid_value", {"tools": [WEATHER] * 10_000}),
    (400, "text.format.schema", "invalid_value",
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "strin"}}}}),
    (400, "input", "context_length_exceeded", {"input": "Hi " * 5000}),
    (400, "max_output_tokens", "context_length_exceeded", {"max_output_tokens": 5000}),
    (404, "model", "model_not_found", {"model": "other"}),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "param", "code", "fields"), REFUSED, ids=lambda value: str(value)[:60])
def test_errors_before_the_first_event_have_openai_s_form(client, status, param, code, fields, stream):
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/responses", body={"model": "m", "input": "Hi", "stream": stream} | fields, cast_to=object)
    error = caught.value
    assert (error.status_code, error.param, error.code, error.type) == (status, param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "x"), ("DELETE", "x"), ("POST", "x/cancel"), ("GET", "x/input_items"), ("POST", "compact")],
)
def test_stored_things_are_refused_with_one_sentence(stack, method, path):
    reply = call(f"{stack.url}/v1/responses/{path}", {} if method == "POST" else None, method=method)
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (404, "unknown_url")
    assert "this server stores no responses" in error["message"]


def test_a_client_that_vanishes_frees_both_stages(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="m", workers={"step": 0.01}) as stack:
        host, _, port = stack.url.removeprefix("http://").partition(":")
        for stream in (True, False):
            body = json.dumps({"model": "m", "input": "Hi", "stream": stream})
            head = "POST /v1/responses HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                if stream:
                    connection.recv(100)
                wait_until(lambda: num_held(stack.url) > 0, 30, "the request runs")
            wait_until(lambda: num_held(stack.url) == 0, 30, "nothing is held for it")
