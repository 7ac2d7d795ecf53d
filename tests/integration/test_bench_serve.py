"""Tests ``overfill bench serve`` against a running stack over gRPC."""

from __future__ import annotations

import json

from click.testing import CliRunner
from stacks import running_stack

from overfill.lab.commands.bench import bench_group


def test_a_stack_under_load_gives_every_token(tiny_pair):
    with running_stack(tiny_pair) as (_, address):
        arguments = ["serve", f"--target=stack=grpc://{address}", "--requests=6", "--arrivals=burst", "--json"]
        arguments += ["--prompt-tokens=20", "--output-tokens=9", "--vocab-size=512", "--objective=ttft=100"]
        result = CliRunner().invoke(bench_group, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    found = {row["name"]: row["value"] for row in map(json.loads, result.stdout.splitlines())}
    assert found["failed"] == 0
    assert found["attainment"] == 1
    assert abs(found["output_tokens"] / found["requests"] - 9) < 0.05
