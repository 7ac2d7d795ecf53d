"""Tests that the kernels' thread pool may run each job with another number of threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from overfill.model.native import library
from overfill.process.compiled import FLAGS

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# Some threads sleep right after they have added to a counter, which is where preemption by another process does harm.
PROGRAM = """
#include <immintrin.h>
#include <unistd.h>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

struct Preempted {};
static int operator+(int value, Preempted) {
    static std::atomic<unsigned> calls{0};
    if (calls++ % 5 < 2) usleep(200);
    return value;
}
#define fetch_add(...) fetch_add(__VA_ARGS__) + Preempted{}
#include "pool.h"
#undef fetch_add

int main() {
    constexpr int CALLERS = 2, PHASES = 3;
    ovf::Pool pools[2];
    std::mutex busy[2];
    std::atomic<bool> wrong{false};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < CALLERS; ++caller)
        callers.emplace_back([&, caller] {
            for (int i = caller; i < 300 + caller; ++i) {
                const int threads[] = {3, 1, 2, 4, 2};
                ovf::Pool& pool = pools[i % 2];
                std::lock_guard<std::mutex> alone(busy[i % 2]);
                std::atomic<int> arrived[PHASES]{};
                auto job = [&](int, int count) {
                    for (auto& phase : arrived) {
                        ++phase;
                        pool.barrier.wait();
                        if (phase != count) wrong = true;
                    }
                };
                pool.run(threads[i % 5], job);
                if (arrived[0] != threads[i % 5]) wrong = true;
            }
        });
    for (auto& caller : callers) caller.join();
    return wrong;
}
"""


def test_a_job_may_use_fewer_or_more_threads_than_the_last_one(tmp_path: Path) -> None:
    source, program = tmp_path / "pool.cpp", tmp_path / "pool"
    source.write_text(PROGRAM)
    flags = [flag for flag in FLAGS if flag not in ("-fPIC", "-shared")]
    include = f"-I{library.SOURCE.parent}"
    subprocess.run(["c++", *flags, include, str(source), "-o", str(program)], check=True, timeout=120)
    subprocess.run([program], check=True, timeout=60)
