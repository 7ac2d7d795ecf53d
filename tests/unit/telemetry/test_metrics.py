"""Tests exported metrics: their names, the width of their buckets, and that failures are counted."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from counting import CountingRunner
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from overfill import errors
from overfill.engine.decode import DecodeEngine
from overfill.engine.sequence import DecodeSequence, Release, Reserve, Reserved, Start, StopRule
from overfill.kv.blocks import BlockPool
from overfill.request.params import SamplingParams
from overfill.routing.admission import Admission
from overfill.routing.scaling import PoolState, Scaler, ScalingConfig
from overfill.telemetry.metric_set import LATENCY_BUCKETS
from overfill.telemetry.metrics import DecodeMetrics, PrefillMetrics, declared
from overfill.telemetry.outcomes import OUTCOMES, outcome_of
from overfill.telemetry.router_metrics import MAX_ADAPTER_SERIES, MAX_KEY_SERIES, RouterMetrics
from overfill.v1 import common_pb2, decode_pb2, inference_pb2


def values(metrics, name):
    """Returns the samples of ``name`` by the values of their labels."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("kind", [RouterMetrics, PrefillMetrics, DecodeMetrics])
def test_exactly_the_declared_metrics_are_exported(kind):
    metrics = kind()
    families = text_string_to_metric_families(metrics.render().decode())
    exported = {family.name for family in families if family.name.startswith("overfill")}
    assert {spec.name.removesuffix("_total") for spec in metrics.specs} == {
        name.removesuffix("_created") for name in exported
    }
    for spec in metrics.specs:
        assert spec.name.startswith("overfill_")
        assert spec.kind != "counter" or spec.name.endswith("_total")
        assert spec.help.endswith(".")


def test_buckets_are_fine_enough_at_5_ms_and_at_5_s():
    assert 0.005 in LATENCY_BUCKETS
    assert 5.0 in LATENCY_BUCKETS
    # A quantile lies anywhere in its bucket, so its error is below the width of the bucket.
    assert all(high / low < 1.7 for low, high in pairwise(LATENCY_BUCKETS) if high <= 10)


def test_every_error_is_an_outcome():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    made_of = {errors.InvalidRequest: ("field", "x"), errors.PromptTooLong: ("field", "x")}
    seen = {outcome_of(kind(*made_of.get(kind, ("x",)))) for kind in kinds}
    assert seen | {"ok", "cancelled"} == set(OUTCOMES)
    assert outcome_of(None) == "ok"
    assert outcome_of(errors.ShuttingDown("x")) == "shutting_down"
    assert outcome_of(errors.UnsupportedModel("x")) == "internal"
    assert outcome_of(asyncio.CancelledError()) == "cancelled"
    assert outcome_of(ValueError()) == "internal"


def test_parts_of_the_time_to_first_token_and_the_unattributed_rest():
    metrics = RouterMetrics()
    timing = common_pb2.Timing(
        ttft_ns=100_000_000,
        router_queue_ns=10_000_000,
        decode_reservation_ns=1_000_000,
        prefill_queue_ns=20_000_000,
        prefill_compute_ns=60_000_000,
        return_path_ns=5_000_000,
        total_ns=300_000_000,
    )
    usage = common_pb2.Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=6, peer_tokens=2, disk_tokens=1)
    metrics.answered(inference_pb2.Finished(timing=timing, usage=usage, migrations=2), "default")
    parts = values(metrics, "overfill_router_ttft_part_seconds_sum")
    assert parts["unattributed",] == pytest.approx(0.004)
    assert sum(parts.values()) == pytest.approx(0.1)
    assert values(metrics, "overfill_router_tpot_seconds_sum")["default",] == pytest.approx(0.05)
    assert values(metrics, "overfill_router_migrations_total")["default",] == 2
    cached = values(metrics, "overfill_router_cached_prompt_tokens_total")
    assert cached == {("memory",): 3, ("peer",): 2, ("disk",): 1}


def test_imports_are_counted_by_source_and_outcome():
    metrics = PrefillMetrics()
    metrics.imported("peer", "ok", 48, 0.1)
    metrics.imported("peer", "deadline", 16, 1.0)
    metrics.imported("disk", "none", 0, 0.001)
    imports = values(metrics, "overfill_prefill_imports_total")
    assert {labels for labels, count in imports.items() if count} == {
        ("ok", "peer"),
        ("deadline", "peer"),
        ("none", "disk"),
    }
    assert values(metrics, "overfill_prefill_imported_tokens_total") == {("peer",): 64, ("disk",): 0}
    assert values(metrics, "overfill_prefill_import_seconds_count") == {("peer",): 2, ("disk",): 1}


def test_a_worker_with_both_stages_names_each_once_and_counts_its_loans_apart():
    prefill = PrefillMetrics()
    decode = DecodeMetrics(prefill)
    prefill.lent(32)
    decode.lent(16)
    assert [stage for stage, _ in values(prefill, "overfill_build_info")] == ["prefill", "decode"]
    assert values(prefill, "overfill_prefill_lent_tokens_total")[()] == 32
    assert values(prefill, "overfill_decode_lent_tokens_total")[()] == 16


def test_bytes_on_disk_are_exported_by_workers_with_a_folder_only():
    metrics = PrefillMetrics()
    assert values(metrics, "overfill_prefill_kv_disk_used_bytes") == {}
    metrics.disk.watch(lambda: 4096)
    metrics.disk.failed("damaged")
    assert values(metrics, "overfill_prefill_kv_disk_used_bytes") == {(): 4096}
    errors = values(metrics, "overfill_prefill_kv_disk_errors_total")
    assert {kind for (kind,), count in errors.items() if count} == {"damaged"}


def test_an_answer_that_was_resumed_has_no_time_to_first_token():
    metrics = RouterMetrics()
    metrics.answered(inference_pb2.Finished(timing=common_pb2.Timing(total_ns=1)), "default")
    assert values(metrics, "overfill_router_ttft_seconds_count")["default",] == 0
    assert values(metrics, "overfill_router_request_seconds_count")["default",] == 1


def test_many_keys_share_a_series():
    metrics = RouterMetrics()
    for index in range(MAX_KEY_SERIES + 5):
        metrics.accepted(10, f"key-{index}", "chat")
    metrics.accepted(1, "", "grpc")
    metrics.tokens(4, None, "key-0", "default", "chat")
    requests = values(metrics, "overfill_router_key_requests_total")
    assert len(requests) == MAX_KEY_SERIES + 2
    assert requests["other",] == 5
    assert requests["none",] == 1
    tokens = values(metrics, "overfill_router_key_tokens_total")
    assert tokens["key-0", "completion"] == 4
    assert tokens["other", "prompt"] == 50


def test_adapters_are_counted_and_many_share_a_series():
    metrics = RouterMetrics()
    for index in range(MAX_ADAPTER_SERIES + 5):
        metrics.accepted(10, "", "chat", f"task-{index}")
    metrics.accepted(10, "", "chat")
    metrics.tokens(4, None, "", "default", "chat", "task-0")
    metrics.tokens(3, None, "", "default", "chat", "deadline")
    requests = values(metrics, "overfill_router_adapter_requests_total")
    assert len(requests) == MAX_ADAPTER_SERIES + 1, "a request without an adapter has no series"
    assert requests["other",] == 5
    tokens = values(metrics, "overfill_router_adapter_tokens_total")
    assert (tokens["task-0", "completion"], tokens["other", "completion"], tokens["other", "prompt"]) == (4, 3, 50)


def test_the_time_between_tokens_does_not_depend_on_the_stream_interval():
    def exported(tokens_per_message):
        metrics = RouterMetrics()
        for _ in range(128 // tokens_per_message):
            metrics.tokens(tokens_per_message, tokens_per_message / 64, "", "default", "chat")
        return [s for f in metrics.registry.collect() if f.name == "overfill_router_itl_seconds" for s in f.samples]

    assert exported(64) == exported(1)


def test_a_tally_exports_what_a_histogram_would():
    itl, seconds = RouterMetrics(), (0.0, 0.001, 0.0012, 0.0301, 60.0, 61.0)
    histogram = Histogram("overfill_router_itl_seconds", "x", registry=None, buckets=LATENCY_BUCKETS)
    for value in seconds:
        itl.tokens(1, value, "", "default", "chat")
        histogram.observe(value)
    samples = next(iter(histogram.collect())).samples
    expected = {(s.name, "default", *s.labels.values()): s.value for s in samples}
    exported = {
        (s.name, *s.labels.values()): s.value
        for family in itl.registry.collect()
        if family.name == "overfill_router_itl_seconds"
        for s in family.samples
    }
    assert exported == {key: value for key, value in expected.items() if not key[0].endswith("_created")}


class Engine:
    """A decode engine of 8 blocks with 4 tokens each, and its metrics."""

    def __init__(self, sequences=8):
        self.pool = BlockPool(8, 4)
        self.metrics = DecodeMetrics()
        self.events = []
        self.core = DecodeEngine(CountingRunner(), self.pool, sequences, 512, self.events.extend, metrics=self.metrics)
        self.metrics.watch(self.core.load)

    def reserve(self, name, tokens):
        stop = StopRule(frozenset(), 100)
        sequence = DecodeSequence(name, list(range(tokens)), [], SamplingParams(temperature=0), stop)
        self.core.handle(Reserve(sequence))
        return self.events[-1]

    def value(self, name, *labels):
        return values(self.metrics, f"overfill_decode_{name}")[labels]


def test_steps_refusals_and_preemptions_of_a_decode_engine():
    engine = Engine(sequences=2)
    assert isinstance(engine.reserve("a", 11), Reserved)
    assert engine.value("kv_blocks_reserved") == 3
    assert isinstance(engine.reserve("b", 15), Reserved)
    engine.reserve("c", 1)
    assert engine.value("refusals_total", "sequences") == 1
    engine.core.handle(Start("a", 7))
    engine.core.handle(Start("b", 7))
    assert engine.value("kv_blocks_reserved") == 0
    assert engine.core.step()
    assert engine.value("batch_size_sum") == 2
    assert engine.value("tokens_total") == 2
    assert engine.value("step_seconds_count") == 1
    assert engine.value("kv_blocks_used") == 7
    assert engine.value("kv_blocks_free") == 1
    for _ in range(4):
        engine.core.step()
    assert engine.value("preemptions_total") == 1
    engine.core.handle(Release("b"))
    engine.core.handle(Release("a"))
    engine.reserve("d", 64)
    assert engine.value("refusals_total", "blocks") == 1
    assert engine.value("prefix_tokens_total", "miss") == 26


def test_lost_blocks_are_exported():
    engine = Engine()
    assert engine.value("kv_blocks_leaked") == 0
    lost = engine.pool.acquire("nobody", 2)
    assert engine.value("kv_blocks_leaked") == 2
    engine.pool.release("nobody", lost)
    assert engine.value("kv_blocks_leaked") == 0


def test_no_name_is_declared_twice():
    names = [spec.name for spec in declared()]
    assert len(names) == len(set(names))


def test_refusals_by_reason():
    metrics = RouterMetrics()
    with pytest.raises(errors.Overloaded) as full:
        Admission(max_queue=1).check(waiting=1, ahead=1, now=0.0, deadline=None)
    for error in (full.value, errors.PromptTooLong("prompt", "is long"), errors.Unavailable("x")):
        metrics.refused(error, "default", "chat")
    refusals = values(metrics, "overfill_router_refusals_total")
    assert {labels for labels, count in refusals.items() if count} == {
        (reason, "default") for reason in ("queue_full", "too_long", "other")
    }
    metrics.prefill_again(decode_pb2.NeedPrefill.REASON_PREFILL_REFUSED)
    metrics.attempt_failed(errors.TransferFailed("x"))
    assert values(metrics, "overfill_router_prefill_again_total")["refused",] == 1
    assert values(metrics, "overfill_router_failed_attempts_total")["transfer_failed",] == 1


def test_each_revision_has_its_requests_and_needs():
    metrics = RouterMetrics(revisions=("r1", "r2"))
    metrics.ended(None, "default", "chat", "r1")
    metrics.ended(None, "default", "grpc", "r2")
    metrics.ended(None, "default", "chat", "r2")
    metrics.refused(errors.Unavailable("x"), "default", "chat", "r2")
    metrics.refused(errors.InvalidRequest("field", "x"), "", "chat", None)
    of_revisions = values(metrics, "overfill_router_revision_requests_total")
    assert {labels: count for labels, count in of_revisions.items() if count} == {
        ("ok", "r1"): 1,
        ("ok", "r2"): 2,
        ("unavailable", "r2"): 1,
    }
    requests = values(metrics, "overfill_router_requests_total")
    assert requests["chat", "ok", "default"] == 2
    assert sum(requests.values()) == 5
    for revision, ready in (("r1", 3), ("r2", 1)):
        scaler = Scaler(ScalingConfig(), {"default": ScalingConfig()})
        metrics.scaling(scaler.targets(0.0, PoolState(ready=ready), {"default": PoolState(ready=ready)}), revision)
    targets = values(metrics, "overfill_router_scaling_target_workers")
    assert (targets["r1", "prefill", ""], targets["r2", "prefill", ""]) == (3, 1)


def test_inputs_needs_and_decisions_of_the_scaling_policy_are_exported():
    metrics = RouterMetrics(("full", "fast"))
    scaler = Scaler(ScalingConfig(), {"full": ScalingConfig(), "fast": ScalingConfig()})
    ready = PoolState(ready=1)
    pools = {"full": ready, "fast": ready}
    metrics.scaling(scaler.targets(0.0, ready, pools))
    one_each = {("", "prefill", ""): 1, ("", "decode", "full"): 1, ("", "decode", "fast"): 1}
    assert values(metrics, "overfill_router_scaling_target_workers") == one_each
    queued = PoolState(ready=1, waiting_jobs=500, waiting_tokens=500_000)
    metrics.scaling(scaler.targets(1.0, queued, pools | {"full": PoolState(ready=1, running=200)}))
    targets = values(metrics, "overfill_router_scaling_target_workers")
    assert targets["", "prefill", ""] > 1
    assert (targets["", "decode", "full"], targets["", "decode", "fast"]) == (4, 1)
    metrics.router_need(1.5)
    needed = values(metrics, "overfill_router_scaling_needed_workers")
    assert needed["", "prefill", ""] > 1
    assert needed["", "router", ""] == 1.5
    assert values(metrics, "overfill_router_scaling_input")["waiting_tokens", "", "prefill", ""] == 500_000
    decisions = values(metrics, "overfill_router_scaling_decisions_total")
    assert decisions["up", "prefill", ""] == decisions["up", "decode", "full"] == 1
    assert decisions["up", "decode", "fast"] == decisions["down", "prefill", ""] == 0
    lost = values(metrics, "overfill_router_workers_lost_total")
    assert lost == {("prefill", ""): 0, ("decode", "full"): 0, ("decode", "fast"): 0}, "a rate needs the first value"
