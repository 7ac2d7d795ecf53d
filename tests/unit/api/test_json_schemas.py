"""Tests which objects of a schema are closed, by default and with ``strict``, at any depth."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overfill.api.openai import translate
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import parse
from overfill.api.openai.schema import ChatRequest
from overfill.api.tools_grammar import chat_grammar
from overfill.request.grammar import check_grammar, compact
from overfill.request.json_schemas import CannotForbid, close_objects, forbid_additional_properties
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
    return translate.chat(parse(ChatRequest, json.dumps(body).encode()), "r").prompts[0]


def test_every_object_is_closed_at_any_depth():
    assert forbid_additional_properties(OPEN) == CLOSED
    assert forbid_additional_properties(CLOSED) == CLOSED
    assert "additionalProperties" not in OPEN, "the given schema is not changed"


@pytest.mark.parametrize("strict", [True, False, None])
def test_the_prompt_shows_a_tool_as_the_client_describes_it_unless_it_is_strict(strict):
    function = {"name": "weather", "parameters": OPEN} | ({} if strict is None else {"strict": strict})
    chat = asked(tools=[{"type": "function", "function": function}]).chat
    assert json.loads(chat.tools[0].parameters) == (CLOSED if strict else OPEN)


def compiled(**fields):
    """The schema that llguidance gets for the answers to a request over HTTP."""
    request = asked(**fields)
    text = request.sampling.grammar.json_schema
    if request.chat.tools:
        (line,) = (line for line in chat_grammar(request.chat).text.splitlines() if line.startswith("rest_0"))
        text = line.partition("%json ")[2]
    return {keyword: value for keyword, value in compact(json.loads(text)).items() if keyword in CLOSED}


def formatted(**described):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": OPEN, **described}}


# The free object in `x.additionalProperties` stays open without `strict`.
SHUT = json.loads(json.dumps(CLOSED).replace('{"type": "object", "additionalProperties": false}', '{"type": "object"}'))


@pytest.mark.parametrize("strict", [True, False, None])
def test_schemas_are_closed_by_default(strict):
    wanted = CLOSED if strict else SHUT
    assert compiled(response_format=formatted(strict=strict)) == wanted
    assert (
        compiled(tools=[{"type": "function", "function": {"name": "f", "parameters": OPEN, "strict": strict}}])
        == wanted
    )
    assert compiled(guided_json=OPEN) == SHUT
    for closed in ({}, {"disable_additional_properties": True}):
        assert compiled(structured_outputs={"json": OPEN} | closed) == SHUT


def test_a_request_may_keep_its_objects_open():
    more = {"disable_additional_properties": False}
    opened = json.loads(json.dumps(SHUT).replace("false", "true"))
    assert compiled(structured_outputs={"json": OPEN} | more) == opened
    assert compiled(guided_json=OPEN, structured_outputs=more) == opened
    assert compiled(response_format=formatted(), structured_outputs=more) == opened
    assert compiled(guided_json=OPEN | {"additionalProperties": True})["additionalProperties"] is True


NAMES_Z = {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"allOf": [NAMES_Z, NAMES_Z]}, "has 'allOf', which cannot be combined with 'strict'"),
        ({"type": "object", "properties": {}, "allOf": [NAMES_Z]}, "has 'allOf'"),
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
    assert close_objects(schema)


def test_one_schema_in_all_of_is_closed_where_it_stands():
    """Pydantic writes a reference with a default or a title like this."""
    reference = {"allOf": [{"$ref": "#/$defs/z", "title": "Inner"}], "default": {"z": 1}, "title": "Outer"}
    schema = {"properties": {"k": reference}, "$defs": {"z": {"allOf": [{"allOf": [NAMES_Z]}]}}}
    shut = NAMES_Z | {"additionalProperties": False}
    strict = forbid_additional_properties(schema)
    assert strict["properties"]["k"] == reference
    assert strict["$defs"] == {"z": {"allOf": [{"allOf": [shut]}]}}
    assert close_objects(schema) == strict
    check_grammar(Grammar.json_schema(strict))
    root = {"allOf": [{"$ref": "#/$defs/z"}], "$defs": {"z": NAMES_Z}}
    assert forbid_additional_properties(root) == close_objects(root) == root | {"$defs": {"z": shut}}


NAMES_K = {"type": "object", "properties": {"k": NAMES_Z}, "required": ["k"]}
DEFS = {"z": NAMES_Z, "again": {"$ref": "#/$defs/z"}, "either": {"anyOf": [NAMES_Z, {"type": "null"}]}}
TOGETHER = {
    "all of": {"allOf": [NAMES_Z, NAMES_K]},
    "all of a reference": {"allOf": [{"$ref": "#/$defs/again"}, {"$ref": "#/$defs/either"}, NAMES_K]},
    "beside any of": NAMES_K | {"anyOf": [NAMES_Z, {"required": ["other"]}]},
    "beside a reference": NAMES_K | {"$ref": "#/$defs/z"},
    "beside a pointer": {"oneOf": [NAMES_K, {"properties": {"z": {}}, "$ref": "#/oneOf/0"}]},
    "two keywords": {"$ref": "#/$defs/z", "anyOf": [NAMES_K]},
    "if": NAMES_K | {"if": {"required": ["k"]}, "then": {"$ref": "#/$defs/z"}},
    "dependent": NAMES_K | {"dependentSchemas": {"m": NAMES_Z}},
    "not": {"not": {"$ref": "#/$defs/z"}, "anyOf": [NAMES_K]},
    "required elsewhere": NAMES_Z | {"required": ["z", "other"]},
    "more than named": NAMES_Z | {"minProperties": 2},
    "unevaluated": NAMES_Z | {"unevaluatedProperties": {"type": "string"}},
    "listed": NAMES_Z | {"enum": [{"z": 1, "other": 2}]},
    "free": {"type": "object"},
    "anchor": {"allOf": [{"$ref": "#there"}, {"$anchor": "there"} | NAMES_Z]},
    "other document": {"allOf": [{"$ref": "https://example.org/#/$defs/z"}, NAMES_Z]},
    "dangling": {"allOf": [{"$ref": "#/$defs/none"}, {"$ref": "#/allOf/7"}]},
}


@pytest.mark.parametrize("schema", TOGETHER.values(), ids=TOGETHER)
def test_an_object_that_closing_could_contradict_stays_open(schema):
    whole = schema | {"$defs": DEFS}
    closed = close_objects(whole)
    shut = NAMES_Z | {"additionalProperties": False}
    assert {key: value for key, value in closed.items() if key != "$defs"} in (
        schema,
        json.loads(json.dumps(schema).replace(json.dumps({"k": NAMES_Z}), json.dumps({"k": shut}))),
    )


def test_only_an_object_that_is_described_alone_is_closed():
    """The property of a part is an object of its own; the schema that two objects share stays open for both."""
    schema = {
        "properties": {
            "alone": {"$ref": "#/$defs/z"},
            "both": {"allOf": [{"$ref": "#/$defs/shared"}, NAMES_K]},
            "root": {"$ref": "#"},
        },
        "$defs": {"z": NAMES_Z, "shared": NAMES_Z},
    }
    closed = close_objects(schema)
    shut = NAMES_Z | {"additionalProperties": False}
    assert closed["additionalProperties"] is False
    assert closed["$defs"] == {"z": shut, "shared": NAMES_Z}
    assert closed["properties"]["both"]["allOf"][1] == NAMES_K | {"properties": {"k": shut}}
    check_grammar(Grammar.json_schema(closed))


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


def test_deep_schemas_need_no_stack():
    deep, place = {"properties": {}}, None
    for _ in range(10_000):
        deep = {"properties": {"a": deep}, "items": {}}
    for close in (close_objects, forbid_additional_properties):
        place = close(deep)
        while place["properties"]:
            assert place["additionalProperties"] is False
            place = place["properties"]["a"]


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
    assert close_objects(close_objects(schema)) == close_objects(schema)
    try:
        once = forbid_additional_properties(schema)
    except CannotForbid:
        return
    assert forbid_additional_properties(once) == once
