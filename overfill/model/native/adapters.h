// LoRA adapters: their memory, and the low-rank products that a step adds to the products of its matrices.
//
// A product has two factors. `shrink` multiplies an operand by `down` [rank, in], and rounds the `rank` sums to bfloat16.
// `expand` multiplies these by `up` [out, rank], and adds the result to the matrix' own product, panel by panel. (The
// names are those of Punica's kernels, arXiv 2310.18547.)
//
// A thread shrinks the rows whose operands it stores, so that it waits for no other. It reads `down` once for each slot
// of its rows. It reads a panel's part of `up` while all rows of the panel are computed, so that this part stays in the
// first-level cache.
//
// Ranks are divided into units of 16. Slots have memory for the largest rank; a step reads the units that an adapter has.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "arena.h"
#include "matrix.h"

namespace ovf {

constexpr size_t RANK_UNIT = 16;     // ranks of a vector of sums
constexpr size_t UP_BYTES = RANK_UNIT * 16 * sizeof(bf16);  // of `up`: a unit of ranks for half a panel, 16 rows
constexpr int SHRINK_TILE = 8;       // rows of a tile: 16 sums, 2 weights and a broadcast fit the 32 registers

enum Fused { FUSED_QKV, FUSED_O, FUSED_GATE_UP, FUSED_DOWN, FUSED };  // as `Part` in overfill.cpp
constexpr size_t PROJECTIONS = 7;  // q, k, v, o, gate, up, down

// Rows of `up` for half a panel: from part `first` of the fused matrix on. Small models have halves of several parts.
struct HalfPanel {
    size_t at = 0;  // bytes from the beginning of the layer's `up`
    size_t first = 0, parts = 0;
};

// The layout of one fused matrix' products in the memory of a slot's layer.
struct LowRankLayout {
    size_t first_projection = 0, parts = 0;
    size_t rows[3] = {};    // of each part
    bool alternate = false; // halves of a panel belong to gate and up in turn
    size_t steps = 0;       // of `down`; each has two columns of sixteen ranks
    size_t down_at = 0, up_at = 0;
    std::vector<HalfPanel> halves;

    size_t down_bytes(size_t units) const { return units * steps * RANK_UNIT * 2 * sizeof(bf16); }  // of one part

    // Part and row in it of a lane of a half panel; row -1 for padding.
    std::pair<size_t, ptrdiff_t> origin(size_t half, size_t lane) const {
        size_t row = (alternate ? half / 2 : half) * 16 + lane;
        if (alternate) return {half % 2, row < rows[0] ? static_cast<ptrdiff_t>(row) : -1};
        for (size_t part = 0; part < parts; row -= rows[part++])
            if (row < rows[part]) return {part, row};
        return {0, -1};
    }
};

// Rows of one thread that use one slot: `count` entries of `Groups::order` from `first` on.
struct Group {
    size_t slot, first, count;
};

struct Groups {
    std::vector<uint32_t> order;
    std::vector<Group> groups;
    std::vector<size_t> starts;  // [threads + 1], index of each thread's first group

    // Groups the rows of each thread by their slots; rows without an adapter have -1.
    template <class SlotOf>
    void plan(size_t count, size_t threads, SlotOf slot_of) {
        order.clear(), groups.clear(), starts.assign(1, 0);
        for (size_t thread = 0; thread < threads; ++thread) {
            const size_t begin = order.size();
            for (size_t i = count * thread / threads; i < count * (thread + 1) / threads; ++i)
                if (slot_of(i) >= 0) order.push_back(i);
            std::stable_sort(order.begin() + begin, order.end(),
                             [&](size_t a, size_t b) { return slot_of(a) < slot_of(b); });
            for (size_t i = begin; i < order.size(); ++i) {
                const size_t slot = slot_of(order[i]);
                if (i == begin || groups.back().slot != slot) groups.push_back({slot, i, 0});
                ++groups.back().count;
            }
            starts.push_back(groups.size());
        }
    }
};

// The slots of a model. Any thread may fill a slot that no step uses.
struct Adapters {
    size_t slots = 0, layers = 0, units = 0, layer_bytes = 0;
    LowRankLayout layouts[FUSED];
    std::unique_ptr<Arena> arena;
    char* data = nullptr;       // [slots][layers][layer_bytes]
    std::vector<uint8_t> used;  // [slots][layers][PROJECTIONS], units of ranks

    const char* layer(size_t slot, size_t layer) const { return data + (slot * layers + layer) * layer_bytes; }
    const uint8_t* units_of(size_t slot, size_t layer) const { return &used[(slot * layers + layer) * PROJECTIONS]; }

    // Plans the layouts of matrices with these (rows, columns) and allocates `slots`; throws std::bad_alloc.
    void allocate(size_t slot_count, size_t rank, size_t layer_count, size_t hidden, size_t queries, size_t keys,
                  size_t intermediate) {
        units = (rank + RANK_UNIT - 1) / RANK_UNIT, layers = layer_count;
        const auto set = [&](Fused fused, size_t first, size_t parts, size_t cols, std::initializer_list<size_t> rows) {
            LowRankLayout& l = layouts[fused];
            l.first_projection = first, l.parts = parts, l.alternate = fused == FUSED_GATE_UP;
            std::copy(rows.begin(), rows.end(), l.rows);
            l.steps = round_up(cols, 4) / 2;
            l.down_at = layer_bytes;
            layer_bytes += parts * l.down_bytes(units);
            l.up_at = layer_bytes;
            size_t total = 0;
            for (const size_t n : rows) total += n;
            const size_t panels = (l.alternate ? (l.rows[0] + 15) / 16 : (total + PANEL - 1) / PANEL);
            for (size_t half = 0; half < 2 * panels; ++half) {
                HalfPanel h{layer_bytes - l.up_at, 0, 0};
                for (size_t lane = 0; lane < 16; ++lane) {
                    const auto [part, row] = l.origin(half, lane);
                    if (row < 0) continue;
                    if (h.parts == 0) h.first = part;
                    h.parts = part - h.first + 1;
                }
                layer_bytes += h.parts * units * UP_BYTES;
                l.halves.push_back(h);
            }
        };
        layer_bytes = 0;
        set(FUSED_QKV, 0, 3, hidden, {queries, keys, keys});
        set(FUSED_O, 3, 1, queries, {hidden});
        set(FUSED_GATE_UP, 4, 2, hidden, {intermediate, intermediate});
        set(FUSED_DOWN, 6, 1, intermediate, {hidden});
        arena = std::make_unique<Arena>(slot_count * layers * layer_bytes);
        data = arena->allocate<char>(slot_count * layers * layer_bytes);
        memset(data, 0, slot_count * layers * layer_bytes);  // so that the memory counts as used
        used.assign(slot_count * layers * PROJECTIONS, 0);
        slots = slot_count;
    }

    void clear(size_t slot, size_t layer) { std::fill_n(&used[(slot * layers + layer) * PROJECTIONS], PROJECTIONS, 0); }

    // Stores a product. down: [rank, in], up: [out, rank], bfloat16.
    void set(size_t slot, size_t index, size_t projection, size_t rank, size_t cols, const bf16* down, const bf16* up) {
        const LowRankLayout& l = *std::find_if(layouts, layouts + FUSED, [&](const LowRankLayout& each) {
            return projection < each.first_projection + each.parts;
        });
        const size_t part = projection - l.first_projection, filled = (rank + RANK_UNIT - 1) / RANK_UNIT;
        char* base = data + (slot * layers + index) * layer_bytes;
        bf16* to = reinterpret_cast<bf16*>(base + l.down_at + part * l.down_bytes(units));
        for (size_t r = 0; r < filled * RANK_UNIT; ++r)
            for (size_t c = 0; c < 2 * l.steps; ++c)
                to[((r / RANK_UNIT * l.steps + c / 2) * RANK_UNIT + r % RANK_UNIT) * 2 + c % 2] =
                    r < rank && c < cols ? down[r * cols + c] : 0;
        for (size_t half = 0; half < l.halves.size(); ++half) {
            const HalfPanel& h = l.halves[half];
            if (part < h.first || part >= h.first + h.parts) continue;
            to = reinterpret_cast<bf16*>(base + l.up_at + h.at + (part - h.first) * units * UP_BYTES);
            for (size_t lane = 0; lane < 16; ++lane) {
                const auto [own, row] = l.origin(half, lane);
                for (size_t r = 0; r < filled * RANK_UNIT; ++r)
                    to[(r / 2 * 16 + lane) * 2 + r % 2] = own == part && row >= 0 && r < rank ? up[row * rank + r] : 0;
            }
        }
        used[(slot * layers + index) * PROJECTIONS + projection] = filled;
    }
};

// Multiplies N operands by one unit of `down`: sixteen sums each, as bfloat16. x, out: N rows; w: `steps` of `down`, an even number.
template <int N>
__attribute__((noinline)) void shrink_tile(const uint16_t* const* x, const char* w, size_t steps, bf16* const* out) {
    __m512i even[N], odd[N];
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) even[r] = odd[r] = _mm512_setzero_si512();
    for (size_t k = 0; k < steps; k += 2) {
        const __m512i w0 = _mm512_load_si512(w + k * 64), w1 = _mm512_load_si512(w + k * 64 + 64);
        _mm_prefetch(w + k * 64 + 2048, _MM_HINT_T0);
        _mm_prefetch(w + k * 64 + 2112, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) {
            int pairs[2];
            memcpy(pairs, x[r] + 2 * k, 8);
            add_products<false>(even[r], _mm512_set1_epi32(pairs[0]), w0);
            add_products<false>(odd[r], _mm512_set1_epi32(pairs[1]), w1);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[r]),
                            narrow(_mm512_add_ps(_mm512_castsi512_ps(even[r]), _mm512_castsi512_ps(odd[r]))));
}

inline void shrink_rows(int rows, const uint16_t* const* x, const char* w, size_t steps, bf16* const* out) {
    static constexpr void (*functions[])(const uint16_t* const*, const char*, size_t, bf16* const*) = {
        shrink_tile<1>, shrink_tile<2>, shrink_tile<3>, shrink_tile<4>,
        shrink_tile<5>, shrink_tile<6>, shrink_tile<7>, shrink_tile<8>,
    };
    functions[rows - 1](x, w, steps, out);
}

// Multiplies the operands of a thread's rows by `down`.
// x: operands in bfloat16, `stride` elements apart. out: [rows][parts][units * RANK_UNIT], rows `out_stride` apart.
inline void shrink(const Adapters& adapters, size_t layer, Fused fused, const Groups& groups, const uint16_t* x,
                  size_t stride, bf16* out, size_t out_stride, int thread) {
    const LowRankLayout& l = adapters.layouts[fused];
    const size_t each = l.parts * adapters.units;
    for (size_t item = groups.starts[thread] * each; item < groups.starts[thread + 1] * each; ++item) {
        const Group& group = groups.groups[item / each];
        const size_t part = item % each / adapters.units, unit = item % adapters.units;
        if (unit >= adapters.units_of(group.slot, layer)[l.first_projection + part]) continue;
        const char* w = adapters.layer(group.slot, layer) + l.down_at + part * l.down_bytes(adapters.units) + l.down_bytes(unit);
        const uint32_t* rows = groups.order.data() + group.first;
        for (size_t begin = 0; begin < group.count; begin += SHRINK_TILE) {
            const int count = std::min<size_t>(SHRINK_TILE, group.count - begin);
            const uint16_t* from[SHRINK_TILE];
            bf16* to[SHRINK_TILE];
            for (int r = 0; r < count; ++r) {
                from[r] = x + rows[begin + r] * stride;
                to[r] = out + rows[begin + r] * out_stride + (part * adapters.units + unit) * RANK_UNIT;
            }
            shrink_rows(count, from, w, l.steps, to);
        }
    }
}

// Adds the product of `up` and a row's sums, `shrunk`, to a panel of the matrix' product. Prefetches for the next panel.
__attribute__((noinline)) inline void expand(const Adapters& adapters, size_t layer, Fused fused, size_t slot,
                                             const bf16* shrunk, size_t panel, float* sums) {
    const LowRankLayout& l = adapters.layouts[fused];
    const uint8_t* used = adapters.units_of(slot, layer) + l.first_projection;
    const char* base = adapters.layer(slot, layer) + l.up_at;
    for (size_t half = 0; half < 2; ++half) {
        const HalfPanel& h = l.halves[2 * panel + half];
        __m512i even = _mm512_load_si512(sums + 16 * half), odd = _mm512_setzero_si512();
        for (size_t i = 0; i < h.parts; ++i) {
            const char* up = base + h.at + i * adapters.units * UP_BYTES;
            const bf16* x = shrunk + (h.first + i) * adapters.units * RANK_UNIT;
            for (size_t unit = 0; unit < used[h.first + i]; ++unit, up += UP_BYTES, x += RANK_UNIT)
#pragma GCC unroll 4
                for (size_t step = 0; step < RANK_UNIT / 2; step += 2) {
                    int pairs[2];
                    memcpy(pairs, x + 2 * step, 8);
                    _mm_prefetch(up + step * 64 + 2 * UP_BYTES * adapters.units, _MM_HINT_T0);
                    _mm_prefetch(up + step * 64 + 64 + 2 * UP_BYTES * adapters.units, _MM_HINT_T0);
                    add_products<false>(even, _mm512_set1_epi32(pairs[0]), _mm512_load_si512(up + step * 64));
                    add_products<false>(odd, _mm512_set1_epi32(pairs[1]), _mm512_load_si512(up + step * 64 + 64));
                }
        }
        _mm512_store_ps(sums + 16 * half, _mm512_add_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)));
    }
}

}  // namespace ovf
