"""Tests which ``answer_start`` a worker of either stage accepts."""

import pytest

from overfill.errors import InvalidRequest
from overfill.rpc.worker import check_start
from overfill.v1 import common_pb2, decode_pb2, prefill_pb2, registry_pb2

HELLO = registry_pb2.Hello(worker_id="w")
START = decode_pb2.StartDecode(request_id="r", prompt_token_ids=[1, 2, 3])
PREFILL = prefill_pb2.StartPrefill(request_id="r", prompt_token_ids=[1, 2, 3])

SCORED = common_pb2.SamplingParams(prompt_logprobs=0)


def check(start):
    check_start(start, HELLO, draining=False)


def with_fields(message, **fields):
    changed = type(message)(**fields)
    changed.MergeFrom(message)
    return changed


@pytest.mark.parametrize(
    "message",
    [
        START,
        with_fields(START, answer_start=3),
        with_fields(PREFILL, answer_start=3),
        with_fields(START, answer_start=1, adapter_digest="d"),
        with_fields(PREFILL, answer_start=1),
    ],
)
def test_an_answer_start_inside_the_prompt_is_accepted_and_so_is_none(message):
    check(message)


@pytest.mark.parametrize("answer_start", [0, 4])
@pytest.mark.parametrize("message", [START, PREFILL], ids=["decode", "prefill"])
def test_an_answer_start_outside_the_prompt_is_refused(message, answer_start):
    with pytest.raises(InvalidRequest, match=rf"answer_start: must be in 1\.\.3.* got {answer_start}"):
        check(with_fields(message, answer_start=answer_start))


@pytest.mark.parametrize("message", [START, PREFILL], ids=["decode", "prefill"])
def test_a_decoder_computes_256_tokens_of_a_prompt_at_most_unless_it_scores_them(message):
    message = type(message)(prompt_token_ids=range(300))
    check(with_fields(message, answer_start=44))
    check(with_fields(message, answer_start=43, sampling=SCORED))
    with pytest.raises(InvalidRequest, match="answer_start: leaves the decoder 257 of the prompt's 300 tokens"):
        check(with_fields(message, answer_start=43))
