"""One pass for many sequences: what fails in it fails alone."""

import torch

from overfill.engine.runner import Choice, ModelRunner, Work
from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.kv.spec import KvSpec, RopeSpec
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
