"""Tests codecs of KV on a real stack: the choice per pool and per request, and its report."""

import pytest
from stacks import idle, running_stack, wait_until

from overfill.client import Client, InvalidRequest, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPT = [(7 * i * 13) % 470 + 20 for i in range(100)]
RAW_BYTES = 100 * 4 * 2 * 2 * 16 * 4


def test_pools_and_requests_choose_a_codec_and_share_kv_within_it_only(tiny_pair):
    with running_stack(tiny_pair, kv_codec="int8") as (_, address), Client(address) as client:
        raw = client.generate(PROMPT, sampling=GREEDY, trace=True, kv_codec="raw")
        assert (raw.codec, raw.trace.kv_bytes) == ("raw", RAW_BYTES)
        first = client.generate(PROMPT, sampling=GREEDY, trace=True)
        assert first.codec == "int8"
        assert first.usage.cached_tokens == 96  # the prefill worker's KV is not rounded
        assert first.trace.held_tokens == 0  # raw KV does not have the requested codec
        assert first.trace.kv_bytes == RAW_BYTES * (16 + 4) // 64
        again = client.generate(PROMPT, sampling=GREEDY, trace=True, kv_codec="int8")
        assert again.trace.held_tokens == 96
        assert again.token_ids == first.token_ids
        exact = client.generate(PROMPT, sampling=GREEDY, trace=True, kv_codec="raw")
        assert exact.trace.held_tokens == 96
        assert exact.token_ids == raw.token_ids
        with pytest.raises(InvalidRequest, match="kv_codec"):
            client.generate(PROMPT, sampling=GREEDY, kv_codec="zip")
        wait_until(lambda: idle(address), 5, "all blocks free")


def test_a_decode_worker_that_holds_kv_as_int8_asks_for_it_so_and_takes_raw_kv_too(tiny_pair):
    held_bytes = 4 * 2 * 2 * (16 + 4)
    with (
        running_stack(tiny_pair, kv_cache_dtype="int8", kv_memory="256KiB", max_model_len=256) as (_, address),
        Client(address) as client,
    ):
        decode = next(w.process for w in client.status().workers if w.stage == "decode")
        assert (decode.model.kv_cache_dtype, decode.codec) == ("int8", "int8")
        assert decode.load.kv_blocks_total == 262144 // (16 * held_bytes)
        coded = client.generate(PROMPT, sampling=GREEDY, trace=True)
        assert (coded.codec, coded.trace.kv_bytes) == ("int8", RAW_BYTES * 20 // 64)
        raw = client.generate(PROMPT, sampling=GREEDY, trace=True, kv_codec="raw")
        assert (raw.codec, raw.trace.kv_bytes) == ("raw", RAW_BYTES)
        assert raw.token_ids == coded.token_ids  # rounding at either end gives the same codes
        wait_until(lambda: idle(address), 5, "all blocks free")
