"""Tests reasoning on a stack of mock workers: both APIs, lost workers, resumed answers, grammars."""

from __future__ import annotations

import json

import pytest
from http_calls import call
from mocks import mock_stack

from overfill.cli.main import main
from overfill.client import Client, Message, SamplingParams, Tool
from overfill.errors import Incompatible, InvalidPair

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
REASONING = "The user asks. " * 20 + "世 <tool_call>"
SCRIPT = [
    {"text": f"{REASONING}\n</think>\n\nIt is so. " + "So. " * 20 + "<|im_end|>"},
    {"when": "json", "text": f'{REASONING}\n</think>\n\n{{"a": 1}}<|im_end|>'},
    {"when": "call", "text": "Hm\n</think>\n\n", "tool_calls": [{"name": "now", "arguments": {"a": 1}}]},
    {"when": "long", "text": f"{REASONING}\n</think>\n\n", "tool_calls": [{"name": "now", "arguments": {"a": 1}}]},
]
TEXT = "It is so. " + "So. " * 20
ASK = [Message("user", "Is it so?")]
GREEDY = SamplingParams(temperature=0, max_tokens=1000)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "thinks.jinja"
    file.write_text(TEMPLATE)
    return file


def stack(template, step=0.002, **settings):
    workers = {"script": SCRIPT, "answer_tokens": None, "step": step}
    return mock_stack("mock", decode=2, workers=workers, chat_template=template, **settings)


@pytest.fixture(scope="module")
def running(template):
    with stack(template) as running:
        yield running


def ask(running, content="Is it so?", stream=False, **fields):
    """Returns reasoning, text, calls and usage of an answer over HTTP."""
    messages = [{"role": "user", "content": content}]
    body = {"model": "mock", "messages": messages, "temperature": 0, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    reply = call(f"{running.url}/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    if not stream:
        answer = json.loads(reply.body)
        message = answer["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        return message.get("reasoning_content"), message["content"], calls, answer["usage"]
    events = [json.loads(event[6:]) for event in reply.body.decode().split("\n\n")[:-2]]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    kinds = [name for delta in deltas for name in ("reasoning_content", "content") if delta.get(name)]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    names = "".join(call.get("name", "") for call in calls)
    made = [{"name": names, "arguments": "".join(call["arguments"] for call in calls)}] if calls else []
    reasoning, text = ("".join(d.get(name) or "" for d in deltas) for name in ("reasoning_content", "content"))
    return reasoning or None, text or (None if made else ""), made, events[-1]["usage"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": SCHEMA}}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ("Is it so?", {}, (REASONING, TEXT, [])),
        ("Is it so?", {"include_reasoning": False}, (None, TEXT, [])),
        ("Is it so?", {"stop": ["user", "So."]}, (REASONING, "It is so. ", [])),
        ("Is it so?", {"max_tokens": 3}, ("The user ask", "", [])),
        ("json", {"response_format": JSON}, (REASONING, '{"a": 1}', [])),
        ("call", {"tools": TOOLS}, ("Hm", None, [{"name": "now", "arguments": '{"a": 1}'}])),
        ("call", {"tools": TOOLS, "tool_choice": "required"}, ("Hm", None, [{"name": "now", "arguments": '{"a": 1}'}])),
    ],
)
def test_chat_completions_show_reasoning_apart(running, stream, content, fields, expected):
    reasoning, text, calls, usage = ask(running, content, stream, **fields)
    assert (reasoning, text, calls) == expected
    tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    whole = fields.get("max_tokens") == 3
    assert (tokens == usage["completion_tokens"]) if whole else (0 < tokens < usage["completion_tokens"])


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_thinking_is_switched_off_in_the_prompt(running, fields):
    reasoning, text, _, usage = ask(running, **fields)
    assert (reasoning, text) == (None, f"{REASONING}\n</think>\n\n{TEXT}"), "the mock thinks all the same"
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    assert ask(running, reasoning_effort="high")[0] == REASONING


def test_responses_and_messages_show_the_same_reasoning_and_switch_it_off(running):
    def post(path, **body):
        reply = call(f"{running.url}/v1/{path}", {"model": "mock", "temperature": 0, **body})
        assert reply.status == 200, reply.body
        return json.loads(reply.body)

    def responses(**body):
        answer = post("responses", input="Is it so?", **body)
        texts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        tokens = answer["usage"]["output_tokens_details"]["reasoning_tokens"]
        return texts.get("reasoning"), texts["message"], tokens

    def messages(**body):
        answer = post("messages", max_tokens=1000, messages=[{"role": "user", "content": "Is it so?"}], **body)
        texts = {block["type"]: block[block["type"]] for block in answer["content"]}
        return texts.get("thinking"), texts["text"], answer["usage"]["output_tokens_details"]["thinking_tokens"]

    reasoning, text, _, usage = ask(running)
    tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    assert responses() == messages() == (reasoning, text, tokens)
    off = (None, f"{REASONING}\n</think>\n\n{TEXT}", 0)
    assert responses(reasoning={"effort": "none"}) == messages(thinking={"type": "disabled"}) == off


@pytest.mark.parametrize("tools", [(), (Tool("now", parameters=SCHEMA),)], ids=["text", "call"])
def test_a_lost_worker_changes_no_byte_of_reasoning_text_and_calls(template, tools):
    asked = [Message("user", "long")] if tools else ASK
    options = {"sampling": GREEDY, "tools": tools, "tool_choice": "required" if tools else "auto", "request_id": "r"}
    with stack(template, step=0.04) as running, Client(running.grpc) as client:
        expected = client.chat(asked, **options)
        assert (expected.reasoning, expected.text) == (REASONING, "" if tools else TEXT)
        assert [call.arguments for call in expected.tool_calls] == ['{"a": 1}'] * len(tools)
        streams = [client.stream(asked, **options).__enter__() for _ in range(4)]
        read = 0
        while read < 12:  # counts tokens, since several may come at once
            read += len(next(streams[-1]).token_ids)
        running.call(running.workers["decode-0"].stop())
        for stream in streams:
            for _ in stream:
                pass
        answers = [stream.answer for stream in streams]
        assert any(answer.migrations for answer in answers)
        for answer in answers:
            assert answer.message == expected.message
            assert answer.usage.reasoning_tokens == expected.usage.reasoning_tokens > 0


def test_another_router_goes_on_inside_the_reasoning_only_if_it_reads_the_answer_alike(running, template, tmp_path):
    with Client(running.grpc) as client:
        first = client.chat(ASK, sampling=GREEDY)
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    wrong = [
        (template, {"reasoning_parser": "none"}, "resume_identity.answer_format"),
        (template, {"tool_call_parser": "pythonic"}, "resume_identity.answer_format"),
        (other, {}, "resume_identity.prompt_digest"),
    ]
    for file, settings, field in wrong:
        resumed = {"resume_token_ids": first.token_ids[:50], "resume_identity": first.identity}
        with stack(file, **settings) as second, Client(second.grpc) as client:
            with pytest.raises(Incompatible) as caught:
                client.chat(ASK, sampling=GREEDY, **resumed)
            assert field in caught.value.fields
    with stack(template) as second, Client(second.grpc) as client:
        for known in (1, 50, len(first.token_ids) - 30):
            resumed = {"resume_token_ids": first.token_ids[:known], "resume_identity": first.identity}
            rest = client.chat(ASK, sampling=GREEDY, **resumed)
            assert first.reasoning.endswith(rest.reasoning)
            assert first.text.endswith(rest.text)
            assert (rest.text == first.text) == (known < first.usage.reasoning_tokens)
            assert rest.usage.reasoning_tokens == first.usage.reasoning_tokens


def test_tools_over_grpc_and_the_command(running, capsys):
    with Client(running.grpc) as client:
        answer = client.chat([Message("user", "call")], sampling=GREEDY, tools=[Tool("now", parameters=SCHEMA)])
    assert (answer.reasoning, answer.text, answer.tool_calls[0].arguments) == ("Hm", "", '{"a": 1}')
    assert main(["generate", "--greedy", "Is it so?", "--address", running.grpc]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}\n"
    assert REASONING in shown.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{% if %}", "bad.jinja: the chat template does not compile"),
        (b"\xff", "bad.jinja is not UTF-8 text"),
        (None, "cannot read .*bad.jinja: No such file"),
    ],
)
def test_a_wrong_template_is_refused_by_name(tmp_path, content, reason):
    file = tmp_path / "bad.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidPair, match=reason), mock_stack("mock", chat_template=file):
        pass
