"""Tests on a CUDA device that answers and caches equal those on the CPU. Skipped without a device."""

import pytest
import torch

from overfill import LLM
from overfill.pair.reference import TwoStageReference
from overfill.request.params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def exact_float32():
    """Turns TF32 off, because its products are too coarse to compare with float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_answers_on_the_device_are_the_reference_s(tiny_pair, exact_float32):
    prompts = [[(7 * i * (seed + 3)) % 470 + 20 for i in range(10 + 40 * seed)] for seed in range(8)]
    llm = LLM(tiny_pair, dtype="float32", device="cuda", kv_memory=16 * 2**20, max_num_batched_tokens=64)
    reference = TwoStageReference(tiny_pair)
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    assert [a.token_ids for a in answers] == [reference.generate(p, 24) for p in prompts]


def test_both_halves_fit_one_device_without_a_stated_cache(tiny_pair, exact_float32):
    llm = LLM(tiny_pair, dtype="float32", device="cuda", memory_fraction=0.25)
    prompt = list(range(20, 60))
    answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))[0]
    assert answer.token_ids == TwoStageReference(tiny_pair).generate(prompt, 8)


def test_kv_read_beside_a_running_step_is_what_was_written():
    from overfill.kv.cache import KvCache
    from overfill.kv.chunks import Chunk
    from overfill.kv.ranges import KvRange
    from overfill.kv.spec import KvSpec, RopeSpec
    from overfill.kv.store import LayerTargets

    device = torch.device("cuda")
    source = KvCache(KvSpec(2, 2, 8, "bfloat16", RopeSpec()), 8, 4, device)
    target = KvCache(source.spec, 8, 4, device)
    source.k.normal_()
    source.v.normal_()
    written = torch.cuda.Event()
    written.record()
    chunk = Chunk(KvRange(0, 2, 2, 11, 0, 2), bytearray(2 * 2 * 9 * 2 * 8 * 2))
    source.read([5, 0, 3], [chunk], {0: written, 1: written})
    target.write([1, 7, 2], LayerTargets({0: [0], 1: [1]}), [chunk])
    taken, placed = source.slots([5, 0, 3], 2, 11), target.slots([1, 7, 2], 2, 11)
    assert torch.equal(target.gather(1, placed)[1], source.gather(1, taken)[1])


def test_an_int8_cache_returns_the_same_values_as_on_the_cpu():
    from overfill.kv.cache import KvCache
    from overfill.kv.chunks import Chunk
    from overfill.kv.ranges import KvRange
    from overfill.kv.spec import KvSpec, RopeSpec
    from overfill.kv.store import LayerTargets

    spec = KvSpec(2, 2, 8, "bfloat16", RopeSpec())
    k, v = torch.randn(2, 9, 2, 8).bfloat16()
    found = []
    for device in (torch.device("cuda"), torch.device("cpu")):
        cache = KvCache(spec, 8, 4, device, "int8")
        slots = cache.slots([5, 0, 3], 2, 11)
        cache.put(1, slots, k.to(device), v.to(device))
        found.append([half.cpu() for half in cache.gather(1, slots, (cache.new_scratch(9), cache.new_scratch(9)))])
        chunk = Chunk(KvRange(1, 2, 2, 11, 0, 2), bytearray(2 * 9 * 2 * 8 * 2))
        cache.read([5, 0, 3], [chunk], {})
        cache.write([1, 7, 2], LayerTargets({1: [0]}), [chunk])
        found[-1] += [half.cpu() for half in cache.gather(0, cache.slots([1, 7, 2], 2, 11))]
    for on_gpu, on_cpu in zip(*found, strict=True):
        # Codes may round differently where the last bit differs.
        torch.testing.assert_close(on_gpu, on_cpu, atol=0.05, rtol=0)


def test_the_kernel_draws_what_the_reference_draws():
    from overfill.model.sampling import race_in_kernel, race_keys

    logits = torch.randn(64, 50_000, device="cuda") * 4
    for options in ({}, {"temperature": 0.5}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}):
        request = [SamplingParams(seed=2**63 + 5, **options)] * 64, range(64), [7] * 64
        keys = race_keys(logits, *request)
        tokens = race_in_kernel(logits, *request)
        assert (keys.gather(1, tokens.unsqueeze(1)).squeeze(1) >= keys.amax(dim=1) - 1e-5).all()
