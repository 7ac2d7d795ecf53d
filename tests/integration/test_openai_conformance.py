"""Tests that every field of OpenAI's API is listed in docs/reference/openai.md and behaves as stated there."""

import json

import marked_tables
import openai_cases
import pytest
from http_calls import call
from mocks import mock_stack
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_create_params
from openai_cases import (
    CHAT,
    CHAT_EXTENSIONS,
    COMPLETIONS,
    COMPLETIONS_EXTENSIONS,
    EXTENSIONS,
    OWN_EXTENSIONS,
    RESPONSE,
    NotAnswered,
)

from overfill.api.openai.schema import ChatRequest, CompletionRequest, refusals

PLAIN = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "seed": 1, "max_tokens": 24},
    "completions": {"prompt": "Hi", "seed": 1, "max_tokens": 24},
}
CASES = {
    "chat/completions": [*CHAT, *EXTENSIONS, *OWN_EXTENSIONS, *CHAT_EXTENSIONS],
    "completions": [*COMPLETIONS, *EXTENSIONS, *OWN_EXTENSIONS, *COMPLETIONS_EXTENSIONS],
}
KINDS = {"chat/completions": ChatRequest, "completions": CompletionRequest}
ALL = [(endpoint, case) for endpoint, cases in CASES.items() for case in cases]

# Fields that vLLM's server accepts in addition to OpenAI's, older names included.
# fmt: off
VLLM = [
    "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "cache_salt", "ec_transfer_params",
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
    "guided_whitespace_pattern", "ignore_eos", "include_stop_str_in_output", "kv_transfer_params", "length_penalty",
    "logits_processors", "logprob_token_ids", "min_p", "min_tokens", "priority", "prompt_logprobs",
    "repetition_detection", "repetition_penalty", "request_id", "response_format", "return_mm_kwargs",
    "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids", "routed_experts_prompt_start",
    "session_id", "skip_special_tokens", "spaces_between_special_tokens", "stop_token_ids", "stream_interval",
    "structured_outputs", "thinking_token_budget", "top_k", "truncate_prompt_tokens", "truncation_side",
    "use_beam_search", "vllm_xargs", "watermarking",
]
VLLM_CHAT = [
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo",
    "include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "reasoning_effort", "return_prompt_text",
]
# fmt: on


@pytest.fixture(scope="module")
def send(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="tiny") as stack:

        def send(endpoint, raw=None, **fields):
            body = {"model": "tiny"} | PLAIN[endpoint] | fields
            reply = call(f"{stack.url}/v1/{endpoint}", raw or body)
            if reply.status != 200:
                raise NotAnswered(reply.status, json.loads(reply.body)["error"])
            if not body.get("stream"):
                return json.loads(reply.body)
            events = reply.body.decode().split("\n\n")[:-1]
            assert events.pop() == "data: [DONE]"
            return [json.loads(event.removeprefix("data: ")) for event in events]

        yield send


def same(answer):
    """Returns the parts of an answer that depend on the request alone."""
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
        with pytest.raises(NotAnswered) as caught:
            ask(**{case.name: case.value})
        status, error = caught.value.args
        assert (status, error["param"], error["code"]) == (400, case.name, "unsupported_parameter")
        reason = refusals(KINDS[endpoint])[case.name].reason
        assert error["message"] == f"'{case.name}' is not supported here: {reason}"
        for neutral in refusals(KINDS[endpoint])[case.name].neutral:
            assert same(ask(**{case.name: neutral})) == same(ask())


@pytest.mark.parametrize("endpoint", PLAIN)
def test_null_means_the_same_as_an_absent_field(send, endpoint):
    needed = {"model", *PLAIN[endpoint]}
    nulls = {case.name: None for case in CASES[endpoint] if case.name not in needed}
    assert same(send(endpoint, **nulls)) == same(send(endpoint))


@pytest.mark.parametrize("endpoint", PLAIN)
def test_unknown_fields_are_refused_as_openai_does(send, endpoint):
    with pytest.raises(NotAnswered) as caught:
        send(endpoint, made_up=1)
    status, error = caught.value.args
    assert (status, error["message"]) == (400, "Unrecognized request argument supplied: made_up")


def test_no_field_of_the_reference_is_missing():
    """The reference is the official client's list of parameters."""
    for params, table in (
        (chat_create_params.CompletionCreateParamsBase, CHAT),
        (completion_create_params.CompletionCreateParamsBase, COMPLETIONS),
    ):
        names = [case.name for case in table]
        assert len(names) == len(set(names))
        assert set(params.__annotations__) | {"stream"} <= set(names)


@pytest.mark.parametrize("endpoint", PLAIN)
def test_every_field_has_a_case_and_vllm_s_are_among_them(endpoint):
    names = [case.name for case in CASES[endpoint]]
    assert len(names) == len(set(names))
    assert set(names) == set(KINDS[endpoint].model_fields)
    vllm = {*VLLM, *(VLLM_CHAT if endpoint.startswith("chat") else ["prompt_embeds"])}
    assert vllm <= set(names)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("endpoint", "param", "fields"),
    [
        ("chat/completions", "temperature", '"temperature": %s'),
        ("completions", "top_p", '"top_p": %s'),
        ("completions", "max_tokens", '"max_tokens": %s'),
        ("completions", "logit_bias.70", '"logit_bias": {"70": %s}'),
        (
            "chat/completions",
            "response_format",
            '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": %s}}}',
        ),
    ],
)
def test_invalid_numbers_are_refused_by_field(send, endpoint, param, fields, number):
    body = json.dumps({"model": "", **PLAIN[endpoint]})[:-1] + ", " + fields % number + "}"
    with pytest.raises(NotAnswered) as caught:
        send(endpoint, raw=body.encode())
    status, error = caught.value.args
    assert (status, error["param"]) == (400, param), error


def test_answers_have_the_reference_s_fields(send):
    answer = send("chat/completions")
    parsed = ChatCompletion.model_validate(answer)
    assert set(RESPONSE["chat"]) | {"overfill"} == set(answer)
    assert set(RESPONSE["choice"]) == set(answer["choices"][0])
    assert set(RESPONSE["message"]) == set(answer["choices"][0]["message"])
    assert set(parsed.model_extra) == {"overfill"}, "only the `overfill` object is unknown to the client"


def test_the_documented_table_is_the_tested_one():
    assert marked_tables.documented("openai.md") == openai_cases.render(), (
        "run python tests/integration/openai_cases.py"
    )
