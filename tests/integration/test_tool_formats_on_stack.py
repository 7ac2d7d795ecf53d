"""Tests formats of tool calls on a stack of mock workers, which play the raw tokens of each family."""

import json

import pytest
from http_calls import call
from mocks import mock_stack

TEXT = "Let me look.\nI read, then I write."
CALLS = [
    {"name": "read", "arguments": {"path": "a.py", "lines": [1, 20], "all": False}},
    {"name": "write", "arguments": {"path": "Köln.py", "text": 'x = "[1]"\n\n\n</tool_call>'}},
]
STRING = {"type": "string"}
LINES = {"type": "array", "items": {"type": "integer"}}
TOOLS = [
    {"name": "read", "parameters": {"properties": {"path": STRING, "lines": LINES, "all": {"type": "boolean"}}}},
    {"name": "write", "parameters": {"properties": {"path": STRING, "text": STRING}, "required": ["path", "text"]}},
]


def ask(running, messages, stream=False, **fields):
    """Returns text, calls, their ids and the finish reason of an answer over HTTP."""
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    body = {"model": "mock", "messages": messages, "tools": tools, "temperature": 0, "stream": stream, **fields}
    reply = call(f"{running.url}/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    if not stream:
        (choice,) = json.loads(reply.body)["choices"]
        made = choice["message"].get("tool_calls", ())
        calls = [(made["function"]["name"], made["function"]["arguments"]) for made in made]
        return choice["message"]["content"], calls, [made["id"] for made in made], choice["finish_reason"]
    text, calls, ids = "", [], []
    for event in reply.body.decode().split("\n\n")[:-2]:
        (choice,) = json.loads(event[6:])["choices"]
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", ()):
            if "id" in part:
                ids.append(part["id"])
                calls.append((part["function"]["name"], ""))
            name, arguments = calls[part["index"]]
            calls[part["index"]] = (name, arguments + part["function"]["arguments"])
    return text, calls, ids, choice["finish_reason"]


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "pythonic", "mistral", "qwen3_coder"])
def test_a_family_s_raw_tokens_become_calls_and_go_back_to_the_model(parser):
    script = [{"text": TEXT + "\n", "tool_calls": CALLS}]
    workers = {"script": script, "tool_call_parser": parser, "answer_tokens": None}
    with mock_stack("mock", workers=workers, tool_call_parser=parser) as running:
        messages = [{"role": "user", "content": "Change it."}]
        answers = [ask(running, messages, stream) for stream in (False, True)]
        for text, calls, ids, reason in answers:
            assert (text, reason, len(ids)) == (TEXT, "tool_calls", 2)
            assert [{"name": name, "arguments": json.loads(arguments)} for name, arguments in calls] == CALLS
        assert answers[0][1] == answers[1][1]
        required = ask(running, messages, tool_choice="required", max_tokens=400)
        assert not required[0]
        _, calls, ids, _ = answers[0]
        made = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, (name, arguments) in zip(ids, calls, strict=True)
        ]
        results = [{"role": "tool", "tool_call_id": id, "content": "done"} for id in ids]
        assert ask(running, [*messages, {"role": "assistant", "tool_calls": made}, *results])[3] == "tool_calls"
