"""``overfill pair``: its output, and the options that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from overfill.cli.pair import pair_group
from overfill.model.pair_files import load_whole


def invoke_pair(*arguments: str) -> Any:
    return CliRunner().invoke(pair_group, arguments)


def test_pair_path_prints_only_the_folder(tiny_pair: Path) -> None:
    result = invoke_pair("path", str(tiny_pair))
    assert result.stdout == f"{tiny_pair}\n"


@pytest.mark.parametrize(("size", "expected"), [("0.5", 64), ("44", 44), ("1.0", 128)])
def test_pair_build_takes_a_number_or_a_share(size: str, expected: int, tiny_pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    sizes = ("--intermediate-size", size, "--tokens", "2000")
    result = invoke_pair("build", "--full", str(tiny_pair / "full"), *sizes, "--out", str(out))
    assert result.stdout == f"{out}\n", result.output
    assert load_whole(out, digests=True).decoder_config.intermediate_size == expected
    said = result.stderr.splitlines()
    (agreement,) = [line for line in said if line.startswith("agreement")]
    assert "100 %" in agreement if size == "1.0" else "16 answers that SmolLM2-135M-Instruct wrote" in agreement
    assert any(line.startswith("size") and " MB" in line for line in said)
    slow = "overfill: warning: MLP size 44: GPUs multiply slowly unless a size is a multiple of 8; those of 64 are best"
    assert (slow in said) is (size == "44")
    assert [line.split("  ")[-1].strip() for line in said[-2:]] == [
        f"overfill up --pair {out}",
        f"overfill pair eval {out}",
    ]
    assert not set(result.stderr) & set("\r\x1b"), "lines and no bars, since this is no terminal"
