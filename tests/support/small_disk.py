"""Saves and reads KV on a file system with room for a few blocks, and on one that is mounted read-only.

As a program, it needs a mount namespace of its own: ``unshare --mount --map-root-user python -m
tests.support.small_disk FOLDER`` mounts the file system on FOLDER and prints what it has found, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from tests.support.disk_workers import DiskWorker, until_known


async def on_full_disk(folder: Path) -> dict[str, object]:
    worker = DiskWorker(folder)
    worker.tier.start()
    prompt = worker.prompt()
    worker.tier.save(prompt)
    await worker.counts.until(lambda number: number["write failed"])
    read = await worker.read(prompt)
    await worker.close()
    return {"written": worker.counts.number["written"], "read": read}


async def on_read_only(folder: Path, written: int) -> dict[str, object]:
    worker = DiskWorker(folder, seed=1)
    worker.tier.start()
    prompt = worker.prompt()
    await until_known(worker.tier, prompt, written)
    read = await worker.read(prompt)
    worker.tier.save(worker.prompt(100))
    await worker.counts.until(lambda number: number["write failed"])
    again = await worker.read(prompt)
    await worker.close()
    return {"read": read, "again": again}


def main(mount: Path) -> None:
    folder = mount / "kv"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", mount], check=True)
    full = asyncio.run(on_full_disk(folder))
    full["unfinished"] = len(list(folder.glob("*.part")))
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    read_only = asyncio.run(on_read_only(folder, int(str(full["written"]))))
    print(json.dumps({"full": full, "read only": read_only}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
