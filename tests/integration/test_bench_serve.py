"""Tests ``overfill bench serve`` against a running stack over gRPC."""

from __future__ import annotations

import json

from click.testing import CliRunner
from stacks import running_stack

from overfill.lab.commands.bench import bench_group


def test_one_process_gives_every_token_that_a_stack_gives(tiny_pair):
    with running_stack(tiny_pair) as (_, address):
        arguments = ["serve", f"--target=stack=grpc://{address}", f"--target=one=colocated:{tiny_pair}", "--json"]
        arguments += ["--requests=6", "--rate=50", "--prompt-tokens=20", "--output-tokens=9", "--vocab-size=512"]
        result = CliRunner().invoke(
            bench_group, [*arguments, "--threads=1", "--objective=ttft=100"], standalone_mode=False
        )
    assert result.exception is None, result.exception
    found = {row["name"]: (row["value"], row["peer_value"]) for row in map(json.loads, result.stdout.splitlines())}
    assert found["failed"] == (0, 0)
    assert found["attainment"] == (1, 1)
    for place in (0, 1):
        assert abs(found["output_tokens"][place] / found["requests"][place] - 9) < 0.05
