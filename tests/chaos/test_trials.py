"""Workers break under load: every answer comes and is right, and nothing is left behind.

Short forms of ``overfill chaos``, which docs/reliability.md quotes at full length.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from overfill.cli.up import make_plan
from overfill.pair.progress import silent
from overfill.pair.reference import TwoStageReference
from overfill.testing.chaos import FaultName, Trial, run_trial

SETTINGS = {"dtype": "float32", "kv_memory": "4MiB", "max_model_len": "512", "grace_period": 2, "log_level": "error"}


@pytest.mark.parametrize(
    "fault",
    [
        "kill",
        pytest.param("drain", marks=pytest.mark.slow),
        pytest.param("freeze", marks=pytest.mark.slow),
        pytest.param("partition", marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_right_whatever_befalls_the_workers(tiny_pair: Path, fault: FaultName) -> None:
    plan = make_plan(tiny_pair, 2, 2, 1, 0, 1, SETTINGS)
    prompts = [[20 + (7 * i * (seed + 3)) % 470 for i in range(30 + seed)] for seed in range(8)]
    trial = Trial(fault, prompts, requests=40, hits=2, streams=8, max_tokens=48, pause=1.5, down=12.0, limit=60.0)
    result = asyncio.run(run_trial(plan, trial, silent))
    summary = result.judge(TwoStageReference(tiny_pair), silent)
    assert result.errors == []
    assert summary.passed, str(summary)
    assert result.hits >= 2
    if fault != "drain":  # where answers may finish first
        assert result.migrations > 0 or result.strikes["decode"] == 0
    assert result.freed_after is not None
    assert result.freed_after < 2.0
    assert result.leaked == []
    assert result.unclean_exits == []
