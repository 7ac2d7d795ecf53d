"""Tests pools of workers: readiness, credits, incarnations, identity, and refusals."""

import dataclasses

import pytest

from overfill.errors import Incompatible, InvalidRequest
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.pool import Pool, Roster
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import DECODE, PREFILL, STALE_AFTER, WorkerInfo
from overfill.v1 import common_pb2, kv_pb2, registry_pb2


@pytest.fixture
def pool():
    return Pool(DECODE)


@pytest.fixture
def worker(pool, make_info):
    return pool.join(make_info("d0"))


def test_a_worker_takes_work_only_while_it_reports_that_it_is_ready(pool, worker, make_report):
    assert not worker.admissible(0.0)
    pool.report(worker, make_report(ready=False), 0.0)
    assert not worker.admissible(0.0)
    pool.report(worker, make_report(), 0.0)
    assert worker.admissible(STALE_AFTER)
    assert not worker.admissible(STALE_AFTER + 0.1), "it has stopped reporting"
    pool.report(worker, make_report(draining=True), 0.0)
    assert not worker.admissible(0.0)


def test_credits_bound_requests_in_flight(pool, worker, make_report):
    pool.report(worker, make_report(credits=2), 0.0)
    pool.place(worker, 10)
    assert worker.admissible(0.0)
    pool.place(worker, 10)
    assert not worker.admissible(0.0)
    pool.release(worker)
    assert worker.admissible(0.0)


def test_a_stage_is_lacking_while_none_of_its_workers_is_ready(make_info, make_report):
    roster = Roster()
    assert roster.unready_stages(0.0) == [PREFILL, DECODE]
    prefill = roster.join(make_info("p0", PREFILL))
    decode = [roster.join(make_info(name)) for name in ("d0", "d1")]
    assert roster.unready_stages(0.0) == [PREFILL, DECODE], "no worker has reported"
    roster.prefill.report(prefill, make_report(ready=False), 0.0)
    for worker in decode:
        roster.decode[DEFAULT_TIER].report(worker, make_report(credits=0), 0.0)
    assert roster.unready_stages(0.0) == [PREFILL], "a full worker counts as ready, a loading one does not"
    roster.prefill.report(prefill, make_report(), 1.0)
    assert roster.unready_stages(1.0) == []
    roster.decode[DEFAULT_TIER].remove(decode[0])
    assert roster.unready_stages(1.0) == []
    roster.decode[DEFAULT_TIER].report(decode[1], make_report(draining=True), 1.0)
    assert roster.unready_stages(1.0) == [DECODE]
    roster.decode[DEFAULT_TIER].report(decode[1], make_report(), 2.0)
    assert roster.unready_stages(1.0 + STALE_AFTER) == []
    assert roster.unready_stages(1.1 + STALE_AFTER) == [PREFILL], "silence suffices; no event is needed"


def test_another_incarnation_replaces_the_old_one_and_starts_empty(make_info, make_report):
    pool = Pool(DECODE)
    old = pool.join(make_info("d0", incarnation=1))
    pool.report(old, make_report(), 0.0)
    pool.place(old, 10)
    new = pool.join(make_info("d0", incarnation=2))
    assert list(pool) == [new]
    assert new.in_flight == 0
    pool.release(old)  # a request of the old incarnation ends later and changes only the old one
    assert (old.in_flight, new.in_flight) == (0, 0)
    pool.remove(old)
    assert list(pool) == [new]


def test_the_same_incarnation_that_joins_again_still_has_its_requests(pool, worker, make_info, make_report):
    pool.report(worker, make_report(credits=1), 0.0)
    pool.place(worker, 10)
    pool.remove(worker)
    assert len(pool) == 0
    back = pool.join(make_info("d0"))
    assert back is worker
    assert not back.admissible(0.0), "it must report first"
    pool.report(back, make_report(credits=1), 1.0)
    assert not back.admissible(1.0), "its only credit is in use"


def test_free_capacity_accounts_for_placements_since_the_report(pool, worker, make_report):
    pool.report(worker, make_report(used=90, total=100), 0.0)
    assert worker.has_room(160)
    assert not worker.has_room(161)
    pool.place(worker, 80)
    assert worker.has_room(80)
    assert not worker.has_room(81)
    pool.report(worker, make_report(used=95, total=100), 0.0)
    assert worker.has_room(80)


def test_capacity_is_that_of_the_blocks_or_of_the_model(make_info, make_report):
    pool = Pool(DECODE)
    worker = pool.join(dataclasses.replace(make_info("d0"), max_model_len=1000))
    assert worker.could_hold(10**9), "nothing is known yet"
    pool.report(worker, make_report(total=10), 0.0)
    assert worker.could_hold(160)
    assert not worker.could_hold(161)
    pool.report(worker, make_report(total=10_000), 0.0)
    assert worker.could_hold(1000)
    assert not worker.could_hold(1001)


@pytest.mark.parametrize(
    ("identity", "fields"),
    [
        ({"full_digest": "other"}, ("full_digest",)),
        ({"kv": KvSpec(4, 2, 16, "bfloat16", RopeSpec(theta=5.0))}, ("kv.dtype", "kv.rope.theta")),
    ],
)
def test_a_worker_of_another_model_is_refused_with_the_differing_fields(make_info, identity, fields):
    roster = Roster()
    roster.join(make_info("d0"))
    with pytest.raises(Incompatible) as caught:
        roster.join(make_info("p0", PREFILL, **identity))
    assert caught.value.fields == fields
    assert "p0" in str(caught.value)
    assert [w.id for w in roster.workers()] == ["d0"]


def test_the_expected_identity_holds_for_the_first_worker_too(make_info):
    roster = Roster({"full_digest": "expected"})
    with pytest.raises(Incompatible, match="'expected'"):
        roster.join(make_info("d0"))


def test_a_lone_worker_may_come_back_with_another_element_type(make_info):
    roster = Roster()
    roster.join(make_info("d0"))
    kv = KvSpec(4, 2, 16, "bfloat16", RopeSpec())
    assert roster.join(make_info("d0", incarnation=2, kv=kv)).info.identity.kv == kv


def test_a_refusal_closes_the_worker_and_its_load_counts_until_the_next_report(pool, worker, make_report):
    pool.report(worker, make_report(used=0, total=100), 0.0)
    pool.place(worker, 160)
    pool.refused(worker, make_report(used=95, total=100).load)
    assert not worker.admissible(0.0)
    assert worker.has_room(80), "the reported load includes earlier placements"
    assert not worker.has_room(81)
    pool.report(worker, make_report(used=0, total=100), 1.0)
    assert worker.admissible(1.0)
    pool.refused(worker, None)
    assert not worker.admissible(1.0)
    assert worker.has_room(1600), "the known load stays"


def test_a_hello_becomes_the_workers_description():
    kv = KvSpec(4, 2, 16, "float32", RopeSpec())
    hello = registry_pb2.Hello(
        worker_id="d0",
        incarnation=7,
        stages=[DECODE],
        address="h:1",
        wire_version=1,
        model=common_pb2.ModelIdentity(decoder_digest="cc", decoder_config_digest="dd"),
        kv=kv.to_proto(),
        tier="fast",
        startup_seconds=2.5,
    )
    (info,) = WorkerInfo.from_hello(hello)
    assert (info.id, info.incarnation, info.stage, info.address, info.tier) == ("d0", 7, DECODE, "h:1", "fast")
    assert (info.data_addresses, info.identity.kv, info.startup_seconds) == ((), kv, 2.5)
    assert info.decoder == {
        "decoder_digest": "cc", "decoder_config_digest": "dd", "decoder_quantize": "none", "kv_cache_dtype": "auto",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"worker_id": ""}, "hello.worker_id"),
        ({"address": ""}, "hello.address"),
        ({"stages": []}, "hello.stages"),
        ({"stages": [common_pb2.STAGE_ROUTER]}, "hello.stages"),
        ({"stages": [DECODE, DECODE]}, "hello.stages"),
        ({"stages": [PREFILL, DECODE, DECODE]}, "hello.stages"),
        ({"stages": [PREFILL, 9]}, "hello.stages"),
        ({"data_addresses": [kv_pb2.DataAddress(num_kv_heads=2)]}, "hello.data_addresses"),
        ({"data_addresses": [kv_pb2.DataAddress(address=":5", num_kv_heads=2)]}, "hello.data_addresses"),
        ({"data_addresses": [kv_pb2.DataAddress(address="h:", num_kv_heads=2)]}, "hello.data_addresses"),
        ({"data_addresses": [kv_pb2.DataAddress(address="h:5", num_kv_heads=1)] * 3}, "hello.data_addresses"),
        ({"kv": common_pb2.KvSpec()}, "hello.kv.dtype"),
        ({"startup_seconds": -1.0}, "hello.startup_seconds"),
        ({"startup_seconds": float("nan")}, "hello.startup_seconds"),
        ({"startup_seconds": 86_401.0}, "hello.startup_seconds"),
        ({"worker_id": "p" * 257}, "hello.worker_id"),
        ({"worker_id": "p0\nINFO"}, "hello.worker_id"),
        ({"engine": "e" * 257}, "hello.engine"),
        ({"metrics_address": "h" * 257}, "hello.metrics_address"),
        ({"model": common_pb2.ModelIdentity(decoder_digest="d" * 257)}, "hello.model.decoder_digest"),
        ({"data_addresses": [kv_pb2.DataAddress(address="h" * 257 + ":5", num_kv_heads=2)]}, "hello.data_addresses"),
        ({"max_model_len": (1 << 30) + 1}, "hello.max_model_len"),
        ({"vocab_size": (1 << 30) + 1}, "hello.vocab_size"),
        ({"max_num_seqs": (1 << 20) + 1}, "hello.max_num_seqs"),
    ],
)
def test_an_invalid_hello_is_refused_by_field(change, field):
    kv = KvSpec(4, 2, 16, "float32", RopeSpec()).to_proto()
    good = {"worker_id": "p0", "stages": [PREFILL], "address": "h:1", "kv": kv}
    with pytest.raises(InvalidRequest) as caught:
        WorkerInfo.from_hello(registry_pb2.Hello(**good | change))
    assert caught.value.field == field


IDENTITY = common_pb2.ModelIdentity(full_digest="f", reader_digest="f", decoder_digest="f")


@pytest.mark.parametrize(
    ("change", "is_reader"),
    [
        ({}, True),
        ({"decoder_quantize": "none", "kv_cache_dtype": "auto"}, True),
        ({"decoder_quantize": "int8", "reader_quantize": "int8"}, True),
        ({"reader_digest": "mock"}, True),
        ({"decoder_digest": "pruned"}, False),
        ({"reader_digest": "mock", "decoder_digest": "pruned"}, False),
        ({"decoder_quantize": "int8"}, False),
        ({"kv_cache_dtype": "int8"}, False),
        ({"reader_digest": "", "decoder_digest": ""}, False),
    ],
)
def test_only_a_decoder_that_is_the_reader_lends_its_kv(change, is_reader):
    model = common_pb2.ModelIdentity()
    model.CopyFrom(IDENTITY)
    for name, value in change.items():
        setattr(model, name, value)
    kv = KvSpec(4, 2, 16, "float32", RopeSpec()).to_proto()
    hello = registry_pb2.Hello(worker_id="w", stages=[DECODE], address="h:1", kv=kv, model=model, lends_kv=True)
    if is_reader:
        assert [info.lends_kv for info in WorkerInfo.from_hello(hello)] == [True]
    else:
        with pytest.raises(Incompatible, match="only if its decoder is the reader") as caught:
            WorkerInfo.from_hello(hello)
        assert caught.value.fields == ("hello.lends_kv",)
    hello.stages.append(PREFILL)
    assert [info.lends_kv for info in WorkerInfo.from_hello(hello)] == [True, False], "the prefill stage lends"


def hello_with_addresses(*ranges):
    addresses = [
        kv_pb2.DataAddress(address=f"h:{first}", first_kv_head=first, num_kv_heads=count) for first, count in ranges
    ]
    kv = KvSpec(4, 8, 16, "float32", RopeSpec()).to_proto()
    return registry_pb2.Hello(worker_id="p0", stages=[PREFILL], address="h:9", kv=kv, data_addresses=addresses)


@pytest.mark.parametrize("ranges", [[(0, 8)], [(0, 2), (2, 6)], [(6, 2), (0, 1), (1, 5)]])
def test_data_addresses_that_serve_each_kv_head_once_are_kept(ranges):
    hello = hello_with_addresses(*ranges)
    assert WorkerInfo.from_hello(hello)[0].data_addresses == tuple(hello.data_addresses)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 7)],
        [(1, 7)],
        [(0, 9)],
        [(0, 4), (5, 3)],
        [(0, 5), (4, 4)],
        [(0, 8), (0, 8)],
        [(0, 8), (8, 0)],
        [(0, 0), (0, 8)],
        [(0, 0)],
        [(0, 4), (4, 2**32 - 1)],
    ],
)
def test_data_addresses_that_miss_or_repeat_a_kv_head_are_refused(ranges):
    with pytest.raises(InvalidRequest, match="each of the 8 KV heads exactly once; got the ranges") as caught:
        WorkerInfo.from_hello(hello_with_addresses(*ranges))
    assert caught.value.field == "hello.data_addresses"


def test_too_many_data_addresses_are_refused_before_they_are_read():
    hello = hello_with_addresses(*[(head, 1) for head in range(257)])
    hello.kv.num_kv_heads = 257
    with pytest.raises(InvalidRequest, match="at most 256 for 257 KV heads; got 257"):
        WorkerInfo.from_hello(hello)


def test_the_keys_of_a_prefix_cache_are_mirrored(make_info, make_report):
    pool = Pool(PREFILL)
    worker = pool.join(make_info("p0", PREFILL))
    for delta, keys in (
        (registry_pb2.PrefixDelta(added=[1, 2], replaces=True), {1, 2}),
        (None, {1, 2}),
        (registry_pb2.PrefixDelta(added=[3], removed=[1]), {2, 3}),
        (registry_pb2.PrefixDelta(added=[9], replaces=True), {9}),  # the worker has joined again
    ):
        report = make_report()
        if delta is not None:
            report.prefix.CopyFrom(delta)
        pool.report(worker, report, 0.0)
        assert worker.prefix_keys == keys
