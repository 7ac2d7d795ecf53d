"""Tests that every field of the Messages API is listed in docs/reference/messages.md and behaves as stated there."""

import json
from typing import get_args, get_type_hints

import marked_tables
import messages_cases
import pytest
from anthropic.types import beta, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from http_calls import call
from messages_cases import BLOCKS, HI, REQUEST, TOOLS
from mocks import mock_stack

from overfill.api.messages.schema import CountTokensRequest, MessagesRequest

ALL = [*REQUEST, *BLOCKS, *TOOLS]


@pytest.fixture(scope="module")
def reply(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="first,second") as stack:

        def reply(**fields):
            body = {"model": "first", "messages": HI, "max_tokens": 200, "temperature": 0} | fields
            return call(f"{stack.url}/v1/messages", body)

        yield reply


@pytest.fixture(scope="module")
def ask(reply):
    def ask(**fields):
        answer = reply(**fields)
        if fields.get("stream"):
            events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]
            return {"content": [e["delta"] | {"type": "text"} for e in events if e["type"] == "content_block_delta"]}
        body = json.loads(answer.body)
        if answer.status == 200:
            return body
        assert (answer.status // 100, body["type"]) == (4, "error")
        return {"error": body["error"]["message"]}

    return ask


def same(answer):
    """Returns what depends on the prompt and the sampling alone."""
    return messages_cases.text(answer), messages_cases.tokens(answer), answer["stop_reason"]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_fields_do_what_the_table_says(reply, ask, case):
    if case.status == "supported":
        case.check(ask)
    elif case.status == "ignored":
        plain = {} if case in REQUEST else messages_cases.turns("Hi", "Ho", "Hi")
        assert same(ask(**case.fields)) == same(ask(**plain))
    elif case.status == "left out":
        assert same(ask(**case.fields)) == same(ask())
        (names,) = case.fields
        left_out = reply(**case.fields).headers["x-overfill-left-out"]
        assert left_out in (names, case.fields[names][0]["type"])
    elif case in REQUEST:
        assert f"'{case.name}' is not supported: " in ask(**case.fields)["error"]
    else:
        assert ask(**case.fields)["error"] == (
            f"'messages[0].content[0].type' '{case.name}' is not supported; blocks of text, thinking, tool_use and "
            "tool_result are"
        )


def test_null_means_the_same_as_an_absent_field(ask):
    needed = {"model", "messages", "max_tokens", "temperature"}
    assert same(ask(**{case.name: None for case in REQUEST if case.name not in needed})) == same(ask())


def test_no_field_of_the_reference_is_missing():
    """The reference is the official client's list of parameters, those of betas included."""
    names = [case.name for case in REQUEST]
    assert len(names) == len(set(names))
    params = (
        message_create_params.MessageCreateParamsBase,
        beta_create_params.MessageCreateParamsBase,
        message_count_tokens_params.MessageCountTokensParams,
    )
    known = {name for kind in params for name in kind.__annotations__} - {"betas"}  # the client makes a header of it
    assert known | {"stream"} <= set(names)
    assert set(MessagesRequest.model_fields) | set(CountTokensRequest.model_fields) <= set(names)


def test_no_block_of_the_reference_is_missing():
    listed = {case.name for case in BLOCKS}
    blocks = [kind for kind in get_args(beta.BetaContentBlockParam) if isinstance(kind, type)]
    types = {name for kind in blocks for name in get_args(get_type_hints(kind)["type"])}
    assert types | {"tool_reference"} == listed


def test_the_documented_table_is_the_tested_one():
    assert marked_tables.documented("messages.md") == messages_cases.render(), (
        "run python tests/integration/messages_cases.py"
    )
