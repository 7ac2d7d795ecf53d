"""Settings, prompts and a judge for stacks whose workers run on vLLM or on OverFill's engine."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from overfill.client import SamplingParams
from overfill.errors import RequestCancelled
from overfill.pair.reference import judge
from overfill.request.params import Grammar

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


PROMPT = [(7 * i * 13) % 470 + 20 for i in range(100)]

SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 30, "ignore_eos": True}
CROSSING = {
    "filters": {**SAMPLED, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
    "penalties": {**SAMPLED, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {**SAMPLED, "logit_bias": {40: 20.0, 41: 20.0}, "logprobs": 3},
    "min_tokens": {"temperature": 0, "min_tokens": 6, "max_tokens": 20, "logit_bias": {1: 100.0}},
    "stop_ids": {"temperature": 0, "max_tokens": 200, "stop_token_ids": tuple(range(2, 100))},
    "regex": {"temperature": 1.0, "seed": 3, "max_tokens": 40, "grammar": Grammar("regex", "[a-z]{3,9}-[0-9]{2}")},
    "json": {"temperature": 1.0, "seed": 3, "max_tokens": 60, "grammar": Grammar.json_schema({"type": "boolean"})},
}


def wrong_turns(client, reference, turns=6, tier=""):
    """Leads a chat, each of whose prompts has the earlier answers; returns the turns that are not the reference's."""
    draw, prompt, wrong = random.Random(3), [], []
    for turn in range(turns):
        prompt += [draw.randrange(2, 500) for _ in range(20)]
        answer = client.generate(prompt, sampling=SamplingParams(**GREEDY, max_tokens=40), tier=tier)
        if not judge(reference, prompt, answer.token_ids, answer.finish_reason, 40).correct:
            wrong.append(turn)
        prompt += answer.token_ids
    return wrong


def ask_and_cancel(client, count, max_tokens, tiers=("",)):
    """Asks ``count`` requests, 16 at a time, and cancels a tenth of them at random times; returns how many."""
    draw = random.Random(count)
    asked, delays = prompts(60), [draw.random() * 0.3 for _ in range(count)]
    sampling = SamplingParams(**GREEDY, max_tokens=max_tokens)

    def ask(number):
        stream = client.stream(asked[number % len(asked)], sampling=sampling, tier=tiers[number % len(tiers)])
        if number % 10 == 0:
            threading.Timer(delays[number], stream.cancel).start()
        try:
            for _ in stream:
                pass
        except RequestCancelled:
            return 1
        return 0

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(ask, range(count)))
