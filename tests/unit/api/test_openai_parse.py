"""Tests the requests of OpenAI's API: many errors are answered as quickly as one; reasoning is translated."""

import json

import pytest

from overfill.api.openai.errors import ApiError, from_error
from overfill.api.openai.parse import parse
from overfill.api.openai.schema import ChatRequest, CompletionRequest
from overfill.api.openai.translate import chat
from overfill.errors import InvalidRequest

MANY = 50_000


def explained(kind, **fields):
    with pytest.raises(ApiError) as caught:
        parse(kind, json.dumps({"model": "m", **fields}).encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}, "prompt[0]"),
        (CompletionRequest, {"prompt": [[1, 2], [1.5] * MANY]}, "prompt[1][0]"),
        (ChatRequest, {"messages": [1] * MANY}, "messages[0]"),
    ],
)
def test_only_the_first_wrong_item_of_a_list_is_named(kind, fields, param, monkeypatch):
    problems = []
    monkeypatch.setattr("overfill.api.openai.parse._explain", lambda error, body: problems.append(error) or told)
    told = ApiError(400, "told")
    explained(kind, **fields)
    assert problems[0].error_count() < 10, "the error mentions every item"
    monkeypatch.undo()
    assert param in explained(kind, **fields)


def test_a_great_many_problems_are_counted_not_listed():
    assert str(MANY) in explained(CompletionRequest, prompt="x", **{f"unknown_{i}": 1 for i in range(MANY)})


@pytest.mark.parametrize("body", [{"y" * 1_000_000: 1}, {"logit_bias": {"y" * 1_000_000: "a"}}])
def test_an_error_does_not_repeat_a_long_name(body):
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]} | body).encode())
    error = caught.value.body["error"]
    assert "yyy" in error["param"]
    assert "yyy" in error["message"]
    assert len(json.dumps(error)) < 2500


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("chat.messages[1].tool_calls[0].name", "messages[1].tool_calls[0].function.name"),
        ("chat.tools[0].parameters", "tools[0].function.parameters"),
        ("chat.messages[1].tool_calls", "messages[1].tool_calls"),
    ],
)
def test_errors_have_the_names_of_the_api(field, param):
    assert from_error(InvalidRequest(field, "is wrong")).param == param


ON, OFF = {"enable_thinking": True, "thinking": True}, {"enable_thinking": False, "thinking": False}


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"reasoning_effort": "none"}, OFF | {"reasoning_effort": "none"}),
        ({"reasoning_effort": "low"}, ON | {"reasoning_effort": "low"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False, "x": 1}},
            ON | {"thinking": False, "reasoning_effort": "high", "x": 1},
        ),
    ],
)
def test_the_effort_becomes_variables_of_the_template_unless_the_request_sets_them(fields, variables):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    (generate,) = chat(parse(ChatRequest, json.dumps(body).encode()), "id").prompts
    assert json.loads(generate.chat.chat_template_kwargs or "{}") == variables


def test_reasoning_is_read_by_either_name_from_assistants_only():
    given = [
        {"role": "user", "content": "Hi", "reasoning_content": "a client's own"},
        {"role": "assistant", "content": "x", "reasoning_content": "Hm"},
        {"role": "assistant", "content": "x", "reasoning": "So"},
        {"role": "assistant", "content": "x", "reasoning_content": None},
        {"role": "user", "content": "Hi"},
    ]
    body = {"model": "m", "messages": given}
    (generate,) = chat(parse(ChatRequest, json.dumps(body).encode()), "id").prompts
    assert [message.reasoning for message in generate.chat.messages] == ["", "Hm", "So", "", ""]
