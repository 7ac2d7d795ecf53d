"""Tests that memory which a process has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from overfill.process.heap import Heap
heap = Heap()
assert not heap.has_grown()
pieces = [bytes(50_000) for _ in range(2_000)]  # 100 MB, in pieces that glibc keeps in its heap
assert heap.has_grown()
last = bytes(50_000)  # at the top of the heap, which glibc then keeps below it
del pieces
before = heap._resident()
heap.trim()
print(before - heap._resident())
assert not heap.has_grown()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50 << 20
