"""Tests penalties, bias and grammar: the usual formulas, row by row, with no state besides the tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import overfill.request.grammar
from overfill.engine.protocol import ServedHalf
from overfill.errors import InvalidRequest, Overloaded
from overfill.model.processors import LogitProcessor, new_processor, process
from overfill.model.sampling import sample
from overfill.request.grammar import MATCHER_BYTES, GrammarFailed, Grammars
from overfill.request.params import Grammar, SamplingParams

VOCAB = 512
END = 1
DIGITS = Grammar("regex", "[0-9]{3,5}")


@pytest.fixture(scope="module")
def grammars(tiny_pair: Path) -> Iterator[Grammars]:
    made = Grammars(tiny_pair / "full" / "tokenizer.json", VOCAB, [END])
    yield made
    made.close()


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_hugging_face_s(penalty: float) -> None:
    prompt, emitted = [3, 4, 4, 7], [9, 3, 9]
    logits = random_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + emitted]), logits.clone())
    processor = new_processor(SamplingParams(repetition_penalty=penalty), prompt, None, [END])
    process(logits, [processor], [emitted])
    assert torch.allclose(logits, expected)


def test_presence_and_frequency_penalties_are_openai_s() -> None:
    emitted = [9, 3, 9, 9, *range(100, 300)]
    logits = random_logits(1)
    expected = logits.clone()
    for token in range(VOCAB):
        count = emitted.count(token)
        expected[0, token] -= 0.5 * count + 1.5 * (count > 0)  # the formula of OpenAI's reference
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=1.5)
    process(logits, [new_processor(params, [3, 4, 5], None, [END])], [emitted])
    assert torch.allclose(logits, expected)


def test_bias_is_added_to_its_tokens_only() -> None:
    logits = random_logits(2)
    before = logits.clone()
    process(logits, [new_processor(SamplingParams(logit_bias={5: 4.0, 500: -100.0}), [], None, [END]), None], [[], []])
    assert torch.allclose(logits[0, [5, 500]], before[0, [5, 500]] + torch.tensor([4.0, -100.0]))
    before[0, [5, 500]] = logits[0, [5, 500]]
    assert torch.equal(logits, before)


MIXED = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.4),
    SamplingParams(frequency_penalty=-1.0, logit_bias={7: 3.0}),
    SamplingParams(grammar=DIGITS, repetition_penalty=1.4),
    SamplingParams(logit_bias={8: -2.0}),
    SamplingParams(grammar=Grammar("json_object")),
]


def test_a_row_does_not_depend_on_the_others(grammars: Grammars) -> None:
    logits = random_logits(len(MIXED))
    emitted = [[3] * row if params.grammar is None else [] for row, params in enumerate(MIXED)]
    together = logits.clone()
    process(together, [new_processor(p, [2, 3], grammars, [END]) for p in MIXED], emitted)
    for row, params in enumerate(MIXED):
        alone = logits[row : row + 1].clone()
        process(alone, [new_processor(params, [2, 3], grammars, [END])], [emitted[row]])
        assert torch.equal(alone[0], together[row]), params


@pytest.mark.parametrize("params", MIXED[1:], ids=str)
def test_state_is_rebuilt_from_the_tokens_alone(params: SamplingParams, grammars: Grammars) -> None:
    """A processor that saw every step, one that starts in the middle and one that catches up are equal."""
    seeing = new_processor(params, [2, 3], grammars, [END])
    emitted: list[int] = []
    for step in range(6):
        logits, fresh = random_logits(1, step), random_logits(1, step)
        process(logits, [seeing], [emitted])
        process(fresh, [new_processor(params, [2, 3], grammars, [END])], [emitted])
        assert torch.equal(logits, fresh), step
        token = int(logits.argmax())
        if token == END:
            break
        emitted.append(token)


def run(params: SamplingParams, grammars: Grammars, seed: int) -> list[int]:
    """Samples tokens until the answer ends."""
    processor = new_processor(params, [2, 3], grammars, [END])
    emitted: list[int] = []
    for step in range(200):
        logits = random_logits(1, 1000 * seed + step)
        assert process(logits, [processor], [emitted]) == {}
        token = sample(logits, [params], [step], [0])[0][0].token_id
        if token == END:
            return emitted
        emitted.append(token)
    raise AssertionError("the answer did not end")


@pytest.mark.parametrize("greedy", [True, False])
def test_every_answer_follows_the_grammar(grammars: Grammars, tiny_pair: Path, greedy: bool) -> None:
    from overfill.api.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tiny_pair / "full")
    params = SamplingParams(temperature=0 if greedy else 2.0, seed=5, grammar=DIGITS)
    answers = {tokenizer.decode(run(params, grammars, seed)) for seed in range(8)}
    assert len(answers) > 4
    assert all(re.fullmatch("[0-9]{3,5}", answer) for answer in answers)


class _Broken:
    def accept(self, tokens: list[int]) -> None:
        raise GrammarFailed("sampling.grammar", "too complex")


def test_a_row_that_fails_leaves_the_others_alone(grammars: Grammars) -> None:
    broken = LogitProcessor(SamplingParams(), [], _Broken())  # type: ignore[arg-type]
    good = new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END])
    logits = random_logits(2)
    alone = logits[1:].clone()
    failed = process(logits, [broken, good], [[], []])
    assert list(failed) == [0]
    assert isinstance(failed[0], InvalidRequest)
    process(alone, [new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END])], [[]])
    assert torch.equal(logits[1], alone[0])


def test_a_grammar_that_allows_no_token_fails_its_row_alone(grammars: Grammars) -> None:
    """Otherwise the engine would take the first of the forbidden tokens."""
    dead = new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END])
    assert dead is not None
    dead.matcher = SimpleNamespace(accept=lambda tokens: None, fill=lambda words: None)
    logits = random_logits(3)
    failed = process(logits, [dead, new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END]), None], [[]] * 3)
    assert set(failed) == {0}
    assert 0 < logits[1].isfinite().sum() < VOCAB
    assert logits[2].isfinite().all()


def test_resumed_tokens_that_do_not_fit_the_grammar_are_named_as_the_fault(grammars: Grammars) -> None:
    processor = new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END])
    letter = 40  # some letter or sign; no digit
    (error,) = process(random_logits(1), [processor], [[letter, letter]]).values()
    assert isinstance(error, InvalidRequest)
    assert error.field == "resume_token_ids"
    assert f"token {letter} at index 0 does not fit sampling.grammar" in str(error)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "circle"}'), "circle"),
        (Grammar("json_schema", '{"type": "object", "not": {}}'), "not"),
        (Grammar("regex", "[a-"), "."),
        (Grammar("lark", "start: missing"), "missing"),
    ],
)
def test_grammars_that_cannot_be_compiled_are_refused_with_the_reason(
    grammars: Grammars, grammar: Grammar, message: str
) -> None:
    for attempt in (lambda: grammars.matcher(grammar), lambda: overfill.request.grammar.check_grammar(grammar)):
        with pytest.raises(InvalidRequest, match=message) as caught:
            attempt()
        assert caught.value.field == f"sampling.grammar.{grammar.kind}"


class Holder:
    pass


async def test_a_grammar_is_refused_where_memory_might_not_suffice_for_its_matcher(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tiny_pair / "full" / "tokenizer.json", VOCAB, [END])  # whose matchers no other test holds
    held = [grammars.matcher(DIGITS) for _ in range(3)]
    served = SimpleNamespace(grammars=grammars, new_processor=new_processor, ranks=None)
    prepare = partial(ServedHalf.prepare_processor, cast(ServedHalf, served))
    monkeypatch.setattr("overfill.engine.protocol.available_memory", lambda: 4 * MATCHER_BYTES - 1)
    with pytest.raises(Overloaded, match="3 matchers of grammars exist here"):
        await prepare(SamplingParams(grammar=DIGITS), [], [END])
    assert await prepare(SamplingParams(), [], [END]) is None
    del held[:]
    grammars.count(elsewhere := Holder(), 4)  # as of an answer whose ranks have a matcher each
    with pytest.raises(Overloaded, match="4 matchers of grammars exist here"):
        await prepare(SamplingParams(grammar=DIGITS), [], [END])
    del elsewhere
    assert await prepare(SamplingParams(grammar=DIGITS), [], [END]) is not None
    grammars.close()


async def test_the_event_loop_does_not_wait_for_ranks() -> None:
    threads: dict[SamplingParams, int] = {}

    def make(params: SamplingParams, *rest: object) -> None:
        threads[params] = threading.get_ident()

    served = SimpleNamespace(grammars=None, new_processor=make, ranks=object())
    plain, penalised = SamplingParams(), SamplingParams(presence_penalty=1)
    for params in (plain, penalised):
        await ServedHalf.prepare_processor(cast(ServedHalf, served), params, [], [END])
    assert threads[plain] == threading.get_ident()
    assert threads[penalised] != threading.get_ident()


def test_without_llguidance_only_grammars_are_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfill.request.grammar, "llguidance", None)
    with pytest.raises(InvalidRequest, match="pip install llguidance"):
        new_processor(SamplingParams(grammar=DIGITS), [], grammars, [END])
    assert new_processor(SamplingParams(presence_penalty=1), [], grammars, [END]) is not None
    overfill.request.grammar.check_grammar(DIGITS)  # a router without llguidance leaves the check to the workers


def test_logprobs_are_those_of_the_changed_logits(grammars: Grammars) -> None:
    params = SamplingParams(temperature=0, logprobs=20, grammar=DIGITS)
    logits = random_logits(1)
    process(logits, [new_processor(params, [], grammars, [END])], [[]])
    (token,), _ = sample(logits, [params], [0], [0])
    assert token.top is not None
    listed = [value for _, value in token.top if value != float("-inf")]
    assert sum(torch.tensor(listed).exp()) <= 1.001
    assert token.logprob == pytest.approx(max(listed))


def test_no_answer_ends_before_min_tokens(grammars: Grammars) -> None:
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(7,))
    processor = new_processor(params, [], grammars, [END])
    for emitted in ([], [5], [5, 5], [5, 5, 5]):
        logits = torch.zeros(2, VOCAB)
        logits[:, END], logits[:, 7] = 9, 8
        process(logits, [processor, None], [emitted, emitted])
        ends = logits[0, [END, 7]].tolist()
        assert ends == ([float("-inf")] * 2 if len(emitted) < 2 else [9, 8])
        assert logits[1, [END, 7]].tolist() == [9, 8], "another request's row"
    moved = new_processor(params, [], grammars, [END])
    logits = torch.zeros(1, VOCAB)
    process(logits, [moved], [[5]])  # on another worker, after the first token
    assert logits[0, END] == float("-inf")


def test_min_tokens_leave_an_end_that_is_ignored_alone(grammars: Grammars) -> None:
    assert new_processor(SamplingParams(min_tokens=9, ignore_eos=True), [], grammars, [END]) is None
    stopped = SamplingParams(min_tokens=9, ignore_eos=True, stop_token_ids=(7,))
    logits = torch.zeros(1, VOCAB)
    process(logits, [new_processor(stopped, [], grammars, [END])], [[]])
    assert logits[0, [END, 7]].tolist() == [0, float("-inf")]


def test_a_grammar_that_is_complete_ends_the_answer_before_min_tokens(grammars: Grammars, tiny_pair: Path) -> None:
    from overfill.api.tokenizer import Tokenizer

    three_or_more = SamplingParams(temperature=1.5, seed=5, grammar=DIGITS, min_tokens=40, max_tokens=50)
    tokenizer = Tokenizer.load(tiny_pair / "full")
    answers = {tokenizer.decode(run(three_or_more, grammars, seed)) for seed in range(8)}
    assert all(re.fullmatch("[0-9]{5}", answer) for answer in answers), "answers are as long as the grammar allows"
