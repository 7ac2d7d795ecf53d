"""Tests that workers that do not fit are refused with a list of all differing fields."""

import dataclasses

import pytest

from overfill.errors import Incompatible
from overfill.kv.handshake import KvIdentity, check_compatible
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.v1 import common_pb2

MINE = KvIdentity(1, "aa", "bb", KvSpec(30, 3, 64, "bfloat16", RopeSpec(theta=10000.0)), "cc", "aa")


def test_equal_identities_fit():
    check_compatible(MINE, dataclasses.replace(MINE), "prefill-0")


def test_every_differing_field_is_listed_with_both_values():
    theirs = dataclasses.replace(MINE, full_digest="cc", kv=KvSpec(30, 3, 64, "float32", RopeSpec(theta=500000.0)))
    with pytest.raises(Incompatible) as caught:
        check_compatible(MINE, theirs, "prefill-0")
    assert caught.value.fields == ("full_digest", "kv.dtype", "kv.rope.theta")
    for part in ("prefill-0", "'aa'", "'cc'", "bfloat16", "float32", "500000.0"):
        assert part in str(caught.value)


MODEL = {
    "full_digest": "full",
    "config_digest": "config",
    "reader_digest": "reader",
    "reader_quantize": "int8",
    "tokenizer_digest": "tokenizer",
    "revision": "r1",
}


def identity(**changes: str) -> KvIdentity:
    return KvIdentity.from_proto(3, common_pb2.ModelIdentity(**(MODEL | changes)), MINE.kv.to_proto())


@pytest.mark.parametrize("name", MODEL)
def test_every_field_of_the_kvs_identity_is_read_from_the_message_and_compared(name):
    assert identity().flat()[name] == MODEL[name]
    with pytest.raises(Incompatible, match=f"{name} .*'other'") as caught:
        check_compatible(identity(), identity(**{name: "other"}), "peer")
    assert caught.value.fields == (name,)


def test_the_kvs_identity_has_nothing_of_the_decoder():
    decoder = ("decoder_digest", "decoder_config_digest", "decoder_quantize", "kv_cache_dtype")
    assert identity(**dict.fromkeys(decoder, "other")) == identity()


@pytest.mark.parametrize("name", ["full_digest", "config_digest", "reader_digest", "reader_quantize"])
def test_kv_of_another_identity_has_other_keys_in_caches(name):
    assert identity(**{name: "other"}).cache_key != identity().cache_key
    float32 = dataclasses.replace(MINE.kv, dtype="float32")
    assert dataclasses.replace(identity(), kv=float32).cache_key != identity().cache_key


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
