"""Tests the Responses API with OpenAI's own SDK: each case streamed and not, both with the same items."""

import openai
import pytest
from mocks import mock_stack
from openai.types.responses import Response

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}

SCRIPT = [
    {"text": "Bonjour, é 😀."},
    {"when": "weather?", "tool_calls": [CALL]},
    {"when": "two calls?", "text": "I look.", "tool_calls": [CALL, CALL | {"arguments": {"city": "Rome"}}]},
]

CASES = {
    "text": ({"input": "Hi"}, ["message"]),
    "a function": ({"input": "weather?", "tools": [WEATHER]}, ["function_call"]),
    "text and calls": ({"input": "two calls?", "tools": [WEATHER]}, ["message", "function_call", "function_call"]),
}


@pytest.fixture(scope="module")
def client(tiny_pair):
    with (
        mock_stack(tiny_pair, served_model_name="m", workers={"script": SCRIPT}) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def shape(item):
    """Returns the item without its ids, which derive from that of the response."""
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_has_what_the_whole_response_has(client, case):
    fields, kinds = CASES[case]
    whole = client.responses.create(model="m", **fields)
    events = list(client.responses.create(model="m", stream=True, **fields))
    last = events[-1].response
    with client.responses.stream(model="m", **fields) as stream:  # the SDK follows the items
        assert stream.get_final_response().output_text == whole.output_text
    for response in (whole, last):
        Response.model_validate(response.to_dict(), strict=True)
        assert [item.type for item in response.output] == kinds
    assert [shape(item.to_dict()) for item in last.output] == [shape(item.to_dict()) for item in whole.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event.item.to_dict() for event in events if event.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in last.output]
