"""Tests that docs/reference/responses.md lists every field, item and tool, and that they behave as stated there."""

import json
from typing import get_args, get_type_hints

import marked_tables
import pytest
import responses_cases
from http_calls import call
from mocks import mock_stack
from openai.types import responses as sdk
from openai.types.responses import response_create_params
from openai_cases import NotAnswered
from responses_cases import EXTENSIONS, ITEMS, REQUEST, TOOLS

from overfill.api.openai.schema import refusals
from overfill.api.responses.schema import ITEM_TYPES, ResponsesRequest


@pytest.fixture(scope="module")
def reply(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="tiny") as stack:

        def reply(**fields):
            body = {"model": "tiny", "input": "Hi", "seed": 1, "max_output_tokens": 24} | fields
            return call(f"{stack.url}/v1/responses", body)

        yield reply


@pytest.fixture(scope="module")
def ask(reply):
    def ask(**fields):
        answer = reply(**fields)
        if answer.status != 200:
            raise NotAnswered(answer.status, json.loads(answer.body)["error"])
        if fields.get("stream"):
            lines = answer.body.decode().splitlines()
            return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        return json.loads(answer.body)

    return ask


def same(response):
    """Returns what depends on the prompt and the sampling alone."""
    return responses_cases.text(response), response["usage"]["input_tokens"], response["status"]


@pytest.mark.parametrize("case", [*REQUEST, *EXTENSIONS, *ITEMS, *TOOLS], ids=lambda case: case.name)
def test_fields_do_what_the_table_says(reply, ask, case):
    if case.check is not None:
        case.check(ask)
    elif case in TOOLS:
        made = reply(tools=[{"type": case.name}])
        assert made.headers["x-overfill-left-out"] == case.name
        assert same(json.loads(made.body)) == same(ask())
    elif case.status == "ignored":
        assert same(ask(**{case.name: case.value})) == same(ask())
    else:
        with pytest.raises(NotAnswered) as caught:
            ask(**{case.name: case.value})
        status, error = caught.value.args
        assert (status, error["param"], error["code"]) == (400, case.name, "unsupported_parameter")
        mark = refusals(ResponsesRequest)[case.name]
        assert error["message"] == f"'{case.name}' is not supported here: {mark.reason}"
        for neutral in mark.neutral:
            assert same(ask(**{case.name: neutral})) == same(ask())


def test_null_means_the_same_as_an_absent_field(ask):
    needed = {"model", "input", "seed", "max_output_tokens"}
    nulls = {case.name: None for case in (*REQUEST, *EXTENSIONS) if case.name not in needed}
    assert same(ask(**nulls)) == same(ask())


def types_of(union):
    """Returns the values of ``type`` in the classes of a union of the SDK."""
    kinds = [kind for part in get_args(union) for kind in (get_args(part) or (part,)) if isinstance(kind, type)]
    hints = [get_type_hints(kind).get("type") for kind in kinds]
    return {name for hint in hints for name in _literals(hint)}


def _literals(hint):
    return [value for part in get_args(hint) for value in ([part] if isinstance(part, str) else _literals(part))]


def test_no_field_item_or_tool_of_the_reference_is_missing():
    """The reference is the official client's list of parameters and types."""
    names = [case.name for case in (*REQUEST, *EXTENSIONS)]
    assert len(names) == len(set(names))
    assert set(names) == set(ResponsesRequest.model_fields)
    assert set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"} <= set(names)
    items = {case.name for case in ITEMS}
    assert types_of(sdk.ResponseInputItemParam) <= items
    assert {case.name for case in ITEMS if case.status == "supported"} == set(ITEM_TYPES)
    assert {kind for kind in types_of(sdk.ToolParam) if "_20" not in kind} <= {case.name for case in TOOLS}


def test_the_documented_table_is_the_tested_one():
    assert marked_tables.documented("responses.md") == responses_cases.render(), (
        "run python tests/integration/responses_cases.py"
    )
