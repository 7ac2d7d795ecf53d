"""Tests logits and answers of the default pair against plain transformers, in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from overfill import LLM
from overfill.engine.runner import ModelRunner
from overfill.engine.work import Work
from overfill.kv.cache import KvCache
from overfill.model.manifest import Pair
from overfill.model.native import library
from overfill.model.native.transformer import fastest_model
from overfill.model.transformer import Transformer
from overfill.pair.reference import TwoStageReference, judge, summarise
from overfill.pair.store import resolve_pair
from overfill.request.params import SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]  # the first use makes the pair, in minutes

CPU = torch.device("cpu")
TEXT = (
    "The tidal mill at Carrow stands where the river meets the estuary. Twice a day the rising sea pushes through a "
    "wooden gate and fills a pond of about three hectares behind the mill. 3.14159 × 2 = 6.28318; naïve café, 北京."
)


@pytest.fixture(scope="module")
def pair():
    return Pair.load(resolve_pair("default"))


@pytest.fixture(scope="module")
def llm(pair):
    return LLM(pair.folder, dtype="float32", kv_memory=64 * 2**20, max_model_len=1024)


@pytest.mark.parametrize("half", ["full_path", "decoder_path"])
def test_logits_equal_those_of_transformers(pair, llm, half):
    folder = getattr(pair, half)
    ids = llm.tokenizer.encode(TEXT)
    ours = Transformer.load(folder, torch.float32, torch.device("cpu"), max_positions=1024)
    cache = KvCache(ours.config.kv_spec("float32"), 64, 16, torch.device("cpu"))
    runner = ModelRunner(ours, cache)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    # Chunks of 16, so that cached context, chunk borders and single tokens are all compared.
    got = [runner.run([Work(ids[i : i + 16], i, range(64), wants_logits=True)])[0] for i in range(0, len(ids), 16)]
    ends = [min(i + 16, len(ids)) - 1 for i in range(0, len(ids), 16)]
    worst = (torch.stack(got) - expected[ends]).abs().max().item()
    print(f"{half}: maximum difference {worst:.2e}, logits up to {expected.abs().max():.1f}")
    assert worst < 1e-3


@pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"no native kernels: {library.unavailable_reason()}"
)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_native_kernels_are_nearer_to_transformers_than_eager_bfloat16(pair, llm, quantize):
    """Runs a prompt in one pass and float32's answer token by token, so that all models see the same tokens."""
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": "Summarise: " + TEXT}])

    def load(dtype):
        return Transformer.load(pair.full_path, dtype, CPU, max_positions=1024, quantize=quantize)

    if quantize == "none":
        theirs = AutoModelForCausalLM.from_pretrained(pair.full_path, dtype=torch.float32)
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0].tolist()[len(prompt) :]
        with torch.inference_mode():
            want = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    else:
        answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=32))[0].token_ids
        want = _logits(load(torch.float32), prompt, answer)
    eager, native = (
        _logits(load(torch.bfloat16), prompt, answer),
        _logits(fastest_model(load(torch.bfloat16)), prompt, answer),
    )

    error, allowed = (native - want).abs(), (eager - want).abs()
    agree = (native.argmax(-1) == want.argmax(-1)).float().mean().item()
    print(f"{quantize}: mean error {error.mean():.3f} (eager {allowed.mean():.3f}), agreement {agree:.3f}")
    assert error.mean() < allowed.mean()
    assert agree >= 0.95


def _logits(model, prompt, answer):
    runner = ModelRunner(model, KvCache(model.config.kv_spec(str(model.dtype).removeprefix("torch.")), 64, 16, CPU))
    got = [runner.run([Work(prompt, 0, range(64), wants_logits=True)])]
    got += [runner.run([Work([t], len(prompt) + i, range(64), True)]) for i, t in enumerate(answer[:-1])]
    return torch.cat(got)


def test_answers_are_the_reference_s(pair, llm):
    reference = TwoStageReference(pair.folder)
    questions = ["What is the capital of France?", "List three colours.", "Summarise: " + TEXT]
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32))
    judged = [
        judge(reference, prompt, answer.token_ids, answer.finish_reason, 32)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    summary = summarise(judged)
    assert summary.passed, str(summary)
