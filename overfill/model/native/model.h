// A model's weights in the kernels' layout, and the memory that a step needs.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "span_amx.h"
#include "span_int8.h"

extern "C" {

// Matches `_Shape` in native/library.py.
struct OvfShape {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions;
    int64_t head_tokens, tail_rank;  // rows of the head, and the rank of the product that the other tokens' rows are
    int64_t quantised;
    int64_t amx;  // whether AMX tiles may be used where there are any
    double norm_eps;
};

// What a step computes: `ForwardBatch`, as pointers. Matches `_Batch` in native/library.py.
struct OvfBatch {
    int64_t tokens, sequences, tables, table_width, wanted, block_size, slots_in_cache, threads;
    const int64_t *token_ids, *positions, *slots;              // [tokens]
    const int64_t *query_lens, *context_lens, *block_tables;   // [sequences], [sequences], [tables, table_width]
    const int64_t* table_rows;                                 // [sequences], rows of block_tables; null: 0, 1, 2, ...
    const int64_t* wanted_rows;                                // [wanted]
    void *k_cache, *v_cache;                                   // [layers, slots, kv_heads, head_dim], bf16 or int8
    float *k_scales, *v_scales;                                // [layers, slots, kv_heads]; null: the cache is bf16
    float* logits;                                             // [wanted, vocab], or null
    int64_t* best;                                             // [wanted], the most likely token, or -1; or null

    int64_t table_row(size_t sequence) const { return table_rows ? table_rows[sequence] : sequence; }
    const int64_t* table(size_t sequence) const { return block_tables + table_row(sequence) * table_width; }
};

// Called with (layer, 0) before a layer and with (layer, 1) once its keys and values are in the cache. Not 0: give up.
typedef int (*OvfHook)(int64_t layer, int64_t written);
}

namespace ovf {

// Memory for arrays that live as long as their owner: one mapping, in huge pages where the system has them, since a
// step reads all of it and would otherwise miss the address cache every 4 KiB.
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
    T* take(size_t count) {
        char* start = base_ + used_;
        used_ += round_up(count * sizeof(T), 64);
        return reinterpret_cast<T*>(start);
    }
    static size_t rounded(size_t bytes) { return round_up(bytes, 64); }

  private:
    char* base_;
    size_t size_, used_ = 0;
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    // float32; null where the model has none. Biases are padded to whole panels; gate_up's lies as its rows do.
    float *input_norm, *post_norm, *qkv_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr, *o_bias = nullptr,
                                   *gate_up_bias = nullptr, *down_bias = nullptr;
};

// A stretch of one new token's context, for one thread.
struct SpanItem {
    size_t row, sequence, first, last, partial;
};

// Queries of one sequence and KV head, for one thread; `count` 0: tokens first.. are to be packed.
struct TileItem {
    size_t row, sequence, kv_head, first, count, seen;
};

// What a step needs besides the weights, kept from step to step: fresh memory costs page faults.
struct Workspace {
    std::unique_ptr<Arena> room, attention_room;
    size_t tokens = 0, wanted = 0, room_bytes = 0, packed_elements = 0, partial_count = 0;
    int threads = 0;
    size_t normed_stride = 0, attended_stride = 0, gated_stride = 0, hidden_stride = 0, qkv_stride = 0;
    float *hidden, *qkv, *attention, *gated_wide, *scales, *partials, *logit_scales;
    uint16_t *normed, *attended, *gated, *last;
    bf16 *q, *packed;
    TileScratch* tiles;
    SpanScratch* span_scratch;
    __m512* best;        // [threads][wanted], of every sixteenth token
    __m512i* best_ids;   // [threads][wanted]
    uint8_t* broken;     // [threads][wanted]
    std::vector<SpanItem> spans;
    std::vector<size_t> span_start;  // of every row, where its spans begin; [tokens + 1]
    std::vector<TileItem> packs, tiles_todo;
    std::vector<size_t> packed_at;  // of every sequence
};

struct Model {
    OvfShape shape;
    AttentionShape attention;
    std::vector<Layer> layers;
    Matrix head;                   // [head_tokens, hidden]
    Matrix tail_right, tail_left;  // [tail_rank, hidden], [vocab - head_tokens, tail_rank]
    float* norm;
    const bf16* embedding = nullptr;  // [vocab, hidden]; null: read from the head, to which it is tied
    const int32_t* order = nullptr;   // [vocab], the tokens of the rows of head and then tail_left; null: by id
    const float *cos = nullptr, *sin = nullptr;  // [max_positions, head_dim / 2]
    std::unique_ptr<Arena> arena;
    Workspace work;
    Pool pool;
    std::mutex busy;
    bool amx = false;

    bool quantised() const { return shape.quantised != 0; }
};

}  // namespace ovf
