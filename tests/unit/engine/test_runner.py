"""One pass for many sequences: what fails in it fails alone."""

import pytest
import torch

from overfill.engine.runner import Choice, ModelRunner, Work
from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.model.processors import new_processor
from overfill.params import SamplingParams


class OneBroken:
    """A model that names most likely tokens itself, and none for its second row."""

    def most_likely(self, batch, cache, *hooks):
        return torch.tensor([7, -1, 9])


def test_a_broken_row_of_a_greedy_step_fails_alone():
    cache = KvCache(KvSpec(1, 1, 4, "float32", RopeSpec()), 3, 4, torch.device("cpu"))
    runner = ModelRunner(OneBroken(), cache)
    works = [Work([1], 0, [block], wants_logits=True) for block in range(3)]
    tokens, failed = runner.next_tokens(works, [Choice(SamplingParams(temperature=0), 0)] * 3)
    assert [tokens[0].token_id, tokens[2].token_id] == [7, 9]
    assert list(failed) == [1]
    assert isinstance(failed[1], InternalError)


class MostLikely(OneBroken):
    """Names the most likely tokens, and has no logits to be changed."""

    def forward(self, *args):
        raise AssertionError("logits were asked for")

    def most_likely(self, batch, cache, *hooks):
        return torch.tensor([7])


def test_min_tokens_cost_nothing_once_they_are_there():
    cache = KvCache(KvSpec(1, 1, 4, "float32", RopeSpec()), 1, 4, torch.device("cpu"))
    runner = ModelRunner(MostLikely(), cache)
    params = SamplingParams(temperature=0, min_tokens=2)
    processor = new_processor(params, [], None, [1])
    works = [Work([1], 0, [0], wants_logits=True)]
    assert runner.next_tokens(works, [Choice(params, 0, processor, [5, 6])])[0][0].token_id == 7
    with pytest.raises(AssertionError, match="logits were asked for"):
        runner.next_tokens(works, [Choice(params, 0, processor, [5])])
