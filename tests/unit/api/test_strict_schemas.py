"""What ``strict`` says of a schema: no keys but those that it names, at any depth."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overfill.api.openai import wire
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import parse
from overfill.api.openai.schema import ChatRequest
from overfill.api.openai.strict import closed

OPEN = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        "either": {"anyOf": [{"type": ["object", "null"], "properties": {}}, {"$ref": "#/$defs/extra"}]},
    },
    "$defs": {"extra": {"properties": {"x": {"type": "object", "additionalProperties": {"type": "object"}}}}},
}
CLOSED = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {
            "type": "array",
            "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False},
        },
        "either": {
            "anyOf": [
                {"type": ["object", "null"], "properties": {}, "additionalProperties": False},
                {"$ref": "#/$defs/extra"},
            ]
        },
    },
    "$defs": {
        "extra": {
            "properties": {
                "x": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": False}}
            },
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}


def asked(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return wire.chat(parse(ChatRequest, json.dumps(body).encode()), "r").prompts[0]


def test_every_object_is_closed_at_any_depth():
    assert closed(OPEN) == CLOSED
    assert closed(CLOSED) == CLOSED
    assert "additionalProperties" not in OPEN, "the schema that was given stays as it is"


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_tool_is_closed_when_it_is_strict_and_only_then(strict):
    function = {"name": "weather", "parameters": OPEN} | ({} if strict is None else {"strict": strict})
    chat = asked(tools=[{"type": "function", "function": function}]).chat
    assert json.loads(chat.tools[0].parameters) == (CLOSED if strict else OPEN)


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_response_format_is_closed_when_it_is_strict_and_only_then(strict):
    described = {"name": "x", "schema": OPEN} | ({} if strict is None else {"strict": strict})
    request = asked(response_format={"type": "json_schema", "json_schema": described})
    assert json.loads(request.sampling.grammar.json_schema) == (CLOSED if strict else OPEN)


def test_what_describes_one_object_together_is_closed_once():
    parts = {"allOf": [{"properties": {"a": {"type": "object"}}}, {"properties": {"b": {}}}]}
    assert closed(parts)["allOf"] == [
        {"properties": {"a": {"type": "object", "additionalProperties": False}}},
        {"properties": {"b": {}}},
    ]
    beside = {"type": "object", "properties": {"a": {}}, "anyOf": [{"properties": {"a": {"type": "string"}}}]}
    assert closed(beside) == {**beside, "additionalProperties": False}


def test_a_schema_that_is_nested_too_deeply_is_the_client_s_fault():
    deep = '{"items":' * 900 + "{}" + "}" * 900
    with pytest.raises(ApiError, match="nested too deeply") as caught:
        asked(structured_outputs={"json": deep, "disable_additional_properties": True})
    assert caught.value.param == "structured_outputs.json"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "items", "anyOf", "allOf", "$defs", "additionalProperties", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["type", "properties", "items", "anyOf", "x"]), anything, max_size=4))
def test_no_schema_however_wrong_breaks_it(schema):
    once = closed(schema)
    assert closed(once) == once
