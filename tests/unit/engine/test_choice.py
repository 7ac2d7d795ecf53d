"""Tests which engine a half of a pair gets, and which choices are refused."""

import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from json_edits import edit

from overfill.engine.choice import check_ranks, choose_engine
from overfill.engine.load import EngineOptions, load_engine
from overfill.errors import InvalidRequest, UnsupportedModel
from overfill.model.manifest import Pair
from overfill.process.extras import MissingExtra


@pytest.fixture
def pair(fresh):
    """Returns a function that makes a pair whose decoder runs on the given engines."""

    def make(*decoder_engines):
        folder = fresh()
        edit(folder / "pair.json", lambda manifest: manifest["decoder"].update(engines=list(decoder_engines)))
        return Pair.load(folder)

    return make


@pytest.mark.parametrize(
    ("installed", "cuda", "engines", "chosen"),
    [
        (True, True, ["overfill", "vllm"], "vllm"),
        (True, True, ["overfill"], "overfill"),
        (True, False, ["overfill", "vllm"], "overfill"),
        (False, True, ["overfill", "vllm"], "overfill"),
    ],
)
def test_auto_is_vllm_only_on_cuda_if_it_is_installed_and_runs_the_half(
    with_vllm, pair, installed, cuda, engines, chosen
):
    with_vllm(installed)
    assert choose_engine("auto", pair(*engines), "decoder", lambda: cuda) == chosen


@pytest.mark.parametrize(("device", "engine"), [("cuda", "vllm"), ("cuda:0", "vllm"), ("cuda:1", "overfill")])
def test_auto_is_not_vllm_on_another_gpu_than_the_first(with_vllm, pair, monkeypatch, device, engine):
    with_vllm(True)
    loaded = []
    vllm = SimpleNamespace(load_vllm=lambda *what: loaded.append("vllm"))
    monkeypatch.setitem(sys.modules, "overfill.engine.vllm.load", vllm)
    monkeypatch.setattr("overfill.engine.build.load_half", lambda *what: loaded.append("overfill"))
    with contextlib.suppress(AttributeError):  # nothing was loaded
        load_engine("auto", pair("overfill", "vllm"), "decoder", EngineOptions(torch.device(device)))
    assert loaded == [engine]


def test_a_half_that_the_chosen_engine_cannot_run_is_refused_by_name(with_vllm, pair):
    with_vllm(True)
    with pytest.raises(UnsupportedModel, match=r"the engine vllm cannot run the decoder.*: overfill$"):
        choose_engine("vllm", pair("overfill"), "decoder", lambda: True)
    with pytest.raises(UnsupportedModel, match=r"the engine overfill cannot run the decoder.*: vllm$"):
        choose_engine("auto", pair("vllm"), "decoder", lambda: False)


def test_a_worker_refuses_vllm_where_it_is_not_installed(with_vllm, pair):
    with_vllm(False)
    options = EngineOptions(torch.device("cpu"))
    with pytest.raises(MissingExtra, match=r"the engine vllm needs the extra overfill\[vllm\].*install.*\[vllm\]"):
        load_engine("vllm", pair("overfill", "vllm"), "decoder", options)


@pytest.mark.parametrize("choice", ["auto", "overfill", "mock"])
def test_only_vllm_has_ranks(pair, choice):
    options = EngineOptions(torch.device("cpu"), tensor_parallel_size=2)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size: 2 ranks need vllm, but the engine \w+ runs the"):
        load_engine(choice, pair("overfill", "vllm"), "decoder", options)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "vocabulary", "works"),
    [
        (12, 4, 96, 49_152, (1, 2, 4, 12)),
        (12, 4, 2334, 49_152, (1, 2)),
        (9, 3, 1536, 49_152, (1, 3)),
        (9, 3, 1536, 49_153, (1,)),  # 49,216 rows
        (8, 2, 64, 100, (1, 2, 4, 8)),  # 128 rows
    ],
)
def test_ranks_share_heads_neurons_and_rows_evenly_and_kv_heads_may_repeat(
    pair, heads, kv_heads, width, vocabulary, works
):
    made = pair("vllm")
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "intermediate_size": width, "vocab_size": vocabulary}
    shape = replace(made.decoder_config, **sizes)
    made = replace(made, decoder_config=shape)
    for ranks in range(1, 14):
        if ranks in works:
            check_ranks(made, "decoder", ranks)
            continue
        with pytest.raises(InvalidRequest) as raised:
            check_ranks(made, "decoder", ranks)
        said = str(raised.value)
        assert f"tensor_parallel_size: {ranks} ranks cannot share the decoder, which has {heads} query heads" in said
        assert said.endswith(f": give one of {', '.join(map(str, works))}")


@pytest.mark.parametrize("choice", ["auto", "overfill"])
def test_a_worker_refuses_arguments_of_vllm_for_our_engine(pair, choice):
    options = EngineOptions(torch.device("cpu"), engine_args={"enforce_eager": True})
    with pytest.raises(InvalidRequest, match="engine_args: are for vllm, but the engine overfill runs the decoder"):
        load_engine(choice, pair("overfill"), "decoder", options)
