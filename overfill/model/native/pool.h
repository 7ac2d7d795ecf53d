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

// Where the threads of a job wait for each other.
class Barrier {
  public:
    void reset(int count) { count_ = count; }

    void wait() {
        // Reads `count_` before it arrives: once all have arrived, the caller may reset the barrier for the next job, and
        // a slow thread of this job would compare its arrival with the new count.
        const int count = count_;
        if (count == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            // Sequentially consistent, because notify_all first looks whether anyone sleeps. A weaker store may take
            // effect after that look, when another thread has already found the old phase and fallen asleep.
            phase_.store(phase + 1);
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

// The calling thread and others, which are started when a job first needs them and then kept: a job that uses fewer of
// them lets the rest sleep. Starting a thread costs more than a short step. One call may run at a time.
class Pool {
  public:
    Barrier barrier;

    ~Pool() {
        ending_ = true;
        for (auto& worker : workers_) worker->wake();
        for (auto& worker : workers_) worker->thread.join();
    }

    // Calls `job(thread, threads)` on `threads` threads and returns when all have returned.
    template <class Job>
    void run(int threads, Job& job) {
        start(threads);
        barrier.reset(threads);
        call_ = [](void* data, int thread, int count) { (*static_cast<Job*>(data))(thread, count); };
        data_ = &job, threads_ = threads;
        for (int i = 1; i < threads; ++i) workers_[i - 1]->wake();
        job(0, threads);
        barrier.wait();
    }

  private:
    struct alignas(64) Worker {
        std::atomic<uint32_t> jobs{0};  // that it was woken for
        std::thread thread;

        void wake() {
            jobs.fetch_add(1);
            jobs.notify_one();
        }
    };

    // Starts the threads that are missing.
    void start(int threads) {
        if (pid_ != getpid()) {  // after a fork, the threads exist in the parent only
            for (auto& worker : workers_) worker->thread.detach();
            workers_.clear();
            pid_ = getpid();
        }
        for (int i = static_cast<int>(workers_.size()) + 1; i < threads; ++i) {
            workers_.push_back(std::make_unique<Worker>());
            workers_.back()->thread = std::thread([this, i, &worker = *workers_.back()] { work(worker, i); });
        }
    }

    void work(const Worker& worker, int index) {
        for (uint32_t done = 0;; ++done) {
            wait_change(worker.jobs, done);
            if (ending_) return;
            call_(data_, index, threads_);
            barrier.wait();
        }
    }

    std::vector<std::unique_ptr<Worker>> workers_;
    std::atomic<bool> ending_{false};
    void (*call_)(void*, int, int) = nullptr;
    void* data_ = nullptr;
    int threads_ = 1;
    pid_t pid_ = getpid();
};

}  // namespace ovf
