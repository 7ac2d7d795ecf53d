"""Tests that workers that do not fit are refused with a list of all differing fields."""

import dataclasses

import pytest

from overfill.errors import Incompatible
from overfill.kv.handshake import KvIdentity, check_compatible
from overfill.kv.spec import KvSpec, RopeSpec

MINE = KvIdentity(1, "aa", "bb", KvSpec(30, 3, 64, "bfloat16", RopeSpec(theta=10000.0)))


def test_equal_identities_fit():
    check_compatible(MINE, dataclasses.replace(MINE), "prefill-0")


def test_every_differing_field_is_listed_with_both_values():
    theirs = dataclasses.replace(MINE, full_digest="cc", kv=KvSpec(30, 3, 64, "float32", RopeSpec(theta=500000.0)))
    with pytest.raises(Incompatible) as caught:
        check_compatible(MINE, theirs, "prefill-0")
    assert caught.value.fields == ("full_digest", "kv.dtype", "kv.rope.theta")
    for part in ("prefill-0", "'aa'", "'cc'", "bfloat16", "float32", "500000.0"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RopeSpec)])
def test_every_rope_field_counts(name):
    default = getattr(RopeSpec(), name)
    other = "yarn" if name == "type" else (not default if isinstance(default, bool) else default + 1)
    rope = dataclasses.replace(RopeSpec(), **{name: other})
    kv = dataclasses.replace(MINE.kv, rope=rope)
    assert KvSpec.from_proto(kv.to_proto()) == kv
    with pytest.raises(Incompatible, match=name):
        check_compatible(
            dataclasses.replace(MINE, kv=dataclasses.replace(MINE.kv, rope=RopeSpec())),
            dataclasses.replace(MINE, kv=kv),
            "peer",
        )
