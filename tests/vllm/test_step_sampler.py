"""Tests what the logits processor does with a step's logits, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from overfill.engine.vllm import sampler
from overfill.engine.vllm.sampler import StepSampler
from overfill.errors import InvalidRequest
from overfill.model.processors import new_processor
from overfill.model.sampling import sample
from overfill.request.params import SamplingParams

# Importing vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 512
PLAIN = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


def row(sampling: SamplingParams, processor: Any = None, index: int = 0) -> Any:
    prompt = [3, 4, 5]
    return SimpleNamespace(
        sampling=sampling,
        processor=processor or new_processor(sampling, prompt, None, []),
        emitted=[9, 9, 10],
        sampled_position=6,
        sample_index=index,
    )


class Step:
    """A step of vLLM's: it takes the greatest logits after the sampler has seen them."""

    def __init__(self, logits: torch.Tensor, rows: dict[int, Any]) -> None:
        self.sampler = StepSampler()
        ids = [str(number) for number in range(len(logits))]
        self.sampler.sample(logits, ids, sorted(rows), lambda id: rows[int(id)])
        self.tokens = logits.argmax(dim=-1).tolist()
        self.sampler.finish(dict(zip(ids, self.tokens, strict=True)))
        self.errors = {
            number for number, token in enumerate(self.tokens) if self.sampler.error(str(number), token) is not None
        }


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("at_once", [1 << 22, VOCAB])
def test_each_row_gets_the_token_that_the_own_engine_would_take(
    logits: torch.Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_TOKENS_AT_ONCE", at_once)
    penalised = SamplingParams(temperature=0, repetition_penalty=50, frequency_penalty=2, logit_bias={77: 60})
    scored = SamplingParams(temperature=0, logprobs=3)
    drawn = SamplingParams(temperature=0.9, seed=5, logprobs=2, presence_penalty=2)
    rows = {1: row(DRAWN), 2: row(DRAWN, index=1), 4: row(penalised), 5: row(scored), 8: row(drawn)}
    before, changed = logits.clone(), logits.clone()
    for number in (4, 8):
        one = rows[number]
        again = row(one.sampling)
        part = changed[number : number + 1]
        assert not sampler.process(part, [again.processor], [again.emitted])
    step = Step(logits, rows)
    assert step.errors == set()
    for number in range(len(logits)):
        wanted = rows.get(number) or row(PLAIN)
        ((token,), failed) = sample(
            changed[number : number + 1], [wanted.sampling], [wanted.sampled_position], [wanted.sample_index]
        )
        assert not failed
        assert step.tokens[number] == token.token_id, number
        assert step.sampler.details.get(str(number)) == (token if token.logprob is not None else None)
    assert step.tokens[4] == 77
    for number in (0, 3, 6, 7):
        assert torch.equal(logits[number], before[number])


@pytest.mark.parametrize(
    ("spoilt", "columns"),
    [
        *((spoilt, slice(None)) for spoilt in (torch.nan, torch.inf, -torch.inf)),
        *((spoilt, slice(300, 332)) for spoilt in (torch.nan, torch.inf)),
        *((spoilt, slice(300, 301)) for spoilt in (torch.nan, torch.inf)),
    ],
    ids=str,
)
def test_a_row_that_is_not_finite_fails_alone(logits: torch.Tensor, spoilt: float, columns: slice) -> None:
    """Also when one of several ranks has spoilt the columns that it computes, or the output head is damaged."""
    logits[2, columns] = logits[6, columns] = spoilt
    assert Step(logits, {5: row(DRAWN), 6: row(DRAWN)}).errors == {2, 6}


def test_what_one_row_makes_its_processor_raise_fails_that_row_alone(logits: torch.Tensor) -> None:
    class Refusing:
        params = SamplingParams(temperature=0, frequency_penalty=1)

        def catch_up(self, emitted: Any) -> None:
            raise InvalidRequest("grammar", "too complex")

    step = Step(logits, {1: row(PLAIN, Refusing()), 2: row(DRAWN, Refusing()), 3: row(DRAWN)})
    assert step.errors == {1, 2}
    assert isinstance(step.sampler.errors["2"], InvalidRequest)


def test_another_token_than_the_chosen_one_is_void(logits: torch.Tensor) -> None:
    step = Step(logits, {1: row(DRAWN)})
    assert step.sampler.error("1", step.tokens[1] + 1) is not None
    assert step.sampler.error("0", step.tokens[0] + 1) is None, "the most likely token of a plain row is vLLM's to find"
