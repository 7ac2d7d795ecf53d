"""Tests that a transfer is complete when every vector has arrived exactly once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overfill.errors import TransferFailed
from overfill.kv import ranges
from overfill.kv.ranges import Coverage, KvRange, runs, share_among_streams


def test_a_duplicate_or_overlap_is_refused_and_changes_nothing():
    coverage = Coverage([0], (0, 8), (0, 1))
    coverage.add(KvRange(0, 1, 2, 6, 0, 1))
    for box in (KvRange(0, 1, 2, 6, 0, 1), KvRange(0, 1, 5, 8, 0, 1)):
        with pytest.raises(TransferFailed, match="overlaps"):
            coverage.add(box)
    assert coverage.missing_vectors == 8


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 8), st.integers(0, 5), st.integers(1, 6))
def test_shares_of_all_streams_cover_the_transfer_once(layers, streams, start, length):
    ordered = sorted(layers)
    tokens = (start, start + length)
    coverage = Coverage(ordered, tokens, (0, 2))
    for share in share_among_streams(ordered, tokens, (0, 2), streams):
        assert share
        for box in share:
            coverage.add(box)
    assert coverage.complete


def spans(start, end):
    """Intervals in ``start..end``, which are not empty."""
    return st.lists(st.integers(start, end), min_size=2, max_size=2, unique=True).map(sorted)


BOXES = st.tuples(spans(0, 2) | st.just([3, 4]), spans(4, 9), spans(0, 3)).map(
    lambda box: KvRange(*(number for span in box for number in span))
)


@settings(deadline=None)
@given(st.lists(BOXES, max_size=3))
def test_few_ranges_are_judged_as_by_the_bitmap(boxes):
    coverage = Coverage([0, 1, 3], (4, 9), (0, 3))

    def accepted(most):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "_MAX_COMPARED", most)
            try:
                coverage.check_request(boxes)
            except TransferFailed:
                return False
        return True

    assert accepted(most=3) == accepted(most=0)
    assert coverage.missing_vectors == 2 * 3 * 5 * 3


def test_runs_of_consecutive_numbers():
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
    assert list(runs([])) == []


def positions(boxes):
    return {
        (layer, token, head)
        for box in boxes
        for layer in range(box.layer_start, box.layer_end)
        for token in range(box.token_start, box.token_end)
        for head in range(box.head_start, box.head_end)
    }


class Receiving(RuleBasedStateMachine):
    """Chunks arrive in any order and shape, twice, or outside; missing ranges are pulled again."""

    LAYERS = (0, 1, 2, 5)
    WHOLE = (KvRange(0, 3, 10, 16, 0, 2), KvRange(5, 6, 10, 16, 0, 2))

    def __init__(self):
        super().__init__()
        self.coverage = Coverage(self.LAYERS, (10, 16), (0, 2))
        self.arrived = set()

    @rule(
        layers=st.tuples(st.integers(0, 6), st.integers(0, 3)),
        tokens=st.tuples(st.integers(9, 16), st.integers(0, 4)),
        heads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    )
    def a_chunk_arrives(self, layers, tokens, heads):
        (layer, more_layers), (token, more_tokens), (head, more_heads) = layers, tokens, heads
        box = KvRange(layer, layer + more_layers, token, token + more_tokens, head, head + more_heads)
        new = positions([box])
        if new and new <= positions(self.WHOLE) and not new & self.arrived:
            self.coverage.add(box)
            self.arrived |= new
        else:
            with pytest.raises(TransferFailed):
                self.coverage.add(box)

    @rule(data=st.data())
    def what_is_missing_is_sent_again(self, data):
        if missing := self.coverage.missing(self.WHOLE):
            box = data.draw(st.sampled_from(missing))
            self.coverage.add(box)
            self.arrived |= positions([box])

    @invariant()
    def what_is_missing_is_what_has_not_arrived(self):
        missing = self.coverage.missing(self.WHOLE)
        assert sum(box.num_vectors for box in missing) == 2 * len(positions(missing))  # no two overlap
        assert positions(missing) == positions(self.WHOLE) - self.arrived
        assert self.coverage.missing_vectors == 2 * len(positions(missing))
        assert self.coverage.complete == (not missing)


TestReceiving = Receiving.TestCase
