"""Tests that KV is sent layer by layer while later layers run."""

import random

from stacks import running_stack

from overfill.client import Client, SamplingParams
from overfill.making.tiny import make_tiny_pair

TOKENS = 1500


def test_kv_leaves_before_the_last_layer_starts(tmp_path):
    # Its layers take long enough for KV to be sent before the last one, even on shared cores.
    pair = make_tiny_pair(tmp_path / "wide", num_layers=8, intermediate_size=2048)
    prompt = random.Random(0).choices(range(20, 500), k=TOKENS)
    settings = {"max_num_batched_tokens": TOKENS, "max_model_len": 2048, "kv_memory": "16MiB"}  # one chunk
    with running_stack(pair, **settings) as (_, address), Client(address) as client:
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        trace = client.generate(prompt, sampling=sampling, trace=True).trace
    assert len(trace.prefill.layer_start) == 8
    assert trace.prefill.first_kv_sent < trace.prefill.layer_start[-1]
    assert trace.kv_bytes == TOKENS * 8 * 2 * 2 * 16 * 4  # layers, k and v, heads, head_dim, float32
