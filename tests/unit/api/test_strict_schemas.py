"""Tests that ``strict`` forbids all keys that a schema does not name, at any depth."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overfill.api.openai import wire
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import parse
from overfill.api.openai.schema import ChatRequest
from overfill.api.openai.strict import CannotForbid, forbid_additional_properties
from overfill.request.grammar import check_grammar
from overfill.request.params import Grammar

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
    assert forbid_additional_properties(OPEN) == CLOSED
    assert forbid_additional_properties(CLOSED) == CLOSED
    assert "additionalProperties" not in OPEN, "the given schema is not changed"


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


NAMES_Z = {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"allOf": [NAMES_Z, NAMES_Z]}, "has 'allOf', which cannot be combined with 'strict'"),
        ({"type": "object", "properties": {}, "allOf": [NAMES_Z]}, "has 'allOf'"),
        ({"allOf": [NAMES_Z | {"$defs": {}}], "$defs": {"z": NAMES_Z}}, "has 'allOf'"),
        ({"allOf": [True]}, "has 'allOf'"),
        ({"type": "object", "properties": {"k": {}}, "anyOf": [NAMES_Z]}, "has 'anyOf' beside 'properties'"),
        ({"type": ["object", "null"], "oneOf": [NAMES_Z]}, "has 'oneOf' beside 'type'"),
        ({"$ref": "#/$defs/z", "properties": {"k": {}}, "$defs": {"z": NAMES_Z}}, "has '$ref' beside 'properties'"),
        ({"properties": {"k": {"items": {"allOf": [NAMES_Z, NAMES_Z]}}}}, "has 'allOf'"),
    ],
)
def test_an_object_that_several_schemas_describe_is_refused_by_name(schema, reason):
    with pytest.raises(ApiError) as caught:
        asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    assert caught.value.param == "response_format"
    assert reason in str(caught.value)
    assert "name all properties in one object" in str(caught.value)
    function = {"name": "f", "parameters": schema, "strict": True}
    with pytest.raises(ApiError, match="cannot be combined with 'strict'") as caught:
        asked(tools=[{"type": "function", "function": function}])
    assert caught.value.param == "tools[0].function.parameters"
    with pytest.raises(ApiError, match="cannot be combined with 'disable_additional_properties'"):
        asked(structured_outputs={"json": schema, "disable_additional_properties": True})
    asked(structured_outputs={"json": schema})


def test_one_schema_in_all_of_is_taken_out():
    """Pydantic writes a reference with a default or a title like this."""
    reference = {"allOf": [{"$ref": "#/$defs/z", "title": "Inner"}], "default": {"z": 1}, "title": "Outer"}
    schema = {"properties": {"k": reference}, "$defs": {"z": {"allOf": [{"allOf": [NAMES_Z]}]}}}
    shut = NAMES_Z | {"additionalProperties": False}
    strict = forbid_additional_properties(schema)
    assert strict["properties"]["k"] == {"$ref": "#/$defs/z", "default": {"z": 1}, "title": "Outer"}
    assert strict["$defs"] == {"z": shut}
    check_grammar(Grammar.json_schema(strict))
    root = {"allOf": [{"$ref": "#/$defs/z"}], "$defs": {"z": NAMES_Z}}
    assert forbid_additional_properties(root) == {"$ref": "#/$defs/z", "$defs": {"z": shut}}


def test_alternatives_and_references_are_closed_where_they_stand():
    schema = {"anyOf": [NAMES_Z, {"$ref": "#/$defs/z", "type": "object"}], "$defs": {"z": NAMES_Z}}
    shut = NAMES_Z | {"additionalProperties": False}
    assert forbid_additional_properties(schema) == {"anyOf": [shut, schema["anyOf"][1]], "$defs": {"z": shut}}


def test_a_map_has_no_keys_and_listed_values_keep_theirs():
    assert forbid_additional_properties({"type": "object"}) == {"type": "object", "additionalProperties": False}
    listed = {"type": "object", "enum": [{"a": 1}]}
    assert forbid_additional_properties(listed) == listed


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}, {"parameters": {}}])
def test_a_strict_tool_without_parameters_takes_no_arguments(parameters):
    function = {"name": "now", "strict": True} | parameters
    chat = asked(tools=[{"type": "function", "function": function}]).chat
    assert json.loads(chat.tools[0].parameters) == {"type": "object", "properties": {}, "additionalProperties": False}


def test_a_schema_that_is_nested_too_deeply_is_the_client_s_fault():
    deep = '{"items":' * 900 + "{}" + "}" * 900
    with pytest.raises(ApiError, match="nested too deeply") as caught:
        asked(structured_outputs={"json": deep, "disable_additional_properties": True})
    assert caught.value.param == "structured_outputs.json"


anything = st.recursive(
    st.sampled_from([None, True, 1, "", "object", "array", "#"]),
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
def test_any_schema_is_closed_or_refused(schema):
    try:
        once = forbid_additional_properties(schema)
    except CannotForbid:
        return
    assert forbid_additional_properties(once) == once
