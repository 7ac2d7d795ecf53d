"""Tests the copies of blocks that answer_start cuts: same bits, right slots, same tokens only, and bounded memory."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from overfill.kv.cache import KvCache
from overfill.kv.cut_blocks import CutBlocks, shared_key
from overfill.kv.keys import PromptBlocks
from overfill.kv.spec import KvSpec, RopeSpec

SPEC = KvSpec(3, 2, 8, "bfloat16", RopeSpec())
PROMPT = list(range(100, 114))
TABLE, OTHER = [5, 0, 3, 6], [5, 0, 4, 1]


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(params=["auto", "int8"])
def cache(request):
    cache = KvCache(SPEC, 7, 4, torch.device("cpu"), request.param)
    slots = torch.arange(28)
    for layer in range(SPEC.num_layers):
        cache.put(layer, slots, torch.randn(28, 2, 8).bfloat16(), torch.randn(28, 2, 8).bfloat16())
    return cache


def key_of(prompt, num_shared, namespace=""):
    return shared_key(PromptBlocks(prompt[:num_shared], 4, 1, namespace), prompt, num_shared)


def parts(cache):
    tensors = [cache.k, cache.v] + ([] if cache.k_scales is None else [cache.k_scales, cache.v_scales])
    return [tensor.clone().flatten(1, 2) for tensor in tensors]  # [layers, slots, heads, width]


async def test_the_tokens_of_a_cut_block_are_copied_bit_for_bit_and_nothing_else(cache, executor):
    cuts, key = CutBlocks(cache, SPEC, SPEC.num_layers, executor), key_of(PROMPT, 11)
    assert not await cuts.restore(key, OTHER)
    await cuts.keep(key, TABLE)
    before = parts(cache)
    assert await cuts.restore(key, OTHER)
    for old, new in zip(before, parts(cache), strict=True):
        old[:, 16:19] = old[:, 12:15]  # tokens 8 to 10, from block 3 to block 4
        assert torch.equal(old, new)


async def test_only_the_same_tokens_of_the_same_tenant_are_found(cache, executor):
    cuts = CutBlocks(cache, SPEC, SPEC.num_layers, executor)
    await cuts.keep(key_of(PROMPT, 11), TABLE)
    others = [(PROMPT, 10), ([0, *PROMPT[1:]], 11), ([*PROMPT[:10], 0], 11)]
    for key in (key_of(PROMPT, 11, "tenant"), *(key_of(*other) for other in others)):
        assert not await cuts.restore(key, OTHER)
    assert await cuts.restore(key_of([*PROMPT[:11], 0], 11), OTHER)


async def test_what_begins_as_a_forgotten_prompt_is_copied_anew(cache, executor):
    cuts, other = CutBlocks(cache, SPEC, SPEC.num_layers, executor), key_of([0, *PROMPT[1:]], 11)
    for key in (other, key_of(PROMPT, 6), key_of(PROMPT, 11)):
        await cuts.keep(key, TABLE)
    cuts.forget(key_of(PROMPT, 10))
    assert not await cuts.restore(key_of(PROMPT, 6), OTHER)
    assert not await cuts.restore(key_of(PROMPT, 11), OTHER)
    assert await cuts.restore(other, OTHER)
    cuts.forget(other)
    assert cuts._num_bytes == 0


async def test_a_prompt_of_whole_blocks_needs_no_copy_and_one_without_them_is_not_shared(cache, executor):
    cuts, key = CutBlocks(cache, SPEC, SPEC.num_layers, executor, max_bytes=0), key_of(PROMPT, 8)
    await cuts.keep(key, TABLE)
    assert await cuts.restore(key, OTHER)
    assert key_of(PROMPT, 3) is None
    assert shared_key(PromptBlocks(PROMPT, 4, None, ""), PROMPT, 11) is None


async def test_the_least_recently_used_copies_make_room(cache, executor):
    keys = [key_of([number, *PROMPT[1:]], 11) for number in range(4)]
    copy = 3 * cache.token_bytes + keys[0].size
    assert keys[0].size >= 4 * 8, "the tokens count too"
    cuts = CutBlocks(cache, SPEC, SPEC.num_layers, executor, max_bytes=3 * copy)
    for key in keys[:3]:
        await cuts.keep(key, TABLE)
    assert await cuts.restore(keys[0], OTHER)
    await asyncio.gather(cuts.keep(keys[3], TABLE), cuts.keep(keys[3], TABLE))
    assert [await cuts.restore(key, OTHER) for key in keys] == [True, False, True, True]
