"""Tests the Messages API with Anthropic's own client: each case streamed and not, and what clients do wrong."""

import json
import socket
from typing import Literal

import anthropic
import pydantic
import pytest
from http_calls import bearer, call, num_held
from mocks import mock_stack
from stacks import wait_until

from overfill.api import key_file as keys

HI = [{"role": "user", "content": "Hi"}]
THINKING = {"type": "thinking", "thinking": "hm", "signature": "x"}
READ = {
    "name": "read",
    "description": "Reads a file.",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
PICK = {
    "name": "mcp__numbers__" + "x" * 114,
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"n": {"const": 1}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
CALLED = {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a.py"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "1\tdef add(a, b):"}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
MARKED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SCRIPT = [
    {"when": "read it", "text": "I read it.", "tool_calls": [{"name": "read", "arguments": {"path": 'a "b".py'}}]},
    {"when": "read both", "tool_calls": [{"name": "read", "arguments": {"path": path}} for path in ("a", "b")]},
    {"when": "be short", "text": "Short."},
    {"when": "stop there", "text": "One. END Two."},
    {"when": "an emoji", "text": "Here: 🙂é."},
    {"when": "be silent", "text": " "},
]


def say(text, **more):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": text} | more]}]}


def turns(*contents):
    """Messages whose roles alternate, the user's first."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def texts(message):
    return "".join(block.text for block in message.content if block.type == "text")


def inputs(message):
    return [block.input for block in message.content if block.type == "tool_use"]


CASES = {
    # what the model is told
    "text": ({}, lambda m: texts(m) and m.stop_reason == "max_tokens"),
    "blocks": (say("be short", **MARKED), lambda m: texts(m) == "Short." and m.stop_reason == "end_turn"),
    "system-text": ({"system": "be short"}, lambda m: texts(m) == "Short."),
    "system-blocks": ({"system": [{"type": "text", "text": "be short"} | MARKED]}, lambda m: texts(m) == "Short."),
    "system-message-late": (
        {"messages": [*HI, {"role": "system", "content": [{"type": "text", "text": "be short"} | MARKED]}]},
        lambda m: texts(m) == "Short.",
    ),
    "turns": (turns("Hi", "Ho", "be short"), lambda m: texts(m) == "Short."),
    "turns-joined": ({"messages": [*HI, *HI, *say("be short")["messages"]]}, lambda m: texts(m) == "Short."),
    "prefill": (turns("Hi", "It is"), lambda m: texts(m)),
    "replayed-call": (turns("be short", [CALLED], [RESULT]), lambda m: texts(m) == "Short."),
    "replayed-error": (turns("Hi", [CALLED], [RESULT | {"is_error": True, "content": "be short"}]), texts),
    "replayed-result-of-blocks": (
        turns("Hi", [CALLED], [RESULT | {"content": [{"type": "text", "text": "be short"}]} | MARKED]),
        lambda m: texts(m) == "Short.",
    ),
    "result-and-text": (turns("Hi", [CALLED], [RESULT, {"type": "text", "text": "be short"}]), texts),
    "replayed-thinking": (turns("Hi", [THINKING, CALLED], [RESULT], "Ho", "be short"), texts),
    "redacted-thinking": (turns("Hi", [{"type": "redacted_thinking", "data": "x"}, CALLED], [RESULT]), texts),
    # how it answers
    "unicode": (say("an emoji"), lambda m: texts(m) == "Here: 🙂é."),
    "almost-empty": (say("be silent"), lambda m: m.stop_reason == "end_turn"),
    "one-token": ({"max_tokens": 1}, lambda m: m.usage.output_tokens == 1 and m.stop_reason == "max_tokens"),
    "no-answer": ({"max_tokens": 0}, lambda m: not m.content and m.usage.output_tokens == 0),
    "all-that-fits": ({"max_tokens": 1 << 20}, lambda m: m.stop_reason == "model_context_window_exceeded"),
    "stop-sequence": (
        say("stop there") | {"stop_sequences": ["nothing", "END"]},
        lambda m: (texts(m), m.stop_reason, m.stop_sequence) == ("One. ", "stop_sequence", "END"),
    ),
    "greedy": ({"temperature": 0.0, "top_k": 5, "top_p": 0.5}, texts),
    "top-p-zero": ({"top_p": 0, "temperature": 1.0}, texts),
    "json": (
        {"output_config": {"effort": "high", "format": {"type": "json_schema", "schema": PICK["input_schema"]}}},
        lambda m: json.loads(texts(m)) == {"n": 1},
    ),
    # tools
    "tool-call": (
        say("read it") | {"tools": [READ]},
        lambda m: (texts(m), inputs(m), m.stop_reason) == ("I read it.", [{"path": 'a "b".py'}], "tool_use"),
    ),
    "two-calls": (say("read both") | {"tools": [READ]}, lambda m: inputs(m) == [{"path": "a"}, {"path": "b"}]),
    "one-call": (
        say("read both") | {"tools": [READ], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        lambda m: inputs(m) == [{"path": "a"}],
    ),
    "any": (
        {"tools": [PICK], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        lambda m: inputs(m) == [{"n": 1}],
    ),
    "named": (
        {"tools": [READ, PICK], "tool_choice": {"type": "tool", "name": PICK["name"]}},
        lambda m: inputs(m) == [{"n": 1}],
    ),
    "none": (
        say("read it") | {"tools": [READ], "tool_choice": {"type": "none"}},
        lambda m: texts(m) and not inputs(m) and m.stop_reason in ("end_turn", "max_tokens"),
    ),
    "strict": (
        say("read it") | {"tools": [READ | {"strict": True, "type": "custom"}]},
        lambda m: inputs(m) == [{"path": 'a "b".py'}],
    ),
    "cut-call": (
        say("read it") | {"tools": [READ], "max_tokens": 40},
        lambda m: m.stop_reason == "max_tokens" and all(isinstance(each, dict) for each in inputs(m)),
    ),
    "marked-tool": (say("read it") | {"tools": [READ | MARKED]}, lambda m: len(inputs(m)) == 1),
    "server-tool": (say("be short") | {"tools": [SEARCH]}, lambda m: texts(m) == "Short."),
    "server-tool-beside": (say("read it") | {"tools": [SEARCH, READ]}, lambda m: len(inputs(m)) == 1),
    "deferred": (say("be short") | {"tools": [READ | {"defer_loading": True}]}, lambda m: texts(m) == "Short."),
    "turn-with-tools": (
        turns("Hi", [CALLED], [RESULT, {"type": "text", "text": "read it"}]) | {"tools": [READ]},
        lambda m: len(inputs(m)) == 1,
    ),
    # what is ignored
    "thinking-enabled": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, texts),
    "thinking-adaptive": ({"thinking": {"type": "adaptive", "display": "omitted"}}, texts),
    "thinking-disabled": ({"thinking": {"type": "disabled"}}, texts),
    "betas": (
        {
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "metadata": {"user_id": '{"session_id":"s"}'},
            "service_tier": "auto",
            "container": "c",
            "mcp_servers": [],
            "a_field_of_a_beta": {"x": [1]},
        },
        texts,
    ),
}


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="claude-test,fast", workers={"script": SCRIPT}) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack):
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        yield client


def ask(client, stream, **fields):
    """The message, read by the client from a stream or whole, and the response's headers."""
    body = {"model": "claude-test", "messages": HI, "max_tokens": 300, "temperature": 0} | fields
    sdk = {name: body.pop(name) for name in ("model", "messages", "max_tokens")}
    more = {"extra_body": body, "extra_headers": {"x-request-id": "msg_same"}, "timeout": 60}
    if stream:
        with client.messages.stream(**sdk, **more) as events:
            return events.get_final_message(), events.response.headers
    answer = client.messages.with_raw_response.create(**sdk, **more)
    return answer.parse(), answer.headers


def same(message):
    """What does not depend on when a request came: without times, and with cached tokens counted as others."""
    fields = message.model_dump(exclude={"overfill", "usage"})
    usage = message.usage
    return fields, usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_answered_streamed_as_not_streamed(client, name):
    fields, check = CASES[name]
    whole, streamed = (ask(client, stream, **fields)[0] for stream in (False, True))
    assert same(whole) == same(streamed)
    assert check(whole), whole


def test_there_are_forty_cases():
    assert len(CASES) >= 40


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
"""A chat template of a model that thinks."""
THOUGHT = "The user asks é 世. " * 4
THINKING_SCRIPT = [
    {"text": f"{THOUGHT}\n</think>\n\nIt is so."},
    {"when": "read it", "text": "Hm\n</think>\n\n", "tool_calls": [{"name": "read", "arguments": {"path": "a"}}]},
]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "thinks.jinja"
    file.write_text(THINKS)
    workers = {"script": THINKING_SCRIPT}
    with (
        mock_stack("mock", served_model_name="claude-test", chat_template=file, workers=workers) as stack,
        anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("fields", "kinds", "thought"),
    [
        ({}, ["thinking", "text"], THOUGHT.strip()),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ["thinking", "text"], THOUGHT.strip()),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, ["thinking", "text"], ""),
        ({"max_tokens": 4}, ["thinking"], "The user asks"),
        (say("read it") | {"tools": [READ]}, ["thinking", "tool_use"], "Hm"),
        ({"stop_sequences": ["user", " so"]}, ["thinking", "text"], THOUGHT.strip()),
    ],
)
def test_what_a_model_thinks_is_a_block_of_its_own(thinker, fields, kinds, thought):
    whole, streamed = (ask(thinker, stream, **fields)[0] for stream in (False, True))
    assert same(whole) == same(streamed)
    assert [block.type for block in whole.content] == kinds
    assert whole.content[0].thinking == thought
    assert whole.content[0].signature
    assert 0 < whole.usage.output_tokens_details.thinking_tokens <= whole.usage.output_tokens


def test_thinking_is_read_again_shown_or_not_and_can_be_switched_off(thinker):
    def counted(answer, **fields):
        turns = [*HI, {"role": "assistant", "content": answer}, *HI]
        return thinker.messages.count_tokens(model="claude-test", messages=turns, **fields).input_tokens

    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    shown, omitted = (ask(thinker, True, **fields)[0].content for fields in ({}, hidden))
    assert counted(shown) == counted(omitted) > counted(shown[1:])
    assert counted(shown, thinking={"type": "disabled"}) > counted(shown)


def refused(error, client, **fields):
    """The error of a request, of which the client makes an exception of a class ``error``."""
    with pytest.raises(error) as caught:
        ask(client, False, **fields)
    told = caught.value
    assert told.body["type"] == "error"
    assert told.request_id == told.body["request_id"]
    return told


@pytest.mark.parametrize(
    ("error", "fields", "kind", "told"),
    [
        (anthropic.NotFoundError, {"model": "other"}, "not_found_error", "'other' does not exist"),
        (anthropic.BadRequestError, {"max_tokens": -1}, "invalid_request_error", "'max_tokens'"),
        (anthropic.BadRequestError, say("a " * 9000), "invalid_request_error", "prompt is too long: "),
        (anthropic.BadRequestError, {"stop_sequences": ["a", ""]}, "invalid_request_error", "'stop_sequences[1]'"),
        (
            anthropic.BadRequestError,
            {"tools": [SEARCH, READ | {"name": "read it"}]},
            "invalid_request_error",
            "'tools[1].name' is 'read it'",
        ),
        (
            anthropic.BadRequestError,
            {"tools": [READ, SEARCH, PICK | {"strict": True, "input_schema": {"type": "object", "uniqueItems": 5}}]},
            "invalid_request_error",
            "'tools[2].input_schema'",
        ),
        (
            anthropic.BadRequestError,
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "circle"}}}},
            "invalid_request_error",
            "'output_config.format'",
        ),
        (anthropic.BadRequestError, turns("Hi", ""), "invalid_request_error", "'messages' needs a last message"),
    ],
)
def test_what_is_refused_is_said_in_anthropic_s_form(client, error, fields, kind, told):
    answer = refused(error, client, **fields)
    assert answer.body["error"]["type"] == kind
    assert told in answer.body["error"]["message"]


def test_a_prompt_that_is_too_long_is_told_in_words_that_claude_code_knows(client):
    count = client.messages.count_tokens(model="claude-test", **say("a " * 9000)).input_tokens
    message = refused(anthropic.BadRequestError, client, **say("a " * 9000)).body["error"]["message"]
    limit = client.models.retrieve("claude-test").max_input_tokens - 1
    assert message == f"prompt is too long: {count} tokens > {limit} maximum"


def test_errors_before_the_route_have_the_same_form(stack, tiny_pair, tmp_path):
    def told(reply):
        body = json.loads(reply.body)
        assert reply.headers["request-id"] == body["request_id"]
        return reply.status, body["type"], body["error"]["type"]

    url = f"{stack.url}/v1/messages"
    body = {"model": "claude-test", "messages": HI, "max_tokens": 1}
    assert told(call(url, b"{", {"content-type": "application/json"})) == (400, "error", "invalid_request_error")
    assert told(call(url, b"{}", {"content-type": "text/plain"})) == (415, "error", "invalid_request_error")
    assert told(call(url)) == (405, "error", "invalid_request_error")
    assert told(call(f"{url}/batches", body)) == (404, "error", "not_found_error")
    assert told(call(f"{stack.url}/v1/models/x", headers={"anthropic-version": "2023-06-01"})) == (
        404,
        "error",
        "not_found_error",
    )
    file = tmp_path / "keys.json"
    key, large = keys.create(file, "agent", rate=0.001), keys.create(file, "large")
    with mock_stack(tiny_pair, api_keys=file, served_model_name="claude-test", max_request_bytes=100_000) as locked:
        url = f"{locked.url}/v1/messages?beta=true"
        for shown in ({}, {"x-api-key": "wrong"}, {"authorization": "Basic x", "x-api-key": ""}):
            assert told(call(url, body, shown)) == (401, "error", "authentication_error"), shown
        assert call(f"{locked.url}/v1/models", headers={"x-api-key": key}).status == 200, "on every route"
        assert told(call(url, b" " * 200_000, {"x-api-key": large})) == (413, "error", "request_too_large")
        assert call(url, body, bearer(key) | {"x-api-key": "wrong"}).status == 200, "as Claude Code sends both"
        limited = call(url, body, {"x-api-key": key})
        assert told(limited) == (429, "error", "rate_limit_error")
        assert int(limited.headers["retry-after"]) > 0


@anthropic.beta_tool
def read(path: str) -> str:
    """Reads a file.

    Args:
        path: of the file.
    """
    return f"Of {path}: be short."


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_s_tool_runner_sends_the_whole_conversation(client, stream):
    """It asks for a thread first, in which the server would keep the conversation."""
    runner = client.beta.messages.tool_runner(
        model="claude-test", max_tokens=300, tools=[read], stream=stream, **say("read it")
    )
    messages = [turn.get_final_message() if stream else turn for turn in runner]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert texts(messages[1]) == "Short."


def test_the_client_parses_structured_answers(client):
    class Picked(pydantic.BaseModel):
        n: Literal[1]

    answer = client.messages.parse(model="claude-test", max_tokens=300, messages=HI, output_format=Picked)
    assert answer.parsed_output == Picked(n=1)


def test_what_is_left_out_is_named_in_a_header(client):
    tools = [SEARCH, {"type": "bash_20250124", "name": "bash\r\nx: y"}, READ, {"type": "é\n"}]
    for stream in (False, True):
        _, headers = ask(client, stream, tools=tools, mcp_servers=[{"type": "url", "name": "x", "url": "http://x"}])
        assert headers["x-overfill-left-out"] == "web_search_20250305, bash_20250124, ???, mcp_servers"
        assert headers["request-id"] == "msg_same"
    assert "x-overfill-left-out" not in ask(client, False)[1]


def test_tokens_are_counted_as_the_answer_counts_them(stack, client):
    for fields in ({}, {"system": "s", "tools": [READ]}, turns("Hi", [CALLED], [RESULT]), turns("Hi", "It is")):
        message, _ = ask(client, False, **fields)
        asked = {"model": "claude-test", "messages": HI} | fields
        counted = client.messages.count_tokens(**asked).input_tokens
        assert counted == message.usage.input_tokens + message.usage.cache_read_input_tokens
        again = call(f"{stack.url}/v1/messages/count_tokens?beta=true", asked)
        assert (again.status, json.loads(again.body)) == (200, {"input_tokens": counted})
    with pytest.raises(anthropic.BadRequestError, match=r"'tools\[0\].name'"):
        client.messages.count_tokens(model="claude-test", messages=HI, tools=[READ | {"name": "a b"}])


def test_cached_tokens_are_not_counted_twice(client):
    fields = say("a long prompt that another request begins with, too " * 4)
    first, second = (ask(client, stream, **fields)[0].usage for stream in (False, True))
    assert first.input_tokens + first.cache_read_input_tokens == second.input_tokens + second.cache_read_input_tokens
    assert second.cache_read_input_tokens > first.cache_read_input_tokens


def test_several_names_and_their_list(stack, client):
    assert ask(client, False, model="fast")[0].model == "claude-test", "as at vLLM, the first name"
    page = client.models.list(limit=1000)
    assert [(model.id, model.display_name, model.type) for model in page] == [
        ("claude-test", "claude-test", "model"),
        ("fast", "fast", "model"),
    ]
    assert (page.has_more, page.first_id, page.last_id) == (False, "claude-test", "fast")
    assert page.data[0].created_at.timestamp() == page.data[0].created
    codex = json.loads(call(f"{stack.url}/v1/models?client_version=0.171.0").body)["models"]
    assert [model["slug"] for model in codex] == ["claude-test", "fast"]
    assert codex[0]["context_window"] == page.data[0].max_input_tokens
    assert (codex[0]["visibility"], codex[0]["supported_in_api"], codex[0]["shell_type"]) == (
        "list", True, "shell_command",
    )  # fmt: skip


def test_probes_of_claude_code(stack):
    assert [call(f"{stack.url}{path}", method="HEAD").status for path in ("/", "/api/hello")] == [307, 200]


def test_a_client_that_leaves_frees_both_stages(stack):
    host, _, port = stack.url.removeprefix("http://").partition(":")
    for stream in (True, False):
        body = json.dumps({"model": "claude-test", "messages": HI, "max_tokens": 8000, "stream": stream})
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                connection.recv(100)
            else:
                wait_until(lambda: num_held(stack.url) > 0, 20, "the request runs")
        wait_until(lambda: num_held(stack.url) == 0, 20, "nothing is held for it")
