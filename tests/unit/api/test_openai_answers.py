"""Tests the chunks of a streamed answer of OpenAI's API."""

from overfill.api.openai.answers import Choice, Envelope
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2


def choice(tokenizer=None):
    envelope = Envelope("chat", "id", "m", {}, "fp", tokenizer)
    return Choice(index=0, envelope=envelope, seed=1, prompt_tokens=3, logprobs=False)


def part(index, name="", arguments=""):
    return inference_pb2.ToolCallDelta(index=index, id=f"call_{index}" if name else "", name=name, arguments=arguments)


def test_a_chunk_has_one_entry_per_tool_call():
    """Clients such as instructor read the first entry of a chunk only."""
    parts = [part(0, arguments="}"), part(1, "now"), part(1, arguments='{"a'), part(1, arguments='": 1')]
    calls = choice().chunk(AnswerDelta(0, [7, 8], tool_calls=parts))["delta"]["tool_calls"]
    assert calls == [
        {"index": 0, "function": {"arguments": "}"}},
        {"index": 1, "id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1'}},
    ]
