// Threads that run one function together, and the barrier between its phases. Waiting threads spin briefly, then sleep.
#pragma once
#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace ovf {

// Waits until `value` is no longer `old`. Spins first, because a sleep costs two context switches; then sleeps, so that
// others can use the core.
inline void wait_change(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < 4000; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        _mm_pause();
    }
    value.wait(old, std::memory_order_acquire);
}

class Barrier {
  public:
    void reset(int count) { count_ = count; }

    void wait() {
        if (count_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
        } else {
            wait_change(phase_, phase);
        }
    }

  private:
    int count_ = 1;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

// A pool of the calling thread and `threads - 1` others. One call may run at a time.
class Pool {
  public:
    Barrier barrier;

    ~Pool() { stop(); }

    // Calls `job(thread, threads)` on every thread and returns when all have returned.
    template <class Job>
    void run(int threads, Job& job) {
        if (threads != size() || pid_ != getpid()) resize(threads);
        barrier.reset(threads);
        if (threads > 1) {
            call_ = [](void* data, int thread, int count) { (*static_cast<Job*>(data))(thread, count); };
            data_ = &job;
            epoch_.fetch_add(1, std::memory_order_release);
            epoch_.notify_all();
        }
        job(0, threads);
        barrier.wait();
    }

  private:
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void resize(int threads) {
        if (pid_ != getpid()) {  // after a fork, the threads exist in the parent only
            for (auto& worker : workers_) worker.detach();
            workers_.clear();
            pid_ = getpid();
        }
        stop();
        ending_ = false;
        const uint32_t epoch = epoch_.load();
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i, threads, epoch] { work(i, threads, epoch); });
    }

    void stop() {
        ending_ = true;
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    void work(int index, int threads, uint32_t epoch) {
        for (;;) {
            wait_change(epoch_, epoch);
            ++epoch;
            if (ending_) return;
            call_(data_, index, threads);
            barrier.wait();
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<bool> ending_{false};
    void (*call_)(void*, int, int) = nullptr;
    void* data_ = nullptr;
    pid_t pid_ = getpid();
    alignas(64) std::atomic<uint32_t> epoch_{0};
};

}  // namespace ovf
