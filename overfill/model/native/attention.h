// Grouped-query attention over the paged cache in bfloat16; `span_int8.h` has the form for a cache of int8 codes.
//
// There are two forms, as in model/attention.py. `attend_span` reads a span of one new token's context directly from
// the cache. `attend_tile` computes many new tokens on keys and values that were packed into panels once for all of
// them.
#pragma once
#include "matrix.h"

namespace ovf {

constexpr size_t MAX_HEADS = 64;
constexpr size_t CHUNK = 64;       // context tokens whose scores `attend_span` holds at once
constexpr size_t TILE_ROWS = 48;   // (new token, head) rows of a tile
constexpr size_t TILE_KEYS = 256;  // context tokens whose scores `attend_tile` holds at once

struct AttentionShape {
    size_t heads, kv_heads, dim;  // dim: even, up to 128, or 256
    size_t group() const { return heads / kv_heads; }
    size_t vectors() const { return (dim + 31) / 32; }
    size_t padded() const { return vectors() * 32; }  // elements of a head in `q`, padded with zeros
    size_t partial() const { return padded() + 2; }   // floats of a head's partial result: maximum, total weight, sums
    float log2_scale() const { return 1.44269504f / __builtin_sqrtf(static_cast<float>(dim)); }
};

// One layer of the cache: keys and values [slots][kv_heads][dim] in bfloat16, or int8 codes with scales
// [slots][kv_heads].
struct KvLayer {
    bf16 *k, *v;
    int8_t *k_codes, *v_codes;
    float *k_scales, *v_scales;  // null if the cache is bfloat16
    size_t block_size, row;      // row: elements from one slot to the next

    bool coded() const { return k_scales != nullptr; }
    size_t slot(const int64_t* table, size_t token) const {
        return table[token / block_size] * block_size + token % block_size;
    }
    size_t at(const int64_t* table, size_t token) const { return slot(table, token) * row; }

    // Writes the slots of tokens start..start + count to `out`. Tokens from `last` on get the slot of token `last` - 1.
    void slots(const int64_t* table, size_t start, size_t count, size_t last, size_t* out) const {
        size_t block = start / block_size, in = start % block_size, t = 0;
        for (const size_t known = start < last ? std::min(count, last - start) : 0; t < known; in = 0, ++block) {
            const size_t here = std::min(block_size - in, known - t), base = table[block] * block_size + in;
            for (size_t i = 0; i < here; ++i) out[t + i] = base + i;
            t += here;
        }
        for (const size_t end = slot(table, last - 1); t < count; ++t) out[t] = end;
    }
};

// Quantises x [n] to codes and a scale, as `kv.codecs.quantise` does. A NaN or infinity in x makes the scale NaN.
inline void store_codes(const float* x, size_t n, int8_t* codes, float* scale) {
    const Extent all = extent(n, [&](size_t i) { return _mm512_maskz_loadu_ps(lanes(n - i), x + i); });
    const float one = all.largest / 127.0f;
    *scale = one + all.nan_or_zero;
    const __m512 divisor = _mm512_set1_ps(one > 0 ? one : 1.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), divisor);
        _mm512_mask_cvtsepi32_storeu_epi8(codes + i, lanes(n - i), _mm512_cvtps_epi32(v));
    }
}

// Fetches into the second-level cache, because the first-level cache has few buffers for lines in flight.
inline void prefetch(const bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Computes o [32] = o * keep + the products in `low` and `high`, whose operands `unpacklo` and `unpackhi` interleaved.
// Each 128-bit lane of `low` holds four elements, and the same lane of `high` the next four.
inline void add_unpacked(float* o, float keep, __m512 low, __m512 high) {
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 factor = _mm512_set1_ps(keep);
    const __m512 a = _mm512_permutex2var_ps(low, front, high), b = _mm512_permutex2var_ps(low, back, high);
    _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_loadu_ps(o), factor, a));
    _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(_mm512_loadu_ps(o + 16), factor, b));
}

// Adds the weighted values of a chunk to the sums of COUNT heads: out[i] = out[i] * keep[i] + p[i] @ v.
// Fetches the next chunk's keys meanwhile, unless `next_k` is null.
template <int VECTORS, int COUNT>
void add_values(const bf16* v, const size_t* rows, size_t n, __mmask32 tail, const bf16* p, const float* keep,
                float* out, size_t out_stride, const bf16* next_k) {
    __m512 sums[COUNT][2 * VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
#pragma GCC unroll 16
        for (int i = 0; i < 2 * VECTORS; ++i) sums[g][i] = _mm512_setzero_ps();
    for (size_t t = 0; t < n; t += 2) {
        __m512i pair[2 * VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const __mmask32 mask = i == VECTORS - 1 ? tail : ~0u;
            const __m512i a = _mm512_maskz_loadu_epi16(mask, v + rows[t] + 32 * i);
            const __m512i b =
                t + 1 < n ? _mm512_maskz_loadu_epi16(mask, v + rows[t + 1] + 32 * i) : _mm512_setzero_si512();
            if (next_k) prefetch(next_k + rows[CHUNK + t] + 32 * i), prefetch(next_k + rows[CHUNK + t + 1] + 32 * i);
            pair[2 * i] = _mm512_unpacklo_epi16(a, b);
            pair[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
        }
#pragma GCC unroll 8
        for (int g = 0; g < COUNT; ++g) {
            int weights;
            memcpy(&weights, p + g * CHUNK + t, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(weights);
#pragma GCC unroll 16
            for (int i = 0; i < 2 * VECTORS; ++i)
                sums[g][i] = _mm512_dpbf16_ps(sums[g][i], both, (__m512bh)pair[i]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i)
            add_unpacked(out + g * out_stride + 32 * i, keep[g], sums[g][2 * i], sums[g][2 * i + 1]);
}

// Computes the softmax weights of one row of scores, 2^(s * scale - maximum), and updates the running maximum and
// total. Passes sixteen weights at a time to `store(i, weights)`, padded with zeros behind `n`.
// Returns the factor by which the sums so far must be multiplied.
template <class Store>
inline float weigh_into(const float* scores, size_t n, float scale, float& maximum, float& total, Store store) {
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    for (size_t i = 0; i < n; i += 16)
        top = _mm512_mask_max_ps(top, lanes(n - i), top, _mm512_loadu_ps(scores + i));
    const float highest = __builtin_fmaxf(maximum, _mm512_reduce_max_ps(top) * scale);
    const __m512 offset = _mm512_set1_ps(-highest), factor = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + i), factor, offset);
        const __m512 weight = _mm512_maskz_mov_ps(lanes(n - i), exp2_coarse(x));
        sum = _mm512_add_ps(sum, weight);
        store(i, weight);
    }
    const float keep = maximum == highest ? 1.0f : __builtin_exp2f(maximum - highest);
    total = total * keep + _mm512_reduce_add_ps(sum);
    maximum = highest;
    return keep;
}

// Writes the weights to `p` in bfloat16, padded with zeros to a multiple of 16; otherwise as `weigh_into`.
inline float weigh(const float* scores, size_t n, float scale, float& maximum, float& total, bf16* p) {
    return weigh_into(scores, n, scale, maximum, total, [&](size_t i, __m512 weights) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i), narrow(weights));
    });
}

// Computes one new token's attention to tokens first..last of its context.
// q: [heads][padded]; partial: the result, [heads][partial()].
template <int VECTORS>
void attend_span(const AttentionShape& s, const KvLayer& kv, const int64_t* table, const bf16* q, size_t first,
                 size_t last, float* partial) {
    const size_t group = s.group(), padded = s.padded();
    const __mmask32 tail = s.dim % 32 ? (1u << s.dim % 32) - 1 : ~0u;
    __m512 dots[16];
    size_t rows[2 * CHUNK];  // offsets of this chunk's tokens and the next one's
    alignas(64) float scores[MAX_HEADS * CHUNK];
    alignas(64) bf16 p[8 * CHUNK];
    for (size_t h = 0; h < s.heads; ++h) {
        float* own = partial + h * s.partial();
        own[0] = -__builtin_inff(), own[1] = 0;
        memset(own + 2, 0, padded * sizeof(float));
    }
    for (size_t start = first; start < last; start += CHUNK) {
        const size_t n = last - start < CHUNK ? last - start : CHUNK;
        if (start == first) {
            kv.slots(table, start, 2 * CHUNK, last, rows);
            for (size_t t = 0; t < 2 * CHUNK; ++t) rows[t] *= kv.row;
        } else {
            memcpy(rows, rows + CHUNK, CHUNK * sizeof(size_t));
            kv.slots(table, start + CHUNK, CHUNK, last, rows + CHUNK);
            for (size_t t = CHUNK; t < 2 * CHUNK; ++t) rows[t] *= kv.row;
        }
        for (size_t t = 0; t < n; t += 16) {
            // After each head, fetch a few lines of these tokens' values and, in the first chunk, of the next keys.
            const size_t row_lines = kv.row * sizeof(bf16) / 64, lines = 16 * row_lines;
            const size_t each = (lines + s.heads - 1) / s.heads;
            size_t fetched = 0;
            for (size_t h = 0; h < s.heads; ++h) {
                __m512bh query[VECTORS];
#pragma GCC unroll 8
                for (int i = 0; i < VECTORS; ++i) query[i] = (__m512bh)_mm512_loadu_si512(q + h * padded + 32 * i);
                const bf16* k = kv.k + h / group * s.dim;
#pragma GCC unroll 16
                for (int j = 0; j < 16; ++j) {
                    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
                    for (int i = 0; i < VECTORS; ++i)
                        sum = _mm512_dpbf16_ps(sum, query[i],
                                               (__m512bh)_mm512_maskz_loadu_epi16(i == VECTORS - 1 ? tail : ~0u,
                                                                                  k + rows[t + j] + 32 * i));
                    dots[j] = sum;
                }
                _mm512_storeu_ps(scores + h * CHUNK + t, sums_of_16<>(dots));
                for (size_t i = 0; i < each && fetched < lines; ++i, ++fetched) {
                    const size_t token = t + fetched / row_lines, element = fetched % row_lines * 32;
                    prefetch(kv.v + rows[token] + element);
                    if (start == first) prefetch(kv.k + rows[token + 16] + element);
                }
            }
        }
        constexpr int COUNT = VECTORS <= 3 ? 4 : VECTORS == 4 ? 3 : 1;
        for (size_t kv_head = 0; kv_head < s.kv_heads; ++kv_head)
            for (size_t g = 0; g < group; g += COUNT) {
                const size_t h = kv_head * group + g, count = group - g < COUNT ? group - g : COUNT;
                float keep[COUNT], *own = partial + h * s.partial();
                for (size_t i = 0; i < count; ++i)
                    keep[i] = weigh(scores + (h + i) * CHUNK, n, s.log2_scale(), own[i * s.partial()],
                                    own[i * s.partial() + 1], p + i * CHUNK);
                const bf16* v = kv.v + kv_head * s.dim;
                const bf16* next_k = g == 0 && start + CHUNK < last ? kv.k + kv_head * s.dim : nullptr;
                if (COUNT >= 4 && count == 4)
                    add_values<VECTORS, COUNT>(v, rows, n, tail, p, keep, own + 2, s.partial(), next_k);
                else if (COUNT >= 3 && count == 3)
                    add_values<VECTORS, COUNT < 3 ? COUNT : 3>(v, rows, n, tail, p, keep, own + 2, s.partial(), next_k);
                else if (COUNT >= 2 && count == 2)
                    add_values<VECTORS, COUNT < 2 ? COUNT : 2>(v, rows, n, tail, p, keep, own + 2, s.partial(), next_k);
                else
                    add_values<VECTORS, 1>(v, rows, n, tail, p, keep, own + 2, s.partial(), next_k);
            }
    }
}

using SpanFunction = void (*)(const AttentionShape&, const KvLayer&, const int64_t*, const bf16*, size_t, size_t, float*);

inline SpanFunction span_function(const AttentionShape& s) {
    switch (s.vectors()) {
        case 1: return attend_span<1>;
        case 2: return attend_span<2>;
        case 3: return attend_span<3>;
        case 4: return attend_span<4>;
        default: return attend_span<8>;
    }
}

// Joins the partial results of one token's `count` spans into out [heads][dim].
inline void join_spans(const AttentionShape& s, const float* partials, size_t count, float* out) {
    const size_t stride = s.heads * s.partial();
    for (size_t h = 0; h < s.heads; ++h) {
        const float* own = partials + h * s.partial();
        float top = own[0], total = 0;
        for (size_t i = 1; i < count; ++i) top = __builtin_fmaxf(top, own[i * stride]);
        for (size_t i = 0; i < count; ++i) total += own[i * stride + 1] * __builtin_exp2f(own[i * stride] - top);
        for (size_t d = 0; d < s.dim; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (size_t i = 0; i < count; ++i)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(own + i * stride + 2 + d),
                                      _mm512_set1_ps(__builtin_exp2f(own[i * stride] - top) / total), sum);
            _mm512_mask_storeu_ps(out + h * s.dim + d, lanes(s.dim - d), sum);
        }
    }
}

// Elements of one sequence's packed keys and values of one KV head; `tokens` is a multiple of 32.
inline size_t packed_keys(const AttentionShape& s, size_t tokens) { return tokens * s.padded(); }
inline size_t packed_values(const AttentionShape& s, size_t tokens) { return tokens * s.padded(); }

// Dequantises sixteen codes to bfloat16.
inline __m256i restore_16(const int8_t* codes, __mmask16 mask, float scale) {
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes)));
    return narrow(_mm512_mul_ps(whole, _mm512_set1_ps(scale)));
}

// Packs tokens start..start + 32 of one KV head: keys as [tokens / 32][padded / 2][32][2] and values as
// [padded / 32][tokens / 2][32][2]. Tokens behind the context become zeros.
inline void pack_keys_values(const AttentionShape& s, const KvLayer& kv, const int64_t* table, size_t kv_head,
                             size_t start, size_t context, size_t tokens, bf16* keys, bf16* values) {
    const size_t n = context - start < 32 ? context - start : 32;
    uint32_t* k = reinterpret_cast<uint32_t*>(keys + start * s.padded());
    alignas(64) bf16 restored[256];
    for (size_t t = 0; t < 32; ++t) {
        const size_t at = kv.at(table, t < n ? start + t : start) + kv_head * s.dim;
        const bf16* row = restored;
        if (kv.coded()) {
            const size_t vector = kv.slot(table, t < n ? start + t : start) * s.kv_heads + kv_head;
            for (size_t d = 0; d < s.dim; d += 16)
                _mm256_store_si256(reinterpret_cast<__m256i*>(restored + d),
                                   restore_16(kv.k_codes + at + d, lanes(s.dim - d), kv.k_scales[vector]));
        } else {
            row = kv.k + at;
        }
        for (size_t d = 0; d < s.padded() / 2; ++d) {
            uint32_t pair = 0;
            if (t < n && 2 * d < s.dim) memcpy(&pair, row + 2 * d, 4);
            k[d * 32 + t] = pair;
        }
    }
    for (size_t t = 0; t < 32; t += 2)
        for (size_t d = 0; d < s.padded(); d += 16) {
            const __mmask16 mask = d < s.dim ? lanes(s.dim - d) : 0;
            const auto load = [&](size_t token) {
                if (token >= n) return _mm256_setzero_si256();
                const size_t slot = kv.slot(table, start + token), at = slot * kv.row + kv_head * s.dim + d;
                if (kv.coded()) return restore_16(kv.v_codes + at, mask, kv.v_scales[slot * s.kv_heads + kv_head]);
                return _mm256_maskz_loadu_epi16(mask, kv.v + at);
            };
            const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(load(t)),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(load(t + 1)), 16));
            bf16* panel = values + d / 32 * tokens * 32 + (start + t) * 32;
            _mm512_storeu_si512(panel + d % 32 * 2, both);
        }
}

struct TileScratch {
    static constexpr size_t PADDED_ROWS = (TILE_ROWS + AMX_BLOCK - 1) / AMX_BLOCK * AMX_BLOCK;
    alignas(64) bf16 q[PADDED_ROWS * 256];
    alignas(64) bf16 p[PADDED_ROWS * TILE_KEYS];
    alignas(64) float scores[PADDED_ROWS * TILE_KEYS];
    alignas(64) float out[TILE_ROWS * 256], products[PADDED_ROWS * PANEL];
    float maximum[TILE_ROWS], total[TILE_ROWS], keep[TILE_ROWS];
};

// Multiplies `rows` rows, `stride` elements apart, with a bfloat16 panel into out, float32, `out_stride` elements
// apart. With AMX it reads and writes up to a multiple of AMX_BLOCK rows. The panel has a multiple of 16 steps.
inline void multiply_panel(bool amx, const bf16* a, size_t stride, size_t rows, const bf16* panel, size_t steps,
                           float* out, size_t out_stride) {
    const char* w = reinterpret_cast<const char*>(panel);
    if (!amx) {
        const size_t tiles = tiles_over(rows);
        for (size_t t = 0; t < tiles; ++t) {
            const size_t first = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - first;
            tile_of<false>(height)(a + first * stride, stride, w, steps, w, 64, out + first * out_stride, out_stride);
        }
        return;
    }
    for (size_t r = 0; r < rows; r += AMX_BLOCK) {
        const auto run = r + AMX_ROWS < rows ? amx_tile<AmxKind::BF16> : amx_tile<AmxKind::BF16_SHORT>;
        run(reinterpret_cast<const char*>(a + r * stride), stride * sizeof(bf16), w, steps, w, w, 0,
            out + r * out_stride, out_stride * sizeof(float));
    }
}

// Computes causal attention of `count` new tokens and the query heads of one KV head.
// q: [tokens][heads][padded], starting at the first new token.
// seen: number of tokens that the first new token attends to, itself included.
// out: [tokens][heads * dim] float32, starting at the first new token.
inline void attend_tile(const AttentionShape& s, const bf16* q, size_t count, size_t kv_head, size_t seen,
                        const bf16* keys, const bf16* values, size_t tokens, bool amx, TileScratch& scratch,
                        float* out) {
    const size_t group = s.group(), rows = count * group, padded = s.padded();
    const float scale = s.log2_scale();
    for (size_t r = 0; r < rows; ++r) {
        const bf16* source = q + (r / group * s.heads + kv_head * group + r % group) * padded;
        memcpy(scratch.q + r * padded, source, padded * sizeof(bf16));
        scratch.maximum[r] = -__builtin_inff(), scratch.total[r] = 0;
    }
    memset(scratch.out, 0, rows * padded * sizeof(float));
    const size_t end = seen + count - 1;  // number of tokens that the last new token attends to
    for (size_t start = 0; start < end; start += TILE_KEYS) {
        const size_t n = end - start < TILE_KEYS ? end - start : TILE_KEYS, panels = (n + 31) / 32;
        for (size_t j = 0; j < panels; ++j)
            multiply_panel(amx, scratch.q, padded, rows, keys + (start + 32 * j) * padded, padded / 2,
                           scratch.scores + 32 * j, TILE_KEYS);
        for (size_t r = 0; r < rows; ++r) {
            const size_t limit = seen + r / group, visible = limit <= start ? 0 : limit - start < n ? limit - start : n;
            bf16* p = scratch.p + r * TILE_KEYS;
            scratch.keep[r] = 1;
            if (visible)
                scratch.keep[r] = weigh(scratch.scores + r * TILE_KEYS, visible, scale, scratch.maximum[r],
                                        scratch.total[r], p);
            const size_t filled = round_up(visible, 16);
            memset(p + filled, 0, (32 * panels - filled) * sizeof(bf16));
        }
        for (size_t d = 0; d < padded; d += 32) {
            multiply_panel(amx, scratch.p, TILE_KEYS, rows, values + d * tokens + start * 32, 16 * panels,
                           scratch.products, PANEL);
            for (size_t r = 0; r < rows; ++r) {
                float* o = scratch.out + r * padded + d;
                const __m512 keep = _mm512_set1_ps(scratch.keep[r]);
                for (size_t i = 0; i < 32; i += 16)
                    _mm512_store_ps(o + i, _mm512_fmadd_ps(_mm512_load_ps(o + i), keep,
                                                           _mm512_load_ps(scratch.products + r * PANEL + i)));
            }
        }
    }
    for (size_t r = 0; r < rows; ++r) {
        const __m512 factor = _mm512_set1_ps(1.0f / scratch.total[r]);
        float* target = out + (r / group * s.heads + kv_head * group + r % group) * s.dim;
        for (size_t d = 0; d < s.dim; d += 16)
            _mm512_mask_storeu_ps(target + d, lanes(s.dim - d),
                                  _mm512_mul_ps(_mm512_load_ps(scratch.out + r * padded + d), factor));
    }
}

}  // namespace ovf
