"""The memory bench answers what it says and judges growth, not warm-up."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from overfill.lab.bench.memory import MIB, MemoryRun, measure_memory
from overfill.lab.commands.bench import bench_group


def test_growth_is_what_comes_after_the_warm_up() -> None:
    done = list(range(64, 64 * 101, 64))
    flat = MemoryRun(done, [(200 if d < 640 else 300) * MIB for d in done])
    leaking = MemoryRun(done, [300 * MIB + d * 1000 for d in done])
    assert flat.growth == 0
    assert leaking.growth > 4 * MIB


def test_every_request_is_answered_and_sampled(tiny_pair: Path) -> None:
    heard: list[int] = []
    run = measure_memory(tiny_pair, 130, 1, heard.append)
    assert run.requests == heard == [64, 128, 130]
    assert all(size > MIB for size in run.resident)


def test_the_command_draws_and_tells(tiny_pair: Path, tmp_path: Path) -> None:
    arguments = ["memory", "--pair", str(tiny_pair), "--requests", "640", "--threads", "1", "--allowed", "1000"]
    result = CliRunner().invoke(bench_group, [*arguments, "--plot", str(tmp_path / "m.png")], standalone_mode=False)
    assert result.exception is None
    assert result.return_value == 0
    assert "memory_growth" in result.output
    assert (tmp_path / "m.png").stat().st_size > 1000
