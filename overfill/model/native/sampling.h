// Draws tokens from rows of logits, as model/sampling.py defines it: temperature, top-k, top-p and min-p, then the
// first token in id order at which the cumulative weight exceeds u. The vocabulary is never sorted.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

extern "C" {
// Rows to draw from. Matches `Draws` in native/library.py.
struct OvfDraws {
    int64_t rows, vocab, threads;
    const float* logits;             // [rows, vocab]
    const double *temperatures, *top_p, *min_p, *u;  // [rows]
    const int64_t* top_k;            // [rows]; `vocab` disables top-k
    int64_t* chosen;                 // [rows]; -1 if a logit is NaN or the largest is not finite
};
}

namespace ovf {

constexpr size_t BLOCK = 256;  // tokens per partial sum of weights

// One thread's scratch memory for a row.
struct DrawScratch {
    std::vector<float> weights, tops, copy;
    std::vector<double> sums;
    std::vector<int32_t> ids;
};

inline double block_sum(const float* w, size_t n) {
    __m512d sum = _mm512_setzero_pd();
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), w + i);
        sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
        sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
    return _mm512_reduce_add_pd(sum);
}

// Writes the ids of values >= `least` (> `least` if `strictly`) to `ids`, in order.
inline void select(const float* values, size_t n, float least, bool strictly, std::vector<int32_t>& ids) {
    ids.resize(n + 16);
    size_t count = 0;
    const __m512 bound = _mm512_set1_ps(least);
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 real = lanes(n - i);
        const __m512 v = _mm512_maskz_loadu_ps(real, values + i);
        const __mmask16 selected = strictly ? _mm512_mask_cmp_ps_mask(real, v, bound, _CMP_GT_OQ)
                                         : _mm512_mask_cmp_ps_mask(real, v, bound, _CMP_GE_OQ);
        if (!selected) continue;
        const __m512i own = _mm512_add_epi32(counting, _mm512_set1_epi32(static_cast<int>(i)));
        _mm512_storeu_si512(ids.data() + count, _mm512_maskz_compress_epi32(selected, own));
        count += __builtin_popcount(selected);
    }
    ids.resize(count);
}

inline float kth_largest(float* values, size_t n, size_t k) {
    std::nth_element(values, values + (k - 1), values + n, std::greater<float>());
    return values[k - 1];
}

// The k-th largest logit. The k-th largest of the parts' maxima is a lower bound, so that only logits that reach it are
// compared.
inline float top_k_bound(const float* logits, size_t n, size_t k, DrawScratch& s) {
    constexpr size_t PART = 64;
    const size_t parts = n / PART;
    if (k > parts) {
        s.copy.assign(logits, logits + n);
        return kth_largest(s.copy.data(), n, k);
    }
    s.tops.resize(parts);
    for (size_t p = 0; p < parts; ++p) {
        __m512 top = _mm512_loadu_ps(logits + p * PART);
        for (size_t i = 16; i < PART; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(logits + p * PART + i));
        s.tops[p] = _mm512_reduce_max_ps(top);
    }
    select(logits, n, kth_largest(s.tops.data(), parts, k), false, s.ids);
    s.copy.clear();
    for (int32_t id : s.ids) s.copy.push_back(logits[id]);
    return kth_largest(s.copy.data(), s.copy.size(), k);
}

// Reduces `ids` to the smallest set of most likely tokens whose weight is at least `mass`; among equals, lower ids
// first.
inline void keep_mass(const float* weights, double mass, std::vector<int32_t>& ids) {
    const auto later = [&](int32_t a, int32_t b) {
        return weights[a] != weights[b] ? weights[a] < weights[b] : a > b;
    };
    std::make_heap(ids.begin(), ids.end(), later);
    auto end = ids.end();
    for (double before = 0; end != ids.begin() && before < mass; before += weights[*end]) {
        std::pop_heap(ids.begin(), end, later);
        --end;
    }
    ids.erase(ids.begin(), end);
}

inline int64_t draw_filtered(const float* logits, size_t n, const OvfDraws& d, size_t row, double total,
                             DrawScratch& s) {
    const float* w = s.weights.data();
    const double top_p = d.top_p[row];
    double mass = total;
    std::vector<int32_t>& ids = s.ids;
    bool all = true;
    if (d.top_k[row] < static_cast<int64_t>(n)) {
        select(logits, n, top_k_bound(logits, n, d.top_k[row], s), false, ids);
        all = false;
        mass = 0;
        for (int32_t id : ids) mass += w[id];
    }
    if (top_p < 1) {
        // Tokens below this weight together have at most the mass that top-p drops.
        const float share = static_cast<float>((1 - top_p) * mass / static_cast<double>(n) * 0.999);
        if (all) select(w, n, share, true, ids);
        keep_mass(w, top_p * mass, ids);
        all = false;
    }
    const float least = static_cast<float>(d.min_p[row]);
    if (all) select(w, n, least, false, ids);
    else ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int32_t id) { return w[id] < least; }), ids.end());
    std::sort(ids.begin(), ids.end());
    mass = 0;
    for (int32_t id : ids) mass += w[id];
    double cumulative = 0;
    int64_t last = -1;
    for (int32_t id : ids) {
        if (w[id] == 0) continue;
        last = id;
        cumulative += w[id];
        if (cumulative > d.u[row] * mass) break;
    }
    return last;
}

inline int64_t draw(const OvfDraws& d, size_t row, DrawScratch& s) {
    const size_t n = d.vocab, blocks = (n + BLOCK - 1) / BLOCK;
    const float* logits = d.logits + row * n;
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    __mmask16 broken = 0;
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 real = lanes(n - i);
        const __m512 x = _mm512_maskz_loadu_ps(real, logits + i);
        broken |= _mm512_mask_cmp_ps_mask(real, x, x, _CMP_UNORD_Q);
        top = _mm512_mask_max_ps(top, real, top, x);
    }
    const float highest = _mm512_reduce_max_ps(top);
    if (broken || !(__builtin_fabsf(highest) < __builtin_inff())) return -1;
    s.weights.resize(round_up(n, BLOCK)), s.sums.resize(blocks);
    const double inverse = 1 / d.temperatures[row];
    const __m512 factor = _mm512_set1_ps(inverse < 3e38 ? static_cast<float>(inverse) : 3e38f);
    double total = 0;
    for (size_t b = 0; b < blocks; ++b) {
        const size_t start = b * BLOCK, count = n - start < BLOCK ? n - start : BLOCK;
        for (size_t i = start; i < start + count; i += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(lanes(n - i), logits + i);
            const __m512 y = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(highest)), factor);
            const __mmask16 some = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-87.0f), _CMP_GT_OQ) & lanes(n - i);
            _mm512_storeu_ps(s.weights.data() + i, _mm512_maskz_mov_ps(some, exp_ps(y)));
        }
        total += s.sums[b] = block_sum(s.weights.data() + start, count);
    }
    if (d.top_k[row] < d.vocab || d.top_p[row] < 1 || d.min_p[row] > 0) return draw_filtered(logits, n, d, row, total, s);
    const double target = d.u[row] * total;
    double before = 0;
    int64_t last = -1;
    for (size_t b = 0; b < blocks; ++b) {
        if (s.sums[b] == 0) continue;
        if (b + 1 < blocks && before + s.sums[b] <= target) {
            before += s.sums[b];
            for (size_t i = BLOCK; i-- > 0;)  // last token with weight, in case rounding leaves none after it
                if (s.weights[b * BLOCK + i] > 0) {
                    last = b * BLOCK + i;
                    break;
                }
            continue;
        }
        double cumulative = before;
        for (size_t i = b * BLOCK; i < n && i < (b + 1) * BLOCK; ++i) {
            if (s.weights[i] == 0) continue;
            last = i;
            cumulative += s.weights[i];
            if (cumulative > target) return last;
        }
        before = cumulative;
    }
    return last;
}

}  // namespace ovf
