"""Tests the mock engine's answers, its arguments, and the pair that ships for it."""

from __future__ import annotations

import filecmp
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from overfill.api.families.hermes import Hermes
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools import ToolDefinition
from overfill.api.tools_grammar import tools_grammar
from overfill.engine.load import load_colocated, load_engine
from overfill.engine.mock.options import ANSWER, MockOptions
from overfill.engine.mock.script import Script
from overfill.engine.protocol import EngineOptions
from overfill.engine.sequence import (
    DecodeSequence,
    FinishReason,
    PrefillHere,
    PrefillSequence,
    Reserve,
    Start,
    StepSampled,
    StopRule,
    Submit,
)
from overfill.errors import Incompatible, InvalidRequest
from overfill.kv.handshake import check_compatible
from overfill.making import mock_pair
from overfill.model.manifest import Pair
from overfill.pair.store import resolve_pair
from overfill.request.grammar import Grammars
from overfill.request.params import Grammar, SamplingParams

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.load(resolve_pair("mock"))


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> Tokenizer:
    return Tokenizer.load(pair.full_path)


@pytest.fixture(scope="module")
def grammars(pair: Pair) -> Iterator[Grammars]:
    config = pair.full_config
    made = Grammars(pair.full_path / "tokenizer.json", config.vocab_size, config.eos_token_ids)
    yield made
    made.close()


@pytest.fixture
def play(tokenizer: Tokenizer, grammars: Grammars) -> Callable[..., list[int]]:
    """Returns a function that plays an answer up to its end, or to max_tokens; the end is among its tokens."""

    def play(params: SamplingParams, prompt: list[int] = PROMPT, emitted: int = 0, **arguments: Any) -> list[int]:
        script = Script(tokenizer, MockOptions.of(arguments))
        player = script.player(params, prompt, grammars, tokenizer.eos_token_ids)
        answer: list[int] = []
        while len(answer) < (params.max_tokens or 1000) and not (answer and answer[-1] in tokenizer.eos_token_ids):
            if len(answer) == emitted:  # another worker goes on with the answer
                player = script.player(params, prompt, grammars, tokenizer.eos_token_ids)
            answer.append(player.next(list(answer), 0).token_id)
        return answer

    return play


HERMES = Hermes()
GREEDY = SamplingParams(temperature=0)


def test_the_text_is_played_once_and_then_the_answer_ends(tokenizer, play):
    assert play(GREEDY) == [*tokenizer.encode_continuation(ANSWER), tokenizer.end_of_answer]


def test_an_answer_that_may_not_end_repeats_the_text(tokenizer, play):
    ids = tokenizer.encode_continuation(ANSWER)
    assert play(SamplingParams(temperature=0, ignore_eos=True, max_tokens=100)) == (ids * 4)[:100]
    assert play(GREEDY, answer="a b", answer_tokens=5)[-1] == tokenizer.end_of_answer


def test_the_last_entry_whose_words_are_in_the_prompt_is_played(tokenizer, play):
    script = [
        {"text": "first"},
        {"when": "def main", "text": "second"},
        {"when": "nowhere", "text": "third"},
    ]
    for text, expected in (("Hello", "first"), ("Read this:\ndef main():", "second")):
        ids = play(GREEDY, prompt=tokenizer.encode(text), script=script)
        assert tokenizer.decode(ids) == expected


def test_special_tokens_of_a_text_are_tokens_and_calls_have_the_routers_format(tokenizer, play):
    call = {"name": "read", "arguments": {"path": "a.py"}}
    text = "[TOOL_CALLS]read[ARGS]{}</s>"
    ids = play(SamplingParams(temperature=0, max_tokens=99), script=[{"text": text}])
    names = [tokenizer.token_bytes(id).decode() for id in ids]
    assert names[0] == "[TOOL_CALLS]"
    assert names[-1] == "</s>"
    ids = play(GREEDY, script=[{"text": "I read.", "tool_calls": [call]}])
    assert tokenizer.decode(ids) == "I read." + HERMES.write([("read", json.dumps(call["arguments"]))])
    tool = ToolDefinition("read", parameters={"type": "object", "properties": {"path": {"type": "string"}}})
    calling = replace(GREEDY, grammar=Grammar("lark", tools_grammar([tool], "auto", single=False)))
    assert play(calling, script=[{"text": "I read.", "tool_calls": [call]}]) == ids
    assert play(GREEDY, script=[{"tokens": [9, 8, 7]}]) == [9, 8, 7, tokenizer.end_of_answer]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic", "mistral", "qwen3_coder"])
def test_an_answer_without_calls_is_its_text_in_every_format(pair, grammars, name):
    tokenizer = Tokenizer.load(pair.full_path, name)
    script = Script(tokenizer, MockOptions.of({"script": [{"text": "I read."}]}))
    player = script.player(GREEDY, PROMPT, grammars, tokenizer.eos_token_ids)
    wanted = [*tokenizer.encode_continuation("I read."), tokenizer.end_of_answer]
    assert [player.next(wanted[:count], 0).token_id for count in range(len(wanted))] == wanted


@pytest.mark.parametrize("emitted", [0, 1, 4])
def test_a_grammar_lets_the_script_through_or_replaces_it_and_another_worker_goes_on_alike(emitted, tokenizer, play):
    words = SamplingParams(temperature=0, max_tokens=40, grammar=Grammar("regex", "The full model[a-z ]*"))
    answer = play(words)
    assert play(words, emitted=emitted) == answer
    assert tokenizer.decode(answer).startswith("The full model reads the whole prompt at once")
    digits = SamplingParams(temperature=0, max_tokens=40, grammar=Grammar("regex", "[0-9]{5}"))
    answer = play(digits)
    assert play(digits, emitted=emitted) == answer
    assert len(tokenizer.decode(answer)) == 5
    assert answer[-1] == tokenizer.end_of_answer


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"speed": 3}, "speed: Extra inputs are not permitted; the mock engine knows base, per_token"),
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"base": math.inf}, "base: Input should be less than or equal to 3600"),
        ({"per_token": 1e308}, "per_token: Input should be less than or equal to 3600"),
        ({"script": "/no/such/file"}, "script: cannot read /no/such/file"),
        ({"script": [{"text": "a", "tokens": [1]}]}, r"script.0: give either tokens, or text and tool_calls"),
        ({"script": [{"tokens": [6144]}]}, "script: token 6144 is not below 6144"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, says, pair):
    options = EngineOptions(device=None, engine_args=arguments)
    with pytest.raises(InvalidRequest, match=says) as caught:
        load_engine("mock", pair, "decoder", options)
    assert caught.value.field == "engine_args"


def test_a_script_that_is_nested_too_deeply_is_refused_by_name(pair, tmp_path):
    (tmp_path / "script.json").write_text("[" * 100_000)
    options = EngineOptions(device=None, engine_args={"script": str(tmp_path / "script.json")})
    with pytest.raises(InvalidRequest, match=r"script\.json is not JSON"):
        load_engine("mock", pair, "decoder", options)


def test_its_kv_is_no_model_s(pair):
    loaded = load_engine("mock", pair, "decoder", EngineOptions(device=None, engine_args={}))
    with pytest.raises(Incompatible, match="reader_digest") as caught:
        check_compatible(pair.kv_identity("float32"), loaded.served.kv_identity, "prefill-0")
    assert caught.value.fields == ("reader_digest",)


def test_a_worker_lends_what_its_reader_computed(pair):
    """The mock plays both halves of a pair whose decoder is the full model. Its decoder is the reader then."""
    pruned = replace(pair, decoder_digest="0" * 64)
    lends = [
        load_engine("mock", of, half, EngineOptions(None, prefix_cache=cached)).served.lends_kv
        for of, half, cached in itertools.product((pair, pruned), ("full", "decoder"), (True, False))
    ]
    assert lends == [True, False, True, False, True, False, False, False]


def test_the_pair_is_what_its_script_makes_small_and_of_a_long_context(pair, tmp_path):
    mock_pair.make(tmp_path)
    files = ["pair.json", *(f"model/{file.name}" for file in pair.full_path.iterdir())]
    assert filecmp.cmpfiles(pair.folder, tmp_path, files, shallow=False) == (files, [], [])
    assert sum((pair.folder / file).stat().st_size for file in files) < 300_000
    assert pair.full_config.max_positions == 131_072


def test_every_special_token_is_one_token(tokenizer):
    for text in (*mock_pair.SPECIAL, *mock_pair.SHOWN):
        assert len(tokenizer.encode_continuation(text)) == 1, text
    assert all(tokenizer.has_text(*tokenizer.encode_continuation(text)) for text in mock_pair.SHOWN)


@pytest.mark.parametrize("service", ["prefill", "decode", "colocated"])
def test_a_worker_on_the_mock_engine_has_no_torch(service, tmp_path):
    code = f"""
import asyncio, sys
from services.{service}.main import serve
from overfill.settings.config import PrefillConfig, DecodeConfig, ColocatedConfig
kind = {{"prefill": PrefillConfig, "decode": DecodeConfig, "colocated": ColocatedConfig}}["{service}"]
config = kind.parse(["--pair=mock", "--engine=mock", "--port=0", "--metrics-port=off"])
ready = lambda host: print("ready", "torch" in sys.modules, flush=True)
async def main():
    running = asyncio.create_task(serve(config, lambda host: (ready(host), running.cancel())))
    await asyncio.wait([running])
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ready False\n", done.stderr


def test_a_colocated_worker_goes_on_with_its_answers_while_a_prompt_waits_for_blocks(pair):
    spec = pair.full_config.kv_spec("float32")
    options = EngineOptions(
        device=None, kv_memory=64 * spec.token_bytes, max_model_len=64, block_size=16, engine_args={"step": 0.002}
    )
    loaded = load_colocated(pair, options, options, engine="mock")
    events: list[Any] = []
    core = loaded.new_core(lambda emitted: None, events.extend)

    def processor(params: SamplingParams, prompt: list[int]) -> Any:
        half = loaded.full.served
        return half.new_processor(params, prompt, half.grammars, half.config.eos_token_ids)

    def prompt(id: str, tokens: list[int]) -> PrefillSequence:
        return PrefillSequence(id, tokens, GREEDY, processor=processor(GREEDY, tokens))

    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    answer = DecodeSequence(
        "answer", PROMPT, [], params, StopRule.of(params, [], 61), processor=processor(params, PROMPT)
    )
    core.handle(Reserve(answer))
    core.handle(PrefillHere(prompt("own", PROMPT), "answer", 0))
    while core.step():
        pass
    core.handle(Start("answer", events[-1].first.token_id))
    core.handle(Submit(prompt("leased", [8] * 60)))  # no decode worker takes its KV, so its blocks stay in use
    core.handle(Submit(prompt("waiting", [9] * 60)))
    while not any(isinstance(one, StepSampled) and FinishReason.LENGTH in one.finishes.values() for one in events):
        assert core.step(), "the engine's thread would wait for a message"
