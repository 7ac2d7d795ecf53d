"""The links of ``overfill bench links``, and the physical bounds beside its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from overfill.lab.bench.links.measure import LINKS, LinkResult
from overfill.lab.commands.bench_links import links_command


def test_the_command_offers_every_link():
    (option,) = [option for option in links_command.params if option.name == "links"]
    assert list(option.type.choices) == list(LINKS)


def test_bounds_are_bytes_by_rate_less_the_prefill_and_the_delays():
    result = LinkResult(
        "bad", "raw", 512, False, ttft=0.4, prefill=0.3, exposed=1.0, kv_bytes=12_500_000, broken_streams=0
    )
    assert result.transfer == pytest.approx(1.02)
    assert result.least_exposed == pytest.approx(0.7)
    assert result.least_ttft == pytest.approx(0.34)
    figures = {one.name: one for one in result.measurements()}
    assert figures["bad_raw_512_exposed"].value == 1000
    assert figures["bad_raw_512_exposed"].peer_value == pytest.approx(700)


def test_a_prefill_longer_than_the_transfer_hides_it():
    result = LinkResult(
        "plain", "int8", 512, False, ttft=0.4, prefill=0.3, exposed=0.0, kv_bytes=6_000_000, broken_streams=0
    )
    assert result.least_exposed == 0.0


def test_the_guide_describes_every_link():
    text = (Path(__file__).parents[4] / "docs" / "project" / "methodology.md").read_text(encoding="utf-8")
    assert [name for name in LINKS if f"`{name}`" not in text] == []
