"""``LLM``: both halves in one process give the reference's answers, in any batch and with a small cache."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from small_tokenizers import sentencepiece_like, write_checkpoint

import overfill.request.grammar
from overfill import LLM
from overfill.api.tokenizer import Tokenizer
from overfill.engine.offline import OfflineRun
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import Preempted
from overfill.errors import InternalError, InvalidRequest, PromptTooLong
from overfill.making.tiny import make_tiny_pair
from overfill.pair.reference import TwoStageReference
from overfill.request.params import Grammar, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40)
PROMPTS = [[(7 * i * (seed + 3)) % 470 + 20 for i in range(20 + 13 * seed)] for seed in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return new_llm(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return TwoStageReference(folder)


def assert_nothing_leaked(llm):
    """Checks that no request owns a block; only the full model's prefix cache still has blocks."""
    prefix, pool = llm._loaded.full.prefix, llm._loaded.decoder.pool
    assert prefix.num_used == prefix.num_leaked == 0
    prefix.check_integrity()
    assert pool.num_used == 0
    pool.check_integrity()


class Computed:
    """Records the tokens and positions that each model computes."""

    def __init__(self, llm, monkeypatch):
        names = {id(getattr(llm._loaded, half).runner): half for half in ("full", "decoder")}
        self.by = {"full": set(), "decoder": set()}
        next_tokens = ModelRunner.next_tokens

        def spy(runner, works, *args, **more):
            for work in works:
                self.by[names[id(runner)]] |= {(work.start + i, t) for i, t in enumerate(work.tokens)}
            return next_tokens(runner, works, *args, **more)

        monkeypatch.setattr(ModelRunner, "next_tokens", spy)


def test_a_batch_gets_the_reference_s_answers(llm, reference):
    answers = llm.generate(PROMPTS, GREEDY)
    assert [a.token_ids for a in answers] == [reference.generate(p, 40) for p in PROMPTS]
    assert [a.prompt_tokens for a in answers] == [len(p) for p in PROMPTS]
    assert_nothing_leaked(llm)


def test_preemption_changes_no_answer(folder, reference, monkeypatch):
    preempted = []
    handle = OfflineRun._answer

    def spy(run, event):
        preempted.extend([event] if isinstance(event, Preempted) else [])
        handle(run, event)

    monkeypatch.setattr(OfflineRun, "_answer", spy)
    small = new_llm(folder, kv_memory=16 * 16 * 1024)
    answers = small.generate(PROMPTS, GREEDY)
    assert preempted
    assert [a.token_ids for a in answers] == [reference.generate(p, 40) for p in PROMPTS]
    assert_nothing_leaked(small)


def test_a_cache_is_sized_without_being_asked(folder, reference):
    llm = LLM(folder, dtype="float32", device="cpu")
    assert llm.max_model_len == 2048  # the model's context
    assert llm.generate(PROMPTS[:1], GREEDY)[0].token_ids == reference.generate(PROMPTS[0], 40)


def test_an_answer_ends_at_its_limit_or_at_a_stop_token(llm):
    whole = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
    assert (len(whole.token_ids), whole.finish_reason) == (8, "length")
    index, stop = next((i, t) for i, t in enumerate(whole.token_ids) if i and t not in whole.token_ids[:i])
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    cut = llm.generate(PROMPTS[:1], sampling)[0]
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:index], "stop")
    first = SamplingParams(temperature=0, stop_token_ids=(whole.token_ids[0],))
    assert llm.generate(PROMPTS[:1], first)[0].token_ids == []  # the full model's own token ends it
    assert_nothing_leaked(llm)


def new_llm(folder, **more):
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "kv_memory": 2**20,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
    }
    return LLM(folder, **(settings | more))


def test_a_second_turn_computes_only_what_is_new(folder, reference, monkeypatch):
    llm = new_llm(folder)
    first = llm.generate(PROMPTS[5:], GREEDY)[0]
    assert first.cached_tokens == 0
    turn = [*PROMPTS[5], *first.token_ids, 33, 34, 35]
    computed = Computed(llm, monkeypatch)
    second = llm.generate([turn], GREEDY)[0]
    assert second.token_ids == reference.generate(turn, 40)
    held = len(PROMPTS[5]) // 16 * 16
    assert second.cached_tokens == held
    assert {position for position, _ in computed.by["full"]} == set(range(held, len(turn)))
    assert_nothing_leaked(llm)


def test_the_first_turn_s_answer_is_read_by_the_full_model_in_the_second(folder, reference, monkeypatch):
    """The decoder wrote KV of the answer; the full model still computes the KV of the next prompt."""
    llm = new_llm(folder)
    prompt = PROMPTS[4][:64]  # whole blocks, so that the answer begins a block of its own
    answer = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0].token_ids
    computed = Computed(llm, monkeypatch)
    turn = [*prompt, *answer, 33]
    assert llm.generate([turn], GREEDY)[0].token_ids == reference.generate(turn, 40)
    assert {(64 + i, token) for i, token in enumerate(answer)} <= computed.by["full"]
    assert all(position >= len(turn) for position, _ in computed.by["decoder"])


def test_without_a_prefix_cache_every_prompt_is_computed(folder):
    llm = new_llm(folder, prefix_cache=False)
    assert [llm.generate(PROMPTS[5:], GREEDY)[0].cached_tokens for _ in range(2)] == [0, 0]
    assert llm._loaded.full.pool.num_used == 0


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_a_step_that_fails_leaves_the_next_call_its_blocks(folder, reference, monkeypatch, half):
    llm = new_llm(folder)
    llm.generate(PROMPTS[5:], GREEDY)
    broken = getattr(llm._loaded, half).runner
    run = ModelRunner.run

    def fail(runner, *args, **more):
        if runner is broken:
            raise RuntimeError("no such kernel")
        return run(runner, *args, **more)

    drawn = SamplingParams(temperature=1.0, seed=1, max_tokens=8)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        with pytest.raises(InternalError, match="no such kernel"):
            llm.generate(PROMPTS, drawn)
    assert_nothing_leaked(llm)
    again = llm.generate(PROMPTS, GREEDY)
    assert [a.token_ids for a in again] == [reference.generate(p, 40) for p in PROMPTS]
    if half == "full":  # the failed step's KV may be the cause
        assert again[5].cached_tokens == 0
    else:
        assert again[5].cached_tokens >= len(PROMPTS[5]) // 16 * 16 - 16
    assert_nothing_leaked(llm)


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_an_interrupt_in_the_middle_of_bookkeeping_leaves_the_next_call_whole(folder, reference, monkeypatch, half):
    llm = new_llm(folder)
    pool = getattr(llm._loaded, half).pool
    acquire = pool.acquire

    def interrupted(owner, count):
        acquire(owner, count)  # the blocks are acquired but not yet recorded
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert [a.token_ids for a in llm.generate(PROMPTS, GREEDY)] == [reference.generate(p, 40) for p in PROMPTS]
    assert_nothing_leaked(llm)


def test_chat_is_the_template_s_prompt(llm):
    messages = [{"role": "user", "content": "What is a block?"}]
    rendered = "<|im_start|>user\nWhat is a block?<|im_end|>\n<|im_start|>assistant\n"
    answer = llm.chat(messages, GREEDY)
    assert answer == llm.generate([rendered], GREEDY)[0]
    assert answer.text == llm.tokenizer.decode(answer.token_ids)


def test_a_seed_repeats_an_answer_and_no_seed_does_not(llm):
    seeded = SamplingParams(temperature=2.0, max_tokens=20, seed=5)
    once, again = (llm.generate(PROMPTS[:2], seeded) for _ in range(2))
    assert once == again
    unseeded = SamplingParams(temperature=2.0, max_tokens=20)
    assert llm.generate(PROMPTS[:1], unseeded) != llm.generate(PROMPTS[:1], unseeded)


def test_logprobs_come_only_when_asked_for(llm):
    answer = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3))[0]
    assert [t.token_id for t in answer.logprobs] == answer.token_ids
    for token in answer.logprobs:
        assert len(token.top) == 3
        assert token.top[0] == (token.token_id, token.logprob)  # greedy: the chosen one is the likeliest
        assert token.logprob <= 0
    assert llm.generate(PROMPTS[:1], GREEDY)[0].logprobs == []


def test_tokens_are_told_as_they_are_sampled(llm):
    told = [[] for _ in PROMPTS]
    answers = llm.generate(PROMPTS, GREEDY, on_token=lambda index, token: told[index].append(token.token_id))
    assert told == [a.token_ids for a in answers]


def test_a_callback_that_raises_leaks_nothing(llm, reference):
    def give_up(index, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_token=give_up)
    assert_nothing_leaked(llm)
    assert llm.generate(PROMPTS[:1], GREEDY)[0].token_ids == reference.generate(PROMPTS[0], 40)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one string", "pass a list of prompts"),
        ([[]], "is empty"),
        ([[5, 512]], "token id 512 at index 1 is outside the vocabulary of 512"),
        ([[-1]], "token id -1 at index 0"),
        ([[5], []], "is empty"),
    ],
)
def test_bad_prompts_are_refused(llm, prompts, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, GREEDY)
    assert_nothing_leaked(llm)


@pytest.mark.parametrize("wrong", [[{"role": "user"}], "Hi", {"role": "user"}, {"role": "user", "content": None}])
def test_a_message_without_role_or_content_is_refused_with_its_value(llm, wrong):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"role": "user", "content": "Hi"}, wrong], GREEDY)
    assert str(caught.value).startswith(f"messages[1]: is {wrong!r}; give a mapping")


def test_a_prompt_too_long_is_refused_with_both_numbers(llm):
    with pytest.raises(PromptTooLong, match=r"has 300 tokens, the context 256"):
        llm.generate([[5] * 300], GREEDY)


def test_a_context_longer_than_the_model_s_is_refused_with_both_numbers(folder):
    with pytest.raises(InvalidRequest, match=r"4096 is more than the model's context of 2048"):
        LLM(folder, device="cpu", max_model_len=4096)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: must be at least 1, got 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens: must be at least 1, got 0"),
        ({"block_size": 0}, "block_size: must be at least 1, got 0"),
        ({"kv_memory": -1}, "kv_memory: must be at least 1, got -1"),
        ({"threads": 0}, "threads: must be at least 1, got 0"),
        ({"memory_fraction": 1.5}, r"memory_fraction: must be above 0 and at most 1, got 1\.5"),
        ({"dtype": "int8"}, "dtype: must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_wrong_arguments_are_named_before_a_pair_is_read(arguments, says):
    with pytest.raises(InvalidRequest, match=f"^{says}$"):
        LLM("no such pair", **arguments)


def test_a_token_id_that_is_no_integer_is_refused(llm):
    with pytest.raises(TypeError, match="'float' object"):
        llm.generate([[5, 6.5]], GREEDY)


SCHEMA = Grammar.json_schema(
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"enum": ["a", "bc"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_obey_their_grammar_from_the_first_token_on(llm, temperature):
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=60, grammar=SCHEMA)
    for answer in llm.generate(PROMPTS, sampling):
        assert answer.finish_reason == "stop"
        assert set(json.loads(answer.text)) == {"n", "s"}
    assert_nothing_leaked(llm)


def test_bias_and_penalties_reach_both_stages(llm):
    biased = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={77: 100.0})
    assert llm.generate(PROMPTS[:1], biased)[0].token_ids == [77] * 6
    # A token's logit starts at 100 and loses 2 at each use, so that 77 and 78 alternate.
    both = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logit_bias={77: 100.0, 78: 99.0}, frequency_penalty=2.0
    )
    tokens = llm.generate(PROMPTS[:1], both)[0].token_ids
    assert set(tokens) == {77, 78}
    assert tokens.count(77) == 3


def test_a_grammar_that_fails_on_the_way_ends_its_request_only_with_its_reason(llm, monkeypatch):
    fill = overfill.request.grammar.Matcher.fill
    calls = []

    def fail_third(matcher, row):
        calls.append(matcher)
        if len(calls) == 3:
            raise overfill.request.grammar.GrammarFailed("sampling.grammar", "too complex")
        fill(matcher, row)

    monkeypatch.setattr(overfill.request.grammar.Matcher, "fill", fail_third)
    with pytest.raises(InvalidRequest, match="too complex"):
        llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=40, grammar=SCHEMA))
    assert_nothing_leaked(llm)


@pytest.mark.parametrize("kv_memory", [2**20, 16 * 16 * 1024])
def test_answers_have_their_least_length_in_both_stages_and_after_preemption(folder, kv_memory):
    llm = new_llm(folder, kv_memory=kv_memory)
    ending = dict.fromkeys((llm.tokenizer.end_of_answer, 77), 100.0)
    least = SamplingParams(temperature=0, min_tokens=30, max_tokens=40, stop_token_ids=(77,), logit_bias=ending)
    answers = llm.generate(PROMPTS, least)
    assert {(len(a.token_ids), a.finish_reason) for a in answers} == {(30, "stop")}
    assert llm.generate(PROMPTS[:1], replace(least, min_tokens=0))[0].token_ids == []


def test_a_least_length_that_the_context_does_not_hold_is_refused(llm):
    with pytest.raises(PromptTooLong, match=r"min_tokens: 300 tokens do not fit; 236 do"):
        llm.generate(PROMPTS[:1], SamplingParams(min_tokens=300))


def test_a_completion_keeps_the_first_word_s_space(folder, tmp_path):
    """A SentencePiece-like tokenizer has words that include their leading space."""
    llm = new_llm(folder)
    llm.tokenizer = tokenizer = Tokenizer.load(write_checkpoint(tmp_path, sentencepiece_like()))
    word = tokenizer.encode("hello world")[-1]
    forced = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logit_bias={word: 100.0})
    assert llm.generate(["hello"], forced)[0].text == " world world"
    # A prompt of token ids has no text to continue, so the answer is a text of its own, as over the network.
    assert llm.generate([tokenizer.encode("hello")], forced)[0].text == "world world"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # the latter in the native library
def test_memory_is_free_as_soon_as_nothing_refers_to_the_llm(folder, no_garbage_collection, dtype):
    llm = new_llm(folder, dtype=dtype)
    llm.generate(PROMPTS, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_token=_interrupt)
    runners = [stage.runner for stage in (llm._loaded.full, llm._loaded.decoder)]
    held = [weakref.ref(tensors) for runner in runners for tensors in (runner.model, runner.cache)]
    del runners, llm
    assert [tensors() for tensors in held] == [None] * 4


def _interrupt(index, token):
    raise KeyboardInterrupt
