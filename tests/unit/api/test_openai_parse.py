"""Tests that a body with very many errors is answered as quickly as one with a single error."""

import json

import pytest

from overfill.api.openai.errors import ApiError, from_error
from overfill.api.openai.parse import parse
from overfill.api.openai.schema import ChatRequest, CompletionRequest
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
