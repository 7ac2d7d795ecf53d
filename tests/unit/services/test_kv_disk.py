"""A worker whose folder for KV cannot be used serves without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overfill.settings.config import PrefillConfig
from services.prefill.kv_disk import open_disk
from tests.support.disk_workers import BLOCK, SMALL, Counts, DiskWorker, identity_of, random_store, until_known


async def opened(*flags: str, counts: Counts) -> Any:
    served: Any = SimpleNamespace(kv_identity=identity_of(), store=random_store(SMALL, 8, BLOCK, 0), device=None)
    config = PrefillConfig.parse(["--pair", "p", *flags])

    @asynccontextmanager
    async def lend(prompt: object) -> AsyncIterator[Any]:
        raise AssertionError("nothing is saved")
        yield

    return open_disk(config, served, lend, counts)


async def test_without_a_folder_there_is_no_disk() -> None:
    assert await opened(counts=Counts()) is None


async def test_what_the_folder_has_is_known_soon(tmp_path: Path) -> None:
    worker = DiskWorker(tmp_path / "kv")
    worker.tier.start()
    prompt = worker.prompt()
    await worker.save(prompt)
    await worker.close()
    tier = await opened(f"--kv-disk={tmp_path / 'kv'}", counts=Counts())
    await until_known(tier, prompt, 8)
    await tier.close()


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("open", [], "with mode 0700"),
        ("file", [], "exists"),
        ("small", ["--kv-disk-size=4000"], "--kv-disk-size 4000 is less than"),
    ],
)
async def test_a_folder_that_cannot_be_used_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, flags: list[str], reason: str
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    counts = Counts()
    assert await opened(f"--kv-disk={tmp_path / name}", *flags, counts=counts) is None
    assert "KV is not kept on disk" in caplog.text
    assert reason in caplog.text
    await counts.until(lambda number: number["folder failed"] == 1)
