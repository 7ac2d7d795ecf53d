"""Tests how memory is divided between caches and steps."""

import fcntl
import os
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from json_edits import edit

from overfill.engine import build, gpu_memory
from overfill.engine.build import (
    MEMORY_FRACTION,
    MemoryRequirement,
    fit_blocks,
    load_half,
    memory_needed,
    size_pools,
)
from overfill.engine.device import NotEnoughMemory
from overfill.engine.load import load_engine
from overfill.engine.protocol import VLLM_GPU_SHARE, EngineOptions
from overfill.model.manifest import Pair

MIB, GIB = 2**20, 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def requirement(layers=16, longest=8192, max_num_seqs=64, activations=0):
    """A model with 8 KV heads of 128 in bfloat16: 4 KiB per token and layer."""
    return MemoryRequirement(16 * 4096 * layers, 16, 4096, longest, max_num_seqs, 2048, activations)


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return Pair.load(tiny_pair)


def load(pair, half="full", memory_fraction=MEMORY_FRACTION, **changes):
    options = EngineOptions(CPU, "float32", kv_memory=2**20, max_model_len=256, max_num_seqs=8)
    return size_pools([load_half(pair, half, replace(options, **changes))], memory_fraction)[0]


def test_the_gather_of_a_full_decode_step_is_kept_free():
    assert requirement().step_bytes(10**6) >= 64 * 8192 * 4096  # keys and values of one layer, every sequence padded


def test_a_step_reads_no_more_than_the_cache_holds():
    assert requirement().step_bytes(4) < 2 * 4 * 64 * 4096
    assert requirement().step_bytes(0) == 0


@pytest.mark.parametrize("available", [0, 10**6, GIB, 20 * GIB, 80 * GIB])
@pytest.mark.parametrize("halves", [[requirement()], [requirement(activations=GIB), requirement(layers=8)]])
def test_caches_and_the_largest_step_fill_what_is_available_and_no_more(available, halves):
    blocks = fit_blocks(halves, available)
    assert blocks == 0 or sum(memory_needed(halves, [blocks] * len(halves))) <= available
    assert sum(memory_needed(halves, [blocks + 1] * len(halves))) > available


def test_both_halves_of_a_process_get_a_cache():
    halves = [requirement(activations=GIB), requirement()]
    blocks = fit_blocks(halves, 20 * GIB)
    caches, step = memory_needed(halves, [blocks, blocks])
    assert step == max(d.step_bytes(blocks) for d in halves)  # the engines step in turn, so they share one scratch
    assert caches > 15 * GIB


def test_a_stated_cache_size_is_used(pair):
    parts = load(pair, kv_memory=2**20)
    assert parts.pool.num_blocks * parts.runner.cache.block_bytes == 2**20
    assert parts.max_model_len == 256


def test_a_cache_of_int8_holds_more_tokens_in_the_same_memory(pair):
    parts = {held: load(pair, kv_memory=2**20, kv_cache_dtype=held) for held in ("auto", "int8")}
    spec = parts["auto"].served.kv
    coded = (spec.head_dim + 4) / (4 * spec.head_dim)
    assert parts["int8"].pool.num_blocks == int(parts["auto"].pool.num_blocks / coded)
    assert parts["int8"].served.kv == spec  # the size on the wire is the same
    identities = {held: p.served.model_identity.kv_cache_dtype for held, p in parts.items()}
    assert identities == {"auto": "", "int8": "int8"}


def test_without_a_stated_cache_a_cpu_gives_a_gibibyte_at_most(pair, monkeypatch):
    monkeypatch.setattr(build, "_free_memory", lambda device: 100 * GIB)
    parts = load(pair, kv_memory=None)
    assert parts.pool.num_blocks * parts.runner.cache.block_bytes == GIB


def test_without_a_stated_cache_a_share_of_free_memory_is_used(pair, monkeypatch):
    monkeypatch.setattr(build, "_free_memory", lambda device: 40 * 2**20)
    parts = load(pair, kv_memory=None, memory_fraction=0.5)
    taken = parts.pool.num_blocks * parts.runner.cache.block_bytes
    assert 18 * 2**20 < taken < 20 * 2**20


def test_a_cache_that_fits_only_without_the_step_is_refused_with_both_numbers(pair, monkeypatch):
    monkeypatch.setattr(build, "_free_memory", lambda device: 8 * 2**20)
    with pytest.raises(
        NotEnoughMemory, match=r"8MiB of KV cache and \d+MiB for the largest step .* 8MiB .*--kv-memory"
    ):
        load(pair, kv_memory=8 * 2**20, max_num_seqs=64)


@pytest.fixture
def gpu(monkeypatch):
    """Replaces the numbers of a GPU of 40 MiB, of which this process has reserved 2 MiB."""
    gpu = SimpleNamespace(total=40 * MIB, used=3 * MIB, uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.total - gpu.used, gpu.total))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(gpu_memory, "_OVERHEAD", MIB)
    return gpu


def test_workers_that_share_a_gpu_leave_each_other_memory(pair, gpu, monkeypatch):
    new_cache = build.KvCache
    monkeypatch.setattr(build, "KvCache", lambda spec, blocks, size, device, dtype: new_cache(spec, blocks, size, CPU))
    options = EngineOptions(CPU, dtype="float32", max_model_len=256, gpu_share=0.5)
    loaded = load_half(pair, "full", options)
    on_gpu = replace(loaded, model=SimpleNamespace(device=CUDA, config=loaded.model.config))
    monkeypatch.setattr(build, "load_half", lambda pair, half, options: replace(on_gpu, options=options))
    taken = []
    for _ in range(2):
        store = load_engine("overfill", pair, "full", replace(options, device=CUDA)).served.store
        taken.append(store.num_blocks * store.block_bytes)
        gpu.used += taken[-1]
    assert taken[0] == taken[1] > 10 * MIB, "what is free does not matter"
    assert taken[0] + 3 * MIB < gpu.total / 2
    store = load_engine("overfill", pair, "full", replace(options, device=CUDA, kv_memory=3 * MIB)).served.store
    assert store.num_blocks * store.block_bytes == 3 * MIB
    small = replace(options, device=CUDA, gpu_share=0.05)
    with pytest.raises(NotEnoughMemory, match=r"--kv-memory.*, or a larger --gpu-share than 0\.05$"):
        load_engine("overfill", pair, "full", small)
    with pytest.raises(NotEnoughMemory, match=r"--max-num-seqs$"):  # the share does not limit a stated cache
        load_engine("overfill", pair, "full", replace(small, kv_memory=60 * MIB))
    on_gpu = replace(on_gpu, requirement=replace(on_gpu.requirement, activations=9 * MIB))
    with pytest.raises(NotEnoughMemory, match=r"exceed .*, or a larger --gpu-share than 0\.05$"):
        load_engine("overfill", pair, "full", small)


def test_vllm_gets_the_same_share(gpu):
    options = EngineOptions(CUDA)
    assert gpu_memory.vllm_utilization(options) is None, "vLLM's default"
    assert gpu_memory.vllm_utilization(replace(options, gpu_share=0.5)) == pytest.approx(0.46 - 1 / 40)
    assert gpu_memory.vllm_utilization(replace(options, gpu_share=0.5, kv_memory=MIB)) == VLLM_GPU_SHARE
    assert gpu_memory.vllm_utilization(replace(options, gpu_share=0.01)) == VLLM_GPU_SHARE
    assert gpu_memory.vllm_utilization(EngineOptions(CPU, gpu_share=0.5)) is None


def test_workers_that_share_a_gpu_load_one_after_the_other(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = EngineOptions(CUDA, gpu_share=0.5)
    with gpu_memory.loading_turn(options):
        (path,) = tmp_path.iterdir()
        assert is_locked(path)
        with gpu_memory.loading_turn(EngineOptions(CPU)), gpu_memory.loading_turn(EngineOptions(CUDA)):
            pass  # alone on their devices
    assert not is_locked(path)


def test_a_worker_with_ranks_waits_for_all_their_gpus(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{9 - device}"))
    taken = []
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (taken.append(target(file)), flock(file, how)))
    with gpu_memory.loading_turn(EngineOptions(CUDA, gpu_share=0.5, tensor_parallel_size=2)):
        assert [name[-5:] for name in taken] == ["GPU-8", "GPU-9"], "in the order of the names"
        assert [is_locked(path) for path in tmp_path.iterdir()] == [True, True]


def test_a_child_process_does_not_keep_the_turn_to_load(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with gpu_memory.loading_turn(EngineOptions(CUDA, gpu_share=0.5)):
        (path,) = tmp_path.iterdir()
        (descriptor,) = [int(n) for n in os.listdir("/proc/self/fd") if target(n) == str(path)]
        inherited = os.dup(descriptor)  # shares the lock, as a descriptor of a forked child does
    try:
        assert not is_locked(path)
    finally:
        os.close(inherited)


def target(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # it was that of the listing
        return None


def is_locked(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_slots_for_adapters_are_of_decoders_only_and_must_fit_the_memory(pair, monkeypatch):
    slots = load(pair, "decoder", max_adapters=3, max_adapter_rank=5).served.adapters
    assert (slots.num_slots, slots.max_rank) == (3, 5)
    assert load(pair, "full", max_adapters=3).served.adapters is None
    monkeypatch.setattr(build, "_free_memory", lambda device: 3 * slots.slot_bytes - 1)
    with pytest.raises(NotEnoughMemory, match=r"3 adapters of rank 5 need .* smaller --max-adapters or --max-adapter-"):
        load(pair, "decoder", max_adapters=3, max_adapter_rank=5)


def test_an_error_about_a_cache_too_small_names_the_size_needed(pair):
    with pytest.raises(NotEnoughMemory, match=r"holds 64 tokens, fewer than --max-model-len 256; .*--kv-memory 1MiB"):
        load(pair, kv_memory=64 * 1024)
    assert load(pair, kv_memory=64 * 1024, max_model_len=None).max_model_len == 64


def test_a_device_that_runs_out_of_memory_says_what_to_change(pair, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build.Transformer, "load", out_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 80 * GIB))
    with pytest.raises(
        NotEnoughMemory, match=r"weights of the full model did not fit .* 1MiB of 81920MiB free; .*--device"
    ):
        load(pair)


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_a_grammar_ends_with_the_full_model_s_stop_tokens(half, fresh, monkeypatch):
    folder = fresh()
    for path, stop in ((folder / "full", 5), (folder / "decoder", 6)):
        (path / "generation_config.json").unlink()
        edit(path / "config.json", lambda config: config.update(eos_token_id=stop))  # noqa: B023
    given = []
    monkeypatch.setattr(build, "Grammars", lambda file, vocab_size, eos_token_ids, limits: given.append(eos_token_ids))
    load(Pair.load(folder), half)
    assert given == [(5,)]
