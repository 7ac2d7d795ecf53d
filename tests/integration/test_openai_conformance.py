"""Every field of OpenAI's reference does what docs/openai.md says, and every field is there."""

import json
import urllib.error
import urllib.request

import openai_cases
import pytest
from mocks import mock_stack
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_create_params
from openai_cases import CHAT, COMPLETIONS, EXTENSIONS, RESPONSE

PLAIN = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "seed": 1, "max_tokens": 24},
    "completions": {"prompt": "Hi", "seed": 1, "max_tokens": 24},
}
ALL = [
    *(("chat/completions", case) for case in CHAT),
    *(("completions", case) for case in COMPLETIONS),
    *((endpoint, case) for endpoint in PLAIN for case in EXTENSIONS),
]


class Refused(Exception):
    """Status and error object of an answer that is none."""


@pytest.fixture(scope="module")
def send(tiny_pair):
    with mock_stack(tiny_pair) as stack:
        with urllib.request.urlopen(f"{stack.url}/v1/models") as response:
            model = json.load(response)["data"][0]["id"]

        def send(endpoint, **fields):
            body = {"model": model} | PLAIN[endpoint] | fields
            request = urllib.request.Request(
                f"{stack.url}/v1/{endpoint}", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request) as response:
                    data = response.read()
            except urllib.error.HTTPError as error:
                with error:
                    raise Refused(error.code, json.load(error)["error"]) from None
            if not body.get("stream"):
                return json.loads(data)
            events = data.decode().split("\n\n")[:-1]
            assert events.pop() == "data: [DONE]"
            return [json.loads(event.removeprefix("data: ")) for event in events]

        yield send


def same(answer):
    """What of an answer depends on the request alone."""
    return answer["choices"], answer["usage"]


@pytest.mark.parametrize(("endpoint", "case"), ALL, ids=lambda value: getattr(value, "name", value))
def test_fields_do_what_the_table_says(send, endpoint, case):
    def ask(**fields):
        return send(endpoint, **fields)

    if case.status == "supported":
        case.check(ask)
    elif case.status == "ignored":
        assert same(ask(**{case.name: case.value})) == same(ask())
    else:
        with pytest.raises(Refused) as caught:
            ask(**{case.name: case.value})
        status, error = caught.value.args
        assert (status, error["param"], error["code"]) == (400, case.name, "unsupported_parameter")


@pytest.mark.parametrize("endpoint", PLAIN)
def test_null_is_as_good_as_nothing(send, endpoint):
    table = CHAT if endpoint.startswith("chat") else COMPLETIONS
    needed = {"model", *PLAIN[endpoint]}
    nulls = {case.name: None for case in (*table, *EXTENSIONS) if case.name not in needed}
    assert same(send(endpoint, **nulls)) == same(send(endpoint))


@pytest.mark.parametrize("endpoint", PLAIN)
def test_unknown_fields_are_refused_as_openai_does(send, endpoint):
    with pytest.raises(Refused) as caught:
        send(endpoint, made_up=1)
    status, error = caught.value.args
    assert (status, error["message"]) == (400, "Unrecognized request argument supplied: made_up")


def test_no_field_of_the_reference_is_missing():
    """As the official client knows it."""
    for params, table in (
        (chat_create_params.CompletionCreateParamsBase, CHAT),
        (completion_create_params.CompletionCreateParamsBase, COMPLETIONS),
    ):
        names = [case.name for case in table]
        assert len(names) == len(set(names))
        assert set(params.__annotations__) | {"stream"} <= set(names)


def test_answers_have_the_reference_s_fields(send):
    answer = send("chat/completions")
    parsed = ChatCompletion.model_validate(answer)
    assert set(RESPONSE["chat"]) | {"overfill"} == set(answer)
    assert set(RESPONSE["choice"]) == set(answer["choices"][0])
    assert set(RESPONSE["message"]) == set(answer["choices"][0]["message"])
    assert set(parsed.model_extra) == {"overfill"}, "nothing but our own object is unknown to the client"


def test_the_documented_table_is_the_tested_one():
    assert openai_cases.documented() == openai_cases.render(), "run python tests/integration/openai_cases.py"
