"""What every engine keeps of the protocol in ``overfill.engine.protocol``: the base of tests that engines inherit.

The tests are classes in ``decode_conformance`` and ``prefill_conformance``. A test module of an engine subclasses each
of them and mixes in the hooks of ``EngineConformance``; see ``tests/unit/engine/test_conformance.py``.

Each class loads one engine, which all of its tests share. After every test the engine must be empty. The engine runs a
tiny pair in float32, and plain transformers compute what it should answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from engine_drivers import DecodeDriver, PrefillDriver
from sampled_reference import SampledReference

from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.model.manifest import Half, Pair
from overfill.request.params import Grammar, SamplingParams


def fail_next_step_of(runner: Any) -> None:
    """Lets the next step of a ``ModelRunner`` fail, once."""

    def fail(*arguments: object) -> None:
        del runner.next_tokens
        raise RuntimeError("the model failed")

    runner.next_tokens = fail


BLOCK_SIZE = 32
"""A block size that every engine has."""
MAX_NUM_SEQS = 8
MAX_NUM_BATCHED_TOKENS = 64
EOS = 1
_CERTAIN = 100.0  # a bias that makes a token certain
_CPU = torch.device("cpu")

LENGTHS = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 5]

_HOT = {"temperature": 3.0, "seed": 11}  # several tokens are likely at this temperature
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {**_HOT},
    "top_k": {**_HOT, "top_k": 5},
    "top_p": {**_HOT, "top_p": 0.6},
    "min_p": {**_HOT, "min_p": 0.2},
    "all_filters": {**_HOT, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "seed": 2**64 - 1},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.8},
    "presence_penalty": {"temperature": 0, "presence_penalty": 2.0},
    "frequency_penalty": {**_HOT, "frequency_penalty": 1.5},
    "logit_bias": {**_HOT, "logit_bias": {40: 25.0, 41: 25.0, 42: -100.0}},
    "min_tokens": {"temperature": 0, "min_tokens": 5, "logit_bias": {EOS: _CERTAIN}},
    "eos_first": {"temperature": 0, "logit_bias": {EOS: _CERTAIN}},
    "ignore_eos": {**_HOT, "ignore_eos": True, "logit_bias": {EOS: 20.0}},
    "logprobs": {"temperature": 0, "logprobs": 4},
    "logprobs_of_changed_logits": {**_HOT, "logprobs": 2, "repetition_penalty": 1.5, "logit_bias": {40: 5.0}},
    "regex": {"temperature": 0, "grammar": Grammar("regex", "[a-z]{3,9}-[0-9]{2}")},
    "sampled_regex": {**_HOT, "min_tokens": 4, "grammar": Grammar("regex", "([a-z]+ ){2,}[0-9]+")},
}


def sampling(name: str, max_tokens: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(**{**SAMPLING[name], "max_tokens": max_tokens, **changes})


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens of text."""
    return tuple(random.Random(1000 * length + seed).choices(range(EOS + 1, 288), k=length))


class EngineConformance:
    """An engine that is loaded once per class, and the check that each test leaves it empty.

    Attributes:
        num_blocks: blocks of its KV cache.
        pair_fixture: name of the fixture that makes its pair.
        kv_tolerance: largest absolute and relative distance of a prefill engine's KV from that of transformers.
        decode_driver: drives a decode engine.
    """

    half: ClassVar[Half]
    num_blocks: ClassVar[int] = 64
    max_model_len: ClassVar[int] = 1024
    pair_fixture: ClassVar[str] = "conformance_pair"
    kv_tolerance: ClassVar[float] = 1e-5
    decode_driver: ClassVar[type[DecodeDriver]] = DecodeDriver

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        """Loads the engine under test; it may change the options that only concern itself."""
        raise NotImplementedError

    @classmethod
    def fail_next_step(cls, core: EngineCore) -> None:
        """Makes the next step of the model raise ``RuntimeError``, once."""
        raise NotImplementedError

    def num_failed_steps(self, driver: DecodeDriver | PrefillDriver) -> float | None:
        stage = "prefill" if self.half == "full" else "decode"
        return driver.metrics.registry.get_sample_value(f"overfill_{stage}_step_failures_total")

    @pytest.fixture(scope="class")
    @classmethod
    def driver(cls, request: pytest.FixtureRequest) -> Iterator[DecodeDriver | PrefillDriver]:
        folder: Path = request.getfixturevalue(cls.pair_fixture)
        reference: SampledReference = request.getfixturevalue("conformance_reference")(folder)
        pair = reference.pair
        config = pair.full_config if cls.half == "full" else pair.decoder_config
        options = EngineOptions(
            device=_CPU,
            dtype="float32",
            block_size=BLOCK_SIZE,
            kv_memory=cls.num_blocks * BLOCK_SIZE * config.kv_spec("float32").token_bytes,
            max_model_len=cls.max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        loaded = cls.load(pair, cls.half, options)
        driver = (PrefillDriver if cls.half == "full" else cls.decode_driver)(loaded, reference)
        driver.kv_tolerance = cls.kv_tolerance
        yield driver
        driver.core.close()

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, driver: Any, request: pytest.FixtureRequest) -> Iterator[None]:
        """Gives each test a namespace of its own, and checks after it that the engine is empty."""
        assert not driver.dead, "a step of an earlier test has raised"
        driver.namespace = request.node.name
        total = driver.load.blocks_total
        yield
        if driver.dead:
            return
        driver.release_all()
        driver.raise_fault()
        driver.assert_empty()
        assert driver.load.blocks_total == total
