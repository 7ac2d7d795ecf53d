// Decode attention over a cache of int8 codes: reads keys and values directly, half of bfloat16's bytes.
//
// A key is `scale * code`, with one scale per head and token. Queries become int16 with one scale per head, so that a
// dot product is an exact sum of integers times one factor. Softmax weights, times the values' scales, become int16
// too, relative to the largest of a chunk. No sum can overflow: 256 * 127 * 32767 and 32 * 127 * 32767 fit 31 bits.
#pragma once
#include "attention.h"

namespace ovf {

constexpr size_t INT8_CHUNK = 32;  // tokens whose scores are held at once, while the next ones are fetched

// Quantises x [n], bfloat16, to int16. Returns the scale, or NaN if x is not finite.
inline float store_int16(const bf16* x, size_t n, int16_t* out) {
    const auto load = [&](size_t i) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))); };
    const auto [top, nan_or_zero] = extent(n, load);
    const __m512 steps = _mm512_set1_ps(top > 1e-30f ? 32767.0f / top : 0.0f);
    for (size_t i = 0; i < n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(load(i), steps))));
    return top / 32767.0f + nan_or_zero;
}

// Fetches the next tokens' rows of one layer into the second-level cache, line by line, during the computation.
class Fetcher {
  public:
    // rows: offsets of `count` tokens, with `row` bytes each.
    Fetcher(const int8_t* codes, const size_t* rows, size_t count, size_t row)
        : codes_(codes), rows_(rows), end_(rows + count), row_(row) {}

    inline __attribute__((always_inline)) void fetch(size_t lines) {
        for (size_t i = 0; i < lines && rows_ < end_; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(codes_ + *rows_ + at_), _MM_HINT_T1);
            if ((at_ += 64) >= row_) at_ = 0, ++rows_;
        }
    }

  private:
    const int8_t* codes_;
    const size_t *rows_, *end_;
    size_t row_, at_ = 0;
};

// Loads the codes that `mask` selects, as int16. WHOLE means that it selects all 32.
template <bool WHOLE>
inline __m512i load_codes(const int8_t* codes, __mmask32 mask) {
    return _mm512_cvtepi8_epi16(WHOLE ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                                      : _mm256_maskz_loadu_epi8(mask, codes));
}

// Computes the scores of COUNT heads that share a KV head for sixteen tokens, as integers without scales.
// q: [COUNT][padded] int16; scores: [COUNT] rows of INT8_CHUNK. For each token it fetches a share of `next`.
template <int VECTORS, int COUNT, bool WHOLE>
inline void score_16(const int8_t* k, const size_t* rows, __mmask32 tail, const int16_t* q, float* scores,
                     Fetcher& next) {
    __m512 dots[COUNT][16];
    __m512i query[COUNT][VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) query[g][i] = _mm512_loadu_si512(q + (g * VECTORS + i) * 32);
    for (int j = 0; j < 16; ++j) {
        next.fetch((VECTORS + 1) / 2);
        __m512i sums[COUNT];
#pragma GCC unroll 8
        for (int g = 0; g < COUNT; ++g) sums[g] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const __m512i key = load_codes<WHOLE>(k + rows[j] + 32 * i, i + 1 < VECTORS ? ~0u : tail);
#pragma GCC unroll 8
            for (int g = 0; g < COUNT; ++g) sums[g] = _mm512_dpwssd_epi32(sums[g], query[g][i], key);
        }
#pragma GCC unroll 8
        for (int g = 0; g < COUNT; ++g) dots[g][j] = (__m512)sums[g];
    }
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
        _mm512_storeu_ps(scores + g * INT8_CHUNK, _mm512_cvtepi32_ps((__m512i)sums_of_16<true>(dots[g])));
}

// Adds weighted values, as `add_values` does: out[i] = out[i] * keep[i] + factor[i] * (p[i] @ v), with p in int16.
template <int VECTORS, int COUNT, bool WHOLE>
inline void add_codes(const int8_t* v, const size_t* rows, size_t n, __mmask32 tail, const int16_t* p, const float* keep,
                      const float* factor, float* out, size_t out_stride, Fetcher& next) {
    __m512i sums[COUNT][2 * VECTORS];
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
#pragma GCC unroll 16
        for (int i = 0; i < 2 * VECTORS; ++i) sums[g][i] = _mm512_setzero_si512();
    for (size_t t = 0; t < n; t += 2) {  // if n is odd, the last token has weight 0
        next.fetch(VECTORS + 1);
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const __mmask32 mask = i + 1 < VECTORS ? ~0u : tail;
            const __m512i a = load_codes<WHOLE>(v + rows[t] + 32 * i, mask);
            const __m512i b = load_codes<WHOLE>(v + rows[t + 1] + 32 * i, mask);
            const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
            for (int g = 0; g < COUNT; ++g) {
                int weights;
                memcpy(&weights, p + g * INT8_CHUNK + t, 4);
                const __m512i both = _mm512_set1_epi32(weights);
                sums[g][2 * i] = _mm512_dpwssd_epi32(sums[g][2 * i], both, low);
                sums[g][2 * i + 1] = _mm512_dpwssd_epi32(sums[g][2 * i + 1], both, high);
            }
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < COUNT; ++g)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; ++i) {
            const __m512 scale = _mm512_set1_ps(factor[g]);
            add_unpacked(out + g * out_stride + 32 * i, keep[g], _mm512_mul_ps(_mm512_cvtepi32_ps(sums[g][2 * i]), scale),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(sums[g][2 * i + 1]), scale));
        }
}

// Computes softmax weights of one row of scores, times their values' scales, as int16: p[t] = w * scale / factor. Pads
// p with zeros to a multiple of 16. Returns factor; sets `keep` to the factor of the sums so far.
inline float weigh_codes(const float* scores, size_t n, float scale, const float* value_scales, float& maximum,
                         float& total, float& keep, int16_t* p) {
    alignas(64) float weights[INT8_CHUNK];
    __m512 largest = _mm512_setzero_ps();
    keep = weigh_into(scores, n, scale, maximum, total, [&](size_t i, __m512 weight) {
        const __m512 x = _mm512_mul_ps(weight, _mm512_maskz_loadu_ps(lanes(n - i), value_scales + i));
        _mm512_store_ps(weights + i, x);
        largest = _mm512_max_ps(x, largest);  // ignores NaN
    });
    const float top = _mm512_reduce_max_ps(largest);
    const __m512 steps = _mm512_set1_ps(top > 1e-30f ? 32767.0f / top : 0.0f);
    __m512 nan_or_zero = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        const __m512 x = _mm512_load_ps(weights + i);
        nan_or_zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), nan_or_zero);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i),
                            _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, steps))));
    }
    return top / 32767.0f + _mm512_reduce_add_ps(nan_or_zero);  // NaN if a scale is NaN
}

// Implements `attend_span` over codes.
template <int VECTORS, bool WHOLE>
void attend_span_int8(const AttentionShape& s, const KvLayer& kv, const int64_t* table, const bf16* q, size_t first,
                      size_t last, float* partial) {
    constexpr size_t padded = VECTORS * 32;
    constexpr int COUNT = VECTORS <= 2 ? 4 : VECTORS <= 4 ? 2 : 1;
    const size_t group = s.group();
    const __mmask32 tail = s.dim % 32 ? (1u << s.dim % 32) - 1 : ~0u;
    alignas(64) int16_t queries[MAX_HEADS * padded];
    float query_scales[MAX_HEADS];
    for (size_t h = 0; h < s.heads; ++h) {
        query_scales[h] = s.log2_scale() * store_int16(q + h * padded, padded, queries + h * padded);
        float* own = partial + h * s.partial();
        own[0] = -__builtin_inff(), own[1] = 0;
        memset(own + 2, 0, padded * sizeof(float));
    }
    size_t rows[2 * INT8_CHUNK], slots[2 * INT8_CHUNK];  // of this chunk and the next one
    alignas(64) float scores[COUNT * INT8_CHUNK];
    alignas(64) float key_scales[MAX_HEADS][INT8_CHUNK], value_scales[MAX_HEADS][INT8_CHUNK];
    alignas(64) int16_t p[COUNT * INT8_CHUNK];
    for (size_t start = first; start < last; start += INT8_CHUNK) {
        const size_t n = last - start < INT8_CHUNK ? last - start : INT8_CHUNK;
        const size_t known = start == first ? 0 : INT8_CHUNK;
        memcpy(slots, slots + INT8_CHUNK, known * sizeof(size_t)), memcpy(rows, rows + INT8_CHUNK, known * sizeof(size_t));
        kv.slots(table, start + known, 2 * INT8_CHUNK - known, last, slots + known);
        for (size_t t = known; t < 2 * INT8_CHUNK; ++t) rows[t] = slots[t] * kv.row;
        if (start == first)
            for (const int8_t* half : {kv.k_codes, kv.v_codes}) Fetcher(half, rows, n, kv.row).fetch(~size_t{0});
        const size_t more = start + INT8_CHUNK < last ? std::min(INT8_CHUNK, last - start - INT8_CHUNK) : 0;
        const size_t* next = rows + INT8_CHUNK;
        Fetcher next_k(kv.k_codes, next, more, kv.row), next_v(kv.v_codes, next, more, kv.row);
        for (size_t t = 0; t < round_up(n, 16); ++t)
            for (size_t h = 0, at = slots[t] * s.kv_heads; h < s.kv_heads; ++h)
                key_scales[h][t] = kv.k_scales[at + h], value_scales[h][t] = kv.v_scales[at + h];
        for (size_t kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
            const int8_t *k = kv.k_codes + kv_head * s.dim, *v = kv.v_codes + kv_head * s.dim;
            const float *key_scale = key_scales[kv_head], *value_scale = value_scales[kv_head];
            for (size_t g = 0; g < group; g += COUNT) {
                const size_t h = kv_head * group + g, count = group - g < COUNT ? group - g : COUNT;
                const auto run = [&]<int HEADS>() {
                    for (size_t t = 0; t < n; t += 16)
                        score_16<VECTORS, HEADS, WHOLE>(k, rows + t, tail, queries + h * padded, scores + t, next_k);
                    float keep[HEADS], factor[HEADS], *own = partial + h * s.partial();
                    for (int i = 0; i < HEADS; ++i) {
                        float *row = scores + i * INT8_CHUNK, *state = own + i * s.partial();
                        for (size_t t = 0; t < n; t += 16)
                            _mm512_store_ps(row + t, _mm512_mul_ps(_mm512_load_ps(row + t), _mm512_load_ps(key_scale + t)));
                        factor[i] = weigh_codes(row, n, query_scales[h + i], value_scale, state[0], state[1], keep[i],
                                                p + i * INT8_CHUNK);
                    }
                    add_codes<VECTORS, HEADS, WHOLE>(v, rows, n, tail, p, keep, factor, own + 2, s.partial(), next_v);
                };
                if constexpr (COUNT >= 4) {
                    if (count == 4) run.template operator()<4>();
                    if (count == 3) run.template operator()<3>();
                }
                if constexpr (COUNT >= 2)
                    if (count == 2) run.template operator()<2>();
                if (count == 1) run.template operator()<1>();
            }
        }
    }
}

inline SpanFunction span_int8_function(const AttentionShape& s) {
    const bool whole = s.dim % 32 == 0;
    switch (s.vectors()) {
        case 1: return whole ? attend_span_int8<1, true> : attend_span_int8<1, false>;
        case 2: return whole ? attend_span_int8<2, true> : attend_span_int8<2, false>;
        case 3: return whole ? attend_span_int8<3, true> : attend_span_int8<3, false>;
        case 4: return whole ? attend_span_int8<4, true> : attend_span_int8<4, false>;
        default: return attend_span_int8<8, true>;
    }
}

}  // namespace ovf
