// Memory in huge pages for arrays that live equally long.
#pragma once
#include <sys/mman.h>

#include <new>

#include "simd.h"

namespace ovf {

// Memory for arrays that live as long as the arena. It is one mapping in huge pages, if the system has them, because a
// step reads all of it and would otherwise miss the TLB every 4 KiB.
class Arena {
  public:
    explicit Arena(size_t bytes) : size_(round_up(bytes + 64, 1 << 21)) {
        base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        madvise(base_, size_, MADV_HUGEPAGE);
    }
    Arena(const Arena&) = delete;
    ~Arena() { munmap(base_, size_); }

    template <class T>
    T* allocate(size_t count) {
        char* start = base_ + used_;
        used_ += round_up(count * sizeof(T), 64);
        return reinterpret_cast<T*>(start);
    }
    static size_t rounded(size_t bytes) { return round_up(bytes, 64); }

  private:
    char* base_;
    size_t size_, used_ = 0;
};

}  // namespace ovf
