"""Settings, prompts and a judge for stacks whose workers run on vLLM or on OverFill's engine."""

import random
from concurrent.futures import ThreadPoolExecutor

from overfill.client import SamplingParams
from overfill.pair.reference import judge

EAGER = '{"enforce_eager": true}'  # compiling a model takes longer than a test
GREEDY = {"temperature": 0, "ignore_eos": True}


def engines(prefill, decode):
    """Settings of a stack with these engines. Blocks are small, so that answers fill some."""
    settings = {"prefill_engine": prefill, "decode_engine": decode, "kv_memory": "16MiB", "block_size": "32"}
    return settings | ({"engine_args": EAGER} if "vllm" in settings.values() else {})


def prompts(count, seed=0):
    """Random prompts of 1 to 300 tokens, among them such as fill whole blocks of 32."""
    draw = random.Random(seed)
    lengths = [1, 31, 32, 33, 64, 128, 256, *(draw.randrange(2, 300) for _ in range(count))][:count]
    return [[draw.randrange(2, 500) for _ in range(length)] for length in lengths]


def wrong_answers(client, reference, asked, max_tokens=24, tier=""):
    """Asks all prompts at once and returns those whose greedy answer is not the reference's."""
    sampling = SamplingParams(**GREEDY, max_tokens=max_tokens)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: client.generate(prompt, sampling=sampling, tier=tier), asked))
    judged = [
        judge(reference, p, a.token_ids, a.finish_reason, max_tokens) for p, a in zip(asked, answers, strict=True)
    ]
    return [
        (len(prompt), verdict.first_error) for prompt, verdict in zip(asked, judged, strict=True) if not verdict.correct
    ]
