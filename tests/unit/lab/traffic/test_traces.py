"""Traces: the two published formats, scaling, and synthetic arrivals."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from overfill.errors import InvalidRequest
from overfill.lab.traffic.traces import (
    TraceRequest,
    concatenate,
    read_trace,
    scale_lengths,
    sessions,
    set_rate,
    synthetic,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
"""
MOONCAKE = """{"timestamp": 1500, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 1500, "output_length": 3, "hash_ids": [0, 1, 7]}
"""


@pytest.fixture
def azure(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    return path


def test_azure_s_csv(azure):
    requests = read_trace(azure)
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(374, 44), (396, 109), (879, 55)]
    assert [r.arrival for r in requests] == pytest.approx([0, 4.314579, 4.541977], abs=1e-5)
    assert len(read_trace(azure, 2)) == 2


def test_mooncake_s_prompts_share_what_their_hashes_share(mooncake):
    first, second = read_trace(mooncake)
    assert (first.arrival, second.arrival) == (0, 1.5)
    one, two = first.prompt(1000, 0), second.prompt(1000, 1)
    assert (len(one), len(two)) == (1100, 1500)
    assert one[:1024] == two[:1024]
    assert one[1024:1100] != two[1024:1100]


def test_shares_survive_scaling(mooncake):
    first, second = scale_lengths(read_trace(mooncake), 0.25)
    one, two = first.prompt(1000, 0), second.prompt(1000, 1)
    assert (len(one), len(two), first.output_tokens, second.output_tokens) == (275, 375, 125, 1)
    assert one[:256] == two[:256]
    assert one[256:275] != two[256:275]


def test_prompts_are_cut_to_leave_room_for_answers():
    (cut,) = scale_lengths([TraceRequest(0, 4000, 100)], 0.5, longest=1000)
    assert (cut.prompt_tokens, cut.output_tokens) == (950, 50)
    with pytest.raises(InvalidRequest, match="an answer of 100 tokens leaves no room within 100"):
        scale_lengths([TraceRequest(0, 1, 100)], 1, longest=100)


def test_prompts_without_hashes_share_nothing_and_repeat():
    request = TraceRequest(0, 40, 1)
    assert request.prompt(1000, 1) == request.prompt(1000, 1)
    assert request.prompt(1000, 1) != request.prompt(1000, 2)
    assert all(64 <= token < 1000 for token in request.prompt(1000, 1))


def test_the_rate_of_a_trace_can_be_set(azure):
    requests = set_rate(read_trace(azure), 0.5)
    assert requests[-1].arrival == pytest.approx(4)
    assert requests[1].arrival == pytest.approx(4 * 4.314579 / 4.541977, rel=1e-4)
    with pytest.raises(InvalidRequest, match="arrive at once"):
        set_rate([TraceRequest(0.0, 1, 1)] * 3, 2)


def test_synthetic_arrivals():
    requests = synthetic(4000, 5, 8, 4, 0)
    assert requests[0].arrival == 0
    assert requests[-1].arrival == pytest.approx(800, rel=0.1)
    assert requests == synthetic(4000, 5, 8, 4, 0)


def test_each_turn_of_a_chat_begins_with_the_ones_before_it_and_their_answers():
    requests = sessions(3, 4, 100, 2.0, 50, 30, seed=1, block_tokens=8)
    assert len(requests) == 12
    assert [request.arrival for request in requests] == sorted(request.arrival for request in requests)
    chats = {}
    for request in requests:
        assert len(request.blocks) == request.prompt_tokens // 8
        assert len(request.blocks) + len(request.answer_blocks) == (request.prompt_tokens + 30) // 8
        chats.setdefault(request.blocks[12], []).append(request)
    assert {request.blocks[:12] for request in requests} == {tuple(range(12))}, "the system prompt"
    for turns in chats.values():
        assert [request.prompt_tokens for request in turns] == [150, 230, 310, 390]
        for before, after in pairwise(turns):
            whole = (*before.blocks, *before.answer_blocks)
            assert after.blocks[: len(whole)] == whole
    own = [{*turns[-1].blocks[12:], *turns[-1].answer_blocks} for turns in chats.values()]
    assert sum(map(len, own)) == len(set.union(*own)), "chats share nothing else"


def test_traces_in_a_row_keep_what_they_share_to_themselves(azure, mooncake):
    joined = concatenate([read_trace(mooncake), read_trace(azure), read_trace(mooncake)])
    assert [r.arrival for r in joined] == pytest.approx([0, 1.5, 1.5, 5.814579, 6.041977, 6.041977, 7.541977], abs=1e-5)
    assert [r.blocks for r in joined] == [(0, 1, 2), (0, 1, 7), (), (), (), (8, 9, 10), (8, 9, 15)]
    chats = [sessions(1, 2, 0, 1.0, 8, 8, seed=0, block_tokens=4)] * 2
    first, _, second, _ = concatenate(chats)
    assert not {*first.blocks, *first.answer_blocks} & {*second.blocks, *second.answer_blocks}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "when,what\n1,2\n", "line 2: TIMESTAMP: Field required, got \"{'when': '1', 'what': '2'}\""),
        ("a.csv", AZURE.splitlines()[0], "contains no requests"),
        ("a.csv", AZURE.replace(",44", ",0"), "line 2: GeneratedTokens: Input should be greater than 0, got '0'"),
        ("a.csv", AZURE.replace(",396,", ",many,"), "line 3: ContextTokens: Input should be a valid integer"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:51", "yesterday"), "line 4: TIMESTAMP: Input should be"),
        ("a.jsonl", MOONCAKE + "nonsense\n", "line 3: Invalid JSON"),
        ("a.jsonl", "[1]\n", "line 1: Input should be an object, got '[1]"),
        ("a.jsonl", MOONCAKE.replace("3000", '"soon"'), "line 2: timestamp: Input should be a valid number"),
        ("a.jsonl", MOONCAKE.replace(": 500,", ": -1,"), "line 1: output_length: Input should be greater than 0"),
        ("a.jsonl", MOONCAKE.replace("[0, 1, 7]", "[0, 1.5]"), "line 2: hash_ids: Input should be a valid integer"),
    ],
)
def test_line_and_field_of_what_is_wrong_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        read_trace(path)
