"""Kills a disk tier in the middle of writes, again and again, and looks at what each one has left.

As a program, ``python -m tests.support.killed_writers FOLDER ROUNDS`` prints what it has found, as JSON. Each round
forks a process that saves prompts as fast as it can in a folder that is too small for them. It kills that process at a
random moment and reads every file. The program has one thread, so that it may fork.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from overfill.errors import TransferFailed
from overfill.kv.disk_files import DiskFiles
from overfill.kv.disk_format import BlockFormat
from overfill.kv.keys import PromptBlocks, root_key
from overfill.kv.spec import KvSpec, RopeSpec
from tests.support.disk_workers import DiskWorker, equal_blocks, identity_of, random_store

KV = KvSpec(32, 8, 64, "float32", RopeSpec())
BLOCK_SIZE = 16
BLOCKS = 4  # of a prompt
FIRST = range(0, 64_000, 1000)
"""First tokens of the prompts."""
SIZE = 40 * ((1 << 21) + (1 << 12))
"""Bytes of the folder: for 40 of the 256 blocks, each of 2 MiB."""


def worker(folder: Path, seed: int = 0) -> DiskWorker:
    return DiskWorker(folder, identity=identity_of(KV), block_size=BLOCK_SIZE, num_blocks=BLOCKS, size=SIZE, seed=seed)


async def save_for_ever(folder: Path, started: int) -> None:
    """Saves prompts until this process is killed, and says on the pipe ``started`` that it has written one."""
    saver = worker(folder)
    saver.tier.start()
    prompts = [saver.prompt(first, BLOCKS) for first in FIRST]
    for prompt in prompts:  # some of them are not in the folder
        saver.tier.save(prompt)
    await saver.counts.until(lambda counted: counted["written"])
    os.write(started, b".")
    while True:
        saver.tier.save(random.choice(prompts))
        await asyncio.sleep(0.001)  # more than it can write


def kill_one(folder: Path) -> None:
    """Starts a process that saves, and kills it once it has written something."""
    reading, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(save_for_ever(folder, started))
        finally:
            os._exit(1)
    os.close(started)
    assert os.read(reading, 1), "the process has ended"
    os.close(reading)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def look(folder: Path, prompts: list[PromptBlocks]) -> Counter[str]:
    """Reads every file, as a worker that starts does, and compares its KV with what was saved."""
    found: Counter[str] = Counter()
    saved, read = random_store(KV, BLOCKS, BLOCK_SIZE, 0), random_store(KV, BLOCKS, BLOCK_SIZE, 1)
    files, known = DiskFiles(folder), BlockFormat(identity_of(KV), read)
    named = {name: index for prompt in prompts for index, name in enumerate(known.names(prompt, BLOCKS))}
    for block in files.scan():
        content = files.read(block.name, known.max_bytes)
        assert content is not None
        index = named[block.name]
        read.k[:, index] = 0
        try:
            known.place(block.name, index, content, list(range(BLOCKS)))
            found["whole" if index in equal_blocks(saved, read) else "wrong"] += 1
        except TransferFailed:
            found["damaged"] += 1
        found["bytes"] += block.num_bytes
    return found


def main(folder: Path, rounds: int) -> None:
    random.seed(rounds)
    root = root_key(identity_of(KV).cache_key, "")
    tokens = BLOCKS * BLOCK_SIZE
    prompts = [PromptBlocks(list(range(first, first + tokens)), BLOCK_SIZE, root, "") for first in FIRST]
    total: Counter[str] = Counter()
    for _ in range(rounds):
        kill_one(folder)
        others = [path.name for path in folder.iterdir() if path.is_file()]
        found = look(folder, prompts)
        total += found
        total["unfinished"] += "writer-0.part" in others
        total["most bytes"] = max(total["most bytes"], found["bytes"])
        total["most others"] = max(total["most others"], len(others))
    print(json.dumps({"size": SIZE, "rounds": rounds, **total}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
