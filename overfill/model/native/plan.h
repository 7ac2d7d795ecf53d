// Prepares a step: checks that it stays inside its arrays, allocates scratch and divides attention into work items.
#pragma once
#include "step.h"

namespace ovf {

constexpr size_t SPAN_MAX_NEW = 8;  // with at most this many new tokens in a sequence, each reads the cache by itself
constexpr size_t MIN_SPAN = 128;    // tokens; joining shorter spans costs more than sharing them among threads gains
constexpr size_t PACK_ITEM = 256;   // tokens of a work item of packing

// Returns what is wrong with a batch, or null.
inline const char* fault_of(const Model& m, const OvfBatch& b) {
    int64_t total = 0;
    for (int64_t i = 0; i < b.sequences; ++i) {
        const int64_t context = b.context_lens[i], blocks = (context + b.block_size - 1) / b.block_size;
        if (b.query_lens[i] < 1 || b.query_lens[i] > context) return "a sequence has more new tokens than context";
        if (blocks > b.table_width) return "a block table is shorter than its context";
        if (b.table_row(i) < 0 || b.table_row(i) >= b.tables) return "a sequence has no block table";
        const int64_t* table = b.table(i);
        for (int64_t j = 0; j < blocks; ++j) {
            const int64_t block = table[j];
            if (block < 0 || (block + 1) * b.block_size > b.slots_in_cache) return "a block is not in the cache";
        }
        total += b.query_lens[i];
    }
    if (total != b.tokens) return "query lengths and token ids differ";
    for (int64_t i = 0; i < b.tokens; ++i) {
        if (b.token_ids[i] < 0 || b.token_ids[i] >= m.shape.vocab) return "a token id is outside the vocabulary";
        if (b.positions[i] < 0 || b.positions[i] >= m.shape.max_positions) return "a position is beyond the context";
        if (b.adapters && (b.adapters[i] < -1 || b.adapters[i] >= static_cast<int64_t>(m.adapters.slots)))
            return "a token's adapter slot does not exist";
        if (b.slots[i] < 0 || b.slots[i] >= b.slots_in_cache) return "a slot is not in the cache";
    }
    for (int64_t i = 0; i < b.num_logits; ++i)
        if (b.logits_indices[i] < 0 || b.logits_indices[i] >= b.tokens) return "logits of a token that is not in the batch";
    return nullptr;
}

// Divides attention into work items. Contexts of a decode step are cut so that all threads read about the same amount.
inline void plan_attention(Model& m, const OvfBatch& b, int threads) {
    Workspace& w = m.work;
    const AttentionShape& s = m.attention;
    w.spans.clear(), w.pack_items.clear(), w.tile_items.clear();
    w.span_start.assign(1, 0);
    w.packed_at.assign(b.sequences, 0);
    size_t to_read = 0;
    for (int64_t i = 0; i < b.sequences; ++i)
        if (b.query_lens[i] <= static_cast<int64_t>(SPAN_MAX_NEW)) to_read += b.query_lens[i] * b.context_lens[i];
    const size_t share = threads == 1 ? to_read : to_read / (2 * threads);
    const size_t longest = round_up(share < MIN_SPAN ? MIN_SPAN : share, 16);
    size_t row = 0, partials = 0, packed = 0;
    for (int64_t i = 0; i < b.sequences; ++i) {
        const size_t count = b.query_lens[i], context = b.context_lens[i], before = context - count;
        if (count <= SPAN_MAX_NEW) {
            for (size_t j = 0; j < count; ++j, ++row) {
                const size_t seen = before + j + 1, parts = (seen + longest - 1) / longest;
                for (size_t part = 0, first = 0; part < parts; ++part) {
                    // Cut between groups of sixteen tokens, which are the rows of an AMX tile.
                    const size_t last = part + 1 < parts ? seen * (part + 1) / parts / 16 * 16 : seen;
                    w.spans.push_back({row, static_cast<size_t>(i), first, last, partials++});
                    first = last;
                }
                w.span_start.push_back(partials);
            }
            continue;
        }
        const size_t tokens = round_up(context, 32), height = TILE_ROWS / s.group();
        w.packed_at[i] = packed;
        packed += s.kv_heads * (packed_keys(s, tokens) + packed_values(s, tokens));
        for (size_t h = 0; h < s.kv_heads; ++h) {
            for (size_t t = 0; t < tokens; t += PACK_ITEM)
                w.pack_items.push_back({row, static_cast<size_t>(i), h, t, tokens - t < PACK_ITEM ? tokens - t : PACK_ITEM, 0});
            for (size_t t = 0; t < count; t += height)
                w.tile_items.push_back({row + t, static_cast<size_t>(i), h, t, count - t < height ? count - t : height, before + t + 1});
        }
        for (size_t j = 0; j < count; ++j) w.span_start.push_back(partials);
        row += count;
    }
    // Longest first, so that no thread starts a long item at the end.
    std::sort(w.tile_items.begin(), w.tile_items.end(), [](const TileItem& a, const TileItem& b) { return a.seen > b.seen; });
    if (packed > w.packed_elements || partials > w.partial_count) {
        packed = std::max(packed, w.packed_elements), partials = std::max(partials, w.partial_count);
        w.packed_elements = w.partial_count = 0;  // stays 0 if the allocation below throws
        w.attention_scratch.reset();
        const size_t partial_floats = partials * s.heads * s.partial();
        w.attention_scratch = std::make_unique<Arena>(packed * sizeof(bf16) + partial_floats * sizeof(float) + 256);
        w.packed = w.attention_scratch->allocate<bf16>(packed);
        w.partials = w.attention_scratch->allocate<float>(partial_floats + 16);
        w.packed_elements = packed, w.partial_count = partials;
    }
}

// Allocates the scratch of a step, if the current one is too small.
inline void allocate_scratch(Model& m, size_t tokens, size_t num_logits, int threads) {
    Workspace& w = m.work;
    if (tokens <= w.tokens && num_logits <= w.num_logits && threads <= w.threads) return;
    tokens = std::max({tokens, num_logits, w.tokens}), num_logits = std::max(num_logits, w.num_logits);
    threads = std::max(threads, w.threads);
    w.tokens = w.num_logits = w.threads = 0;  // stays 0 if the allocation below throws
    const AttentionShape& s = m.attention;
    const size_t attended = s.heads * s.dim, gated = m.shape.intermediate;
    w.hidden_stride = round_up(m.shape.hidden, PANEL);
    w.normed_stride = round_up(m.shape.hidden, ROW_UNIT), w.attended_stride = round_up(attended, ROW_UNIT);
    w.gated_stride = round_up(gated, ROW_UNIT);
    w.shrunk_stride = m.adapters.slots ? 3 * m.adapters.units * RANK_UNIT : 0;
    w.plain_stride = m.adapters.slots && m.quantised() ? std::max({w.normed_stride, w.attended_stride, w.gated_stride}) : 0;
    w.qkv_stride = round_up(std::max(attended + 2 * s.kv_heads * s.dim, w.normed_stride), 16);
    for (int pass = 0; pass < 2; ++pass) {  // the first pass counts bytes
        size_t bytes = 0;
        Arena* arena = nullptr;
        if (pass) {
            w.scratch.reset();
            w.scratch = std::make_unique<Arena>(w.scratch_bytes);
            arena = w.scratch.get();
        }
        const auto allocate = [&]<class T>(T*& where, size_t count) {
            bytes += round_up(count * sizeof(T), 64);
            if (arena) where = arena->allocate<T>(count);
        };
        allocate(w.hidden, tokens * w.hidden_stride);
        allocate(w.qkv, tokens * w.qkv_stride);
        allocate(w.attention, tokens * attended + 16);
        if (m.quantised()) allocate(w.gated_wide, tokens * gated + 16);
        allocate(w.scales, tokens), allocate(w.logit_scales, num_logits);
        const size_t rows = round_up(tokens, AMX_BLOCK);
        allocate(w.normed, rows * w.normed_stride), allocate(w.attended, rows * w.attended_stride);
        allocate(w.gated, rows * w.gated_stride), allocate(w.last, round_up(num_logits, AMX_BLOCK) * w.normed_stride);
        allocate(w.q, tokens * s.heads * s.padded());
        allocate(w.tiles, threads), allocate(w.span_scratch, threads);
        allocate(w.best, threads * num_logits), allocate(w.best_ids, threads * num_logits);
        allocate(w.broken, threads * num_logits);
        allocate(w.shrunk, tokens * w.shrunk_stride), allocate(w.plain, tokens * w.plain_stride);
        w.scratch_bytes = bytes;
    }
    w.tokens = tokens, w.num_logits = num_logits, w.threads = threads;
}

}  // namespace ovf
