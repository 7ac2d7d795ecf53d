"""Who wrote an answer, and in which times: the part of every API's responses that is this system's own."""

from __future__ import annotations

from typing import Any

from overfill.request.names import CODEC_NAMES, TTFT_PARTS, cached_by_source
from overfill.v1 import inference_pb2

_TIMES: tuple[tuple[str, Any], ...] = tuple(
    (f"{name}_ms", f"{name}_ns")
    for name in (
        "ttft",
        *TTFT_PARTS,
        "handoff_exposed",
        "decode",
        "total",
    )
)
"""Durations of an answer: the name in the response, and the field of ``Timing``."""


def answer_report(finished: inference_pb2.Finished, seed: int, brownout_from: str) -> dict[str, Any]:
    """Describes an answer that has ended: tiers, workers, cached tokens, migrations, seed, and times in milliseconds.

    Args:
        brownout_from: as in ``Accepted``.
    """
    timing = finished.timing
    return {
        "tier": finished.parts[-1].tier if finished.parts else None,
        "parts": [{"tier": part.tier, "first_index": part.first_index} for part in finished.parts],
        "brownout_from": brownout_from or None,
        "prefill_worker": finished.prefill_worker,
        "decode_worker": finished.decode_worker,
        "prefill_engine": finished.prefill_engine or None,
        "decode_engine": finished.decode_engine or None,
        "cached_tokens": cached_by_source(finished.usage),
        "migrations": finished.migrations,
        "codec": CODEC_NAMES.get(finished.codec),
        "seed": seed,
        "stop": finished.stop or None,
        "timing": {
            name: round(getattr(timing, field) / 1e6, 3) if timing.HasField(field) else None for name, field in _TIMES
        },
    }
