"""Tests that the client builds requests from its arguments, and finds mistakes before it sends any."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import pytest

from overfill.client import AsyncClient, Client
from overfill.client.requests import Message, Options, Tool, ToolCall, build_request, check_timeout
from overfill.errors import InvalidRequest
from overfill.request.params import SamplingParams
from overfill.rpc.addresses import split_addresses
from overfill.v1 import inference_pb2

CALL = {"id": "c1", "name": "f", "arguments": "{}"}


def build(prompt: Any = "x", **fields: Any) -> inference_pb2.GenerateRequest:
    return build_request(prompt, cast(Options, fields))


def test_three_kinds_of_prompt() -> None:
    assert build("Hello").text == "Hello"
    assert list(build([1, 2]).token_ids.ids) == [1, 2]
    assert list(build((1, 2)).token_ids.ids) == [1, 2]
    chat = build([Message("system", "s"), {"role": "user", "content": "u"}]).chat
    assert [(m.role, m.content) for m in chat.messages] == [("system", "s"), ("user", "u")]


@pytest.mark.parametrize("content", ["text", "", None])
def test_tool_calls_may_be_mappings_and_then_content_may_be_none(content: str | None) -> None:
    for calls in ([CALL], (ToolCall(**CALL),)):
        given = {"role": "assistant", "content": content, "tool_calls": calls}
        (from_mapping,) = build([given]).chat.messages
        assert (from_mapping.role, from_mapping.content) == ("assistant", content or "")
        (call,) = from_mapping.tool_calls
        assert {"id": call.id, "name": call.name, "arguments": call.arguments} == CALL
        assert list(build([Message(**given)]).chat.messages) == [from_mapping]  # type: ignore[arg-type]


@pytest.mark.parametrize("rest", [{"content": None}, {}])
def test_an_assistants_content_may_be_absent(rest: dict[str, None]) -> None:
    (message,) = build([{"role": "assistant"} | rest]).chat.messages
    assert (message.role, message.content) == ("assistant", "")


def test_all_other_arguments_are_passed_on() -> None:
    sampling = SamplingParams(temperature=0.5, seed=3)
    request = build(model="m", sampling=sampling, stop=["a", "b"], request_id="r", resume_token_ids=[9], trace=True)
    assert (request.model, list(request.stop), request.request_id) == ("m", ["a", "b"], "r")
    assert (list(request.resume_token_ids), request.trace) == ([9], True)
    assert SamplingParams.from_proto(request.sampling) == sampling
    assert not build().HasField("sampling")
    request = build(tier="full", fallback="fast", allow_brownout=True)
    assert (request.tier, request.fallback, request.allow_brownout) == ("full", "fast", True)
    tools = [Tool("a", strict=True), Tool("b")]
    assert [tool.strict for tool in build([{"role": "user", "content": "Hi"}], tools=tools).chat.tools] == [True, False]


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("text", {"prompt": "a\ud800"}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": None}),
        ("token_ids.ids", {"prompt": [1, -1]}),
        ("token_ids.ids", {"prompt": [1, 1 << 32]}),
        ("token_ids.ids", {"prompt": [1, 1.5]}),
        ("token_ids.ids", {"prompt": [1, Message("user", "u")]}),
        ("chat.messages[1]", {"prompt": [Message("user", "u"), 1]}),
        ("chat.messages[0]", {"prompt": [{"content": "u"}]}),
        ("chat.messages[0]", {"prompt": [{"role": "user", "content": "u", "name": "n"}]}),
        ("chat.messages[0].content", {"prompt": [{"role": "user", "content": None}]}),
        ("chat.messages[0].content", {"prompt": [{"role": "user"}]}),
        ("chat.messages[0].content", {"prompt": [{"role": "tool", "tool_call_id": "c"}]}),
        ("chat.messages[0].content", {"prompt": [Message("user", "\udfff")]}),
        ("chat.messages[0].tool_calls", {"prompt": [{"role": "assistant", "tool_calls": None}]}),
        ("chat.messages[0].tool_calls", {"prompt": [{"role": "assistant", "tool_calls": CALL}]}),
        ("chat.messages[0].tool_calls[0]", {"prompt": [{"role": "assistant", "tool_calls": ["f"]}]}),
        ("chat.messages[0].tool_calls[1]", {"prompt": [{"role": "assistant", "tool_calls": [CALL, {"id": "c"}]}]}),
        (
            "chat.messages[0].tool_calls[0]",
            {"prompt": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {}}]}]},
        ),
        (
            "chat.messages[0].tool_calls[0].arguments",
            {"prompt": [{"role": "assistant", "tool_calls": [CALL | {"arguments": {}}]}]},
        ),
        ("stop", {"stop": "one string"}),
        ("stop", {"stop": ["\ud800"]}),
        ("model", {"model": "\ud800"}),
        ("request_id", {"request_id": 5}),
        ("tier", {"tier": None}),
        ("fallback", {"fallback": False}),
        ("resume_token_ids", {"resume_token_ids": [-1]}),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build(**fields)
    assert caught.value.field == field


def test_prompts_are_rendered_and_cut_as_asked() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    request = build(chat, chat_template_kwargs={"enable_thinking": False}, truncate_prompt_tokens=-1)
    assert request.chat.chat_template_kwargs == '{"enable_thinking": false}'
    assert request.truncate_prompt_tokens == -1
    assert build(chat, continue_final_message=True).chat.continue_final_message
    assert build(chat, parse_special=True).chat.parse_special
    assert not build("x").HasField("truncate_prompt_tokens")
    for field in ("chat_template_kwargs", "continue_final_message", "parse_special"):
        with pytest.raises(InvalidRequest, match="only for chats"):
            build("x", **{field: {"a": 1}})
    with pytest.raises(InvalidRequest, match="is not JSON"):
        build(chat, chat_template_kwargs={"a": math.nan})
    with pytest.raises(InvalidRequest, match=r"is not JSON: .*recursion"):
        build(chat, chat_template_kwargs={"a": reduce(lambda inner, _: [inner], range(100_000), [])})


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_timeouts_are_positive_and_finite(timeout: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_timeout(timeout)
    assert caught.value.field == "timeout"
    check_timeout(None)
    check_timeout(0.5)


def test_stop_strings_are_not_sampling_parameters_and_the_error_says_whose_they_are() -> None:
    with pytest.raises(InvalidRequest, match=r"generate\(prompt, stop=") as caught:
        SamplingParams(stop=["\n"])
    assert caught.value.field == "sampling.stop"
    assert replace(SamplingParams(seed=1), seed=2) == SamplingParams(seed=2)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000/v1", "HTTPS://example.org", "127.0.0.1:7600,http://x:8000"])
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_a_url_is_refused_and_the_error_says_what_an_address_is(client: Any, address: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)http.*is a URL; an address is HOST:PORT.*7600"):
        client(address)


def test_addresses() -> None:
    assert split_addresses("a:1, unix:/s") == ["a:1", "unix:/s"]
    for bad in ("", "a:1,,b:2", ","):
        with pytest.raises(ValueError, match="host:port"):
            split_addresses(bad)
