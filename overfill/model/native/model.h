// A model's weights in the kernels' layout, and the scratch memory of a step.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "adapters.h"
#include "attention.h"
#include "pool.h"
#include "span_amx.h"
#include "span_int8.h"

extern "C" {

// Shape and options of a model. Matches `Shape` in native/library.py.
struct OvfShape {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions;
    int64_t head_tokens, tail_rank;  // full rows of the head, and the rank of the other rows; see model/head.py
    int64_t quantised;               // not 0: int8 matrices
    int64_t amx;                     // not 0: use AMX tiles if the CPU has them
    double norm_eps;
};

// The input and output of a step: `ForwardBatch` as pointers. Matches `Batch` in native/library.py.
struct OvfBatch {
    int64_t tokens, sequences, tables, table_width, num_logits, block_size, slots_in_cache, threads;
    const int64_t *token_ids, *positions, *slots;              // [tokens]
    const int64_t *query_lens, *context_lens, *block_tables;   // [sequences], [sequences], [tables, table_width]
    const int64_t* table_rows;                                 // [sequences], rows of block_tables; null means 0, 1, ...
    const int64_t* logits_indices;                                // [num_logits]
    const int64_t* adapters;                                   // [tokens], slot or -1; null if no token has an adapter
    void *k_cache, *v_cache;                                   // [layers, slots, kv_heads, head_dim], bf16 or int8
    float *k_scales, *v_scales;                                // [layers, slots, kv_heads]; null if the cache is bf16
    float* logits;                                             // [num_logits, vocab], output, or null
    int64_t* best;                                             // [num_logits], output: most likely token or -1; or null

    int64_t table_row(size_t sequence) const { return table_rows ? table_rows[sequence] : sequence; }
    const int64_t* table(size_t sequence) const { return block_tables + table_row(sequence) * table_width; }
};

// Called with (layer, 0) before a layer and (layer, 1) once its keys and values are in the cache. A result other than 0
// aborts the step.
typedef int (*OvfHook)(int64_t layer, int64_t written);
}

namespace ovf {

struct Layer {
    Matrix qkv, o, gate_up, down;
    // float32; null if the model has none. Biases are padded to whole panels; gate_up_bias has gate_up's row order.
    float *input_norm, *post_norm, *qkv_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr, *o_bias = nullptr,
                                   *gate_up_bias = nullptr, *down_bias = nullptr;
};

// Work item of one thread: one new token's attention to tokens first..last of its context.
struct SpanItem {
    size_t row, sequence, first, last, partial;
};

// Work item of one thread, for one sequence and KV head: `count` new tokens from `first` on, of which the first attends
// to `seen` tokens; or, in `pack_items`, `count` context tokens from `first` on to pack.
struct TileItem {
    size_t row, sequence, kv_head, first, count, seen;
};

// Memory of a step besides the weights. It is kept between steps, because fresh memory costs page faults.
struct Workspace {
    std::unique_ptr<Arena> scratch, attention_scratch;
    size_t tokens = 0, num_logits = 0, scratch_bytes = 0, packed_elements = 0, partial_count = 0;
    int threads = 0;
    size_t normed_stride = 0, attended_stride = 0, gated_stride = 0, hidden_stride = 0, qkv_stride = 0;
    size_t shrunk_stride = 0, plain_stride = 0;
    float *hidden, *qkv, *attention, *gated_wide, *scales, *partials, *logit_scales;
    uint16_t *normed, *attended, *gated, *last;
    bf16 *q, *packed;
    TileScratch* tiles;
    SpanScratch* span_scratch;
    __m512* best;        // [threads][num_logits], best logits; lane i has every sixteenth token
    __m512i* best_ids;   // [threads][num_logits]
    uint8_t* broken;     // [threads][num_logits]
    bf16* shrunk;        // [tokens][shrunk_stride], sums of the adapters' products
    uint16_t* plain;     // [tokens][plain_stride], operands in bfloat16 of a quantised model, for its adapters
    std::vector<SpanItem> spans;
    std::vector<size_t> span_start;  // [tokens + 1], index of each row's first span
    std::vector<TileItem> pack_items, tile_items;
    std::vector<size_t> packed_at;  // [sequences], offset of each sequence in `packed`
    Groups groups, last_groups;     // all rows, and those that the last layer computes
};

struct Model {
    OvfShape shape;
    AttentionShape attention;
    std::vector<Layer> layers;
    Matrix head;                   // [head_tokens, hidden]
    Matrix tail_right, tail_left;  // [tail_rank, hidden], [vocab - head_tokens, tail_rank]
    float* norm;
    const bf16* embedding = nullptr;  // [vocab, hidden]; null if it is tied, in which case rows of the head are read
    const int32_t* order = nullptr;   // [vocab], token of each row of head, then tail_left; null if in id order
    const float *cos = nullptr, *sin = nullptr;  // [max_positions, head_dim / 2]
    std::unique_ptr<Arena> arena;
    Adapters adapters;
    Workspace work;
    Pool pool;
    std::mutex busy;
    bool amx = false;

    bool quantised() const { return shape.quantised != 0; }
};

}  // namespace ovf
