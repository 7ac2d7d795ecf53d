"""Tests the OpenAI endpoint of real stacks: grammars hold from the first token on, and when workers die."""

import json
import os
import signal

import jsonschema
import openai
import pytest
from stacks import children, idle, loads, running_stack, wait_until

from overfill.client import Client, Grammar, SamplingParams, Tool

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "list": {"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 60, "maxItems": 60},
        "last": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["list", "last"],
    "additionalProperties": False,
}
SHAPE = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def running(tiny_pair):
    with running_stack(tiny_pair, decode=2, http=0, max_model_len="2048") as (stack, address):
        client = openai.OpenAI(
            base_url=stack.spec.openai_urls(stack.placed.addresses)[0], api_key="none", max_retries=0
        )
        with client:
            yield stack, address, client


def test_streaming_equals_not_streaming_with_every_kind_of_parameter(running):
    _, address, client = running
    model = client.models.list().data[0].id
    kinds = [
        {"temperature": 0},
        {"temperature": 0.9, "top_p": 0.8, "n": 3},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "extra_body": {"repetition_penalty": 1.3, "top_k": 40}},
        {"logit_bias": {"80": 5, "90": -100}, "logprobs": True, "top_logprobs": 3},
        {"response_format": SHAPE, "max_tokens": 800},
        {"stop": ["e", "zz"]},
    ]
    for kind in kinds:
        fields = {"model": model, "messages": HI, "seed": 11, "max_tokens": 40} | kind
        whole = client.chat.completions.create(**fields)
        texts = [""] * len(whole.choices)
        with client.chat.completions.create(**fields, stream=True) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices], kind
    wait_until(lambda: idle(address), 5, "all blocks free")


def test_one_bias_rules_both_stages(running):
    """A bias yields token 77 from the full model and from the decoder."""
    _, address, _ = running
    with Client(address) as client:
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={77: 100})
        assert client.generate("Hi", sampling=sampling).token_ids == (77,) * 8


def test_a_killed_decode_worker_costs_neither_shape_nor_penalties(tiny_pair):
    shaped = SamplingParams(seed=3, max_tokens=800, grammar=Grammar.json_schema(SCHEMA))
    penalised = SamplingParams(seed=3, max_tokens=400, ignore_eos=True, frequency_penalty=1.0, repetition_penalty=1.2)
    least = SamplingParams(seed=3, min_tokens=400, logit_bias={1: 100})  # ends the answer as soon as min_tokens allows
    greedy = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    kinds = (shaped, penalised, least, greedy)
    # One stack, of which each kind costs a decode worker.
    with (
        running_stack(tiny_pair, decode=len(kinds) + 1, max_model_len="2048") as (stack, address),
        Client(address) as client,
    ):
        for sampling in kinds:
            expected = client.generate("Hi", sampling=sampling)
            with client.stream("Hi", sampling=sampling) as stream:
                next(stream)
                busy = next(
                    id for id, load in loads(address).items() if id.startswith("decode") and load.kv_blocks_used
                )
                (victim,) = [child for child in children(stack, "decode") if child.name == busy]
                os.kill(victim.pid, signal.SIGKILL)
                for _ in stream:
                    pass
            assert stream.answer.migrations == 1
            assert stream.answer.token_ids == expected.token_ids
            if sampling.grammar is not None:
                jsonschema.validate(json.loads(stream.answer.text), SCHEMA)
        wait_until(lambda: idle(address), 5, "all blocks free")


def test_the_sdk_calls_tools(running):
    _, address, _ = running
    tools = [Tool("pick", "Picks.", SCHEMA), Tool("nothing")]
    with Client(address) as client:
        for choice, names in (("required", {"pick", "nothing"}), ("pick", {"pick"})):
            options = {"tools": tools, "tool_choice": choice, "single_tool_call": True}
            sampling = SamplingParams(seed=1, max_tokens=900)
            with client.stream(HI, sampling=sampling, **options) as stream:
                arguments = "".join(part.arguments for delta in stream for part in delta.tool_calls)
            answer = stream.answer
            (call,) = answer.tool_calls
            assert answer.finish_reason == "tool_calls"
            assert answer.text == ""
            assert call.name in names
            assert call.arguments == arguments
            jsonschema.validate(json.loads(arguments), SCHEMA if call.name == "pick" else {"type": "object"})
            (again,) = client.chat(HI, sampling=sampling, **options).tool_calls
            assert (again.arguments, again.id == call.id) == (arguments, False)
            options |= {"request_id": answer.request_id, "resume_token_ids": answer.token_ids[:1]}
            options |= {"resume_identity": answer.identity}
            (resumed,) = client.chat(HI, sampling=sampling, **options).tool_calls
            assert resumed.id == call.id
