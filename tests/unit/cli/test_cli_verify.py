"""Tests the checks by which ``verify`` decides, before its first prompt, whether it can judge a stack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from overfill.cli.verify import CannotVerify, check_stack


def worker(worker_id: str, stage: str, **changes: Any) -> SimpleNamespace:
    model = SimpleNamespace(
        full_digest="f", tokenizer_digest="t", decoder_digest="d", decoder_quantize="", kv_cache_dtype=""
    )
    process = SimpleNamespace(id=worker_id, kv=SimpleNamespace(dtype="float32"), model=model, codec="raw")
    return SimpleNamespace(
        **{"id": worker_id, "stage": stage, "process": process, "tier": None, "revision": ""} | changes
    )


def pair(decoder: str = "d", quantize: str = "none") -> Any:
    return SimpleNamespace(
        full_digest="f", tokenizer_digest="t", decoder_digest=decoder, quantize=quantize, folder=f"pair-{decoder}"
    )


def test_a_silent_worker_is_named_since_it_may_run_anything() -> None:
    workers = [worker("prefill-0", "prefill"), worker("decode-0", "decode"), worker("decode-1", "decode")]
    status: Any = SimpleNamespace(workers=workers)
    check_stack(status, [{"default": pair()}])
    workers[2].process = None
    with pytest.raises(CannotVerify, match=r"decode-1 does not answer") as caught:
        check_stack(status, [{"default": pair()}])
    assert caught.value.exit_code == 2


def test_a_worker_with_both_stages_is_checked_as_each_and_named_once() -> None:
    both = [worker("worker-0", "prefill"), worker("worker-0", "decode", tier="full")]
    status: Any = SimpleNamespace(workers=[*both, worker("decode-0", "decode", tier="fast")])
    pairs = {"fast": pair(), "full": pair("another")}
    with pytest.raises(CannotVerify, match="worker-0 runs another pair than pair-another"):
        check_stack(status, [pairs])
    both[1].process.model.decoder_digest = "another"
    check_stack(status, [pairs])
    both[0].process = both[1].process = None
    with pytest.raises(CannotVerify, match=r"^worker-0 does not answer"):
        check_stack(status, [pairs])


def test_an_int8_decoder_is_another_pair_than_the_unquantised_one() -> None:
    pairs = {"default": pair(quantize="int8")}
    workers = [worker("prefill-0", "prefill"), worker("decode-0", "decode")]
    with pytest.raises(CannotVerify, match=r"decode-0 runs another pair .*quantisation differ"):
        check_stack(SimpleNamespace(workers=workers), [pairs])  # type: ignore[arg-type]
    workers[1].process.model.decoder_quantize = "int8"
    check_stack(SimpleNamespace(workers=workers), [pairs])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("kv", "dtype", "bfloat16", "d-0 runs in bfloat16, raw codec; answers can be verified only in float32"),
        ("", "codec", "int8", "d-0 runs in float32, int8 codec; .* with the raw codec"),
        ("model", "kv_cache_dtype", "int8", "d-0 runs in float32, raw codec, with a KV cache in int8"),
    ],
)
def test_a_worker_whose_answers_are_not_exact_is_not_judged(part: str, name: str, value: str, says: str) -> None:
    workers = [worker("p-0", "prefill"), worker("d-0", "decode")]
    process = workers[1].process
    setattr(getattr(process, part) if part else process, name, value)
    with pytest.raises(CannotVerify, match=says) as caught:
        check_stack(SimpleNamespace(workers=workers), [{"default": pair()}])  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def tiers(full: str = "f", fast: str = "d", tier: str = "fast") -> Any:
    """Returns the status of a stack with a worker of the tier full and one of another, with these decoders."""
    workers = [worker("p-0", "prefill"), worker("d-0", "decode", tier="full"), worker("d-1", "decode", tier=tier)]
    workers[1].process.model.decoder_digest, workers[2].process.model.decoder_digest = full, fast
    return SimpleNamespace(workers=workers)


def test_every_decode_worker_must_run_the_decoder_of_its_tier() -> None:
    pairs = {"full": pair("f"), "fast": pair("d")}
    check_stack(tiers(), [pairs])
    for wrong in (tiers("d", "f"), tiers(fast="f")):
        with pytest.raises(CannotVerify, match=r"d-\d runs another pair than pair-. \(decoder differ\)"):
            check_stack(wrong, [pairs])


def test_the_tiers_of_the_stack_and_those_of_the_command_must_be_the_same() -> None:
    pairs = {"full": pair("f"), "fast": pair("d")}
    named = "name the pair of every tier, --tier cheap=PAIR --tier full=PAIR"
    with pytest.raises(CannotVerify, match=f"the pair of tier 'cheap' is unknown: {named}"):
        check_stack(tiers(tier="cheap"), [pairs])
    with pytest.raises(CannotVerify, match="no decode worker of tier 'new'"):
        check_stack(tiers(), [pairs | {"new": pair()}])
    with pytest.raises(CannotVerify, match="the pair of tier 'fast' is unknown"):
        check_stack(tiers(), [{"default": pair()}])


def test_each_revision_has_workers_of_one_of_the_pairs() -> None:
    def stack(new: str) -> Any:
        workers = [worker("p1", "prefill"), worker("d1", "decode")]
        workers += [worker("p2", "prefill", revision="r2"), worker("d2", "decode", revision="r2")]
        workers[3].process.model.decoder_digest = new
        return SimpleNamespace(workers=workers)

    pairs = [{"default": pair()}, {"default": pair("new")}]
    assert check_stack(stack("new"), pairs) == {"": 0, "r2": 1}
    with pytest.raises(CannotVerify, match=r"'r2': d2 runs another pair than pair-d .*; d2 .* than pair-new"):
        check_stack(stack("other"), pairs)
    with pytest.raises(CannotVerify, match="--canary-pair"):
        check_stack(stack("new"), pairs[:1])
