// Draws tokens from rows of logits, as model/sampling.py defines it: temperature, top-k, top-p and min-p, then an
// exponential race. The vocabulary is never sorted, and groups of tokens that cannot win get no random words.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "simd.h"

extern "C" {
// Rows to draw from. Matches `Draws` in native/library.py.
struct OvfDraws {
    int64_t rows, vocab, threads;
    const float* logits;                         // [rows, vocab]
    const double *temperatures, *top_p, *min_p;  // [rows]
    const int64_t* top_k;                        // [rows]; `vocab` disables top-k
    const uint64_t* seeds;                       // [rows]
    const uint32_t *positions, *sample_indices;  // [rows]
    int64_t* chosen;                             // [rows]; -1 if a logit is NaN or the largest is not finite
};
}

namespace ovf {

constexpr size_t GROUP = 64;  // tokens whose random words are made together
constexpr float INFINITE = __builtin_inff();

// One thread's scratch memory for a row.
struct DrawScratch {
    std::vector<float> tops, kept, weights, few;
};

// A row that is drawn from: its logits, and the greatest of each group and of all.
struct DrawRow {
    const float* logits;
    size_t vocab;
    float highest;
    double temperature;
    const std::vector<float>& tops;

    size_t size_of(size_t group) const { return std::min(GROUP, vocab - group * GROUP); }
    double scaled(float logit) const { return (static_cast<double>(logit) - highest) / temperature; }
};

// What the filters leave: logits above `least`, and those equal to it whose id is at most `last`.
struct Bounds {
    float least = -INFINITE;
    int64_t last = INT64_MAX;
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") for 16 counters. c: their words, which
// become random words.
inline void philox(__m512i c[4], uint64_t key) {
    const __m512i first = _mm512_set1_epi32(static_cast<int>(0xD2511F53)), second = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57));
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    const auto multiply = [](__m512i a, __m512i b, __m512i& high, __m512i& low) {
        const __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
        high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
        low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    };
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        __m512i high0, low0, high1, low1;
        multiply(c[0], first, high0, low0);
        multiply(c[2], second, high1, low1);
        c[0] = _mm512_xor_si512(_mm512_xor_si512(high1, c[1]), _mm512_set1_epi32(static_cast<int>(k0)));
        c[2] = _mm512_xor_si512(_mm512_xor_si512(high0, c[3]), _mm512_set1_epi32(static_cast<int>(k1)));
        c[1] = low1, c[3] = low0;
    }
}

// The words of a group's tokens, in the order of their ids.
inline void group_words(uint64_t seed, uint32_t position, uint32_t sample_index, size_t group, __m512i words[4]) {
    // With this order of counters, unpacking alone brings the words into the order of ids.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i c[4] = {
        _mm512_set1_epi32(static_cast<int>(position)), _mm512_set1_epi32(static_cast<int>(sample_index)),
        _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(group * (GROUP / 4)))), _mm512_setzero_si512()};
    philox(c, seed);
    const __m512i low01 = _mm512_unpacklo_epi32(c[0], c[1]), low23 = _mm512_unpacklo_epi32(c[2], c[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(c[0], c[1]), high23 = _mm512_unpackhi_epi32(c[2], c[3]);
    words[0] = _mm512_unpacklo_epi64(low01, low23), words[1] = _mm512_unpackhi_epi64(low01, low23);
    words[2] = _mm512_unpacklo_epi64(high01, high23), words[3] = _mm512_unpackhi_epi64(high01, high23);
}

inline __mmask16 inside_of(__mmask16 real, __m512 x, float low, float high) {
    const __mmask16 enough = _mm512_mask_cmp_ps_mask(real, x, _mm512_set1_ps(low), _CMP_GE_OQ);
    return _mm512_mask_cmp_ps_mask(enough, x, _mm512_set1_ps(high), _CMP_LT_OQ);
}

inline __m512d add_to(__m512d sum, __m512 x) {
    sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    return _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}

// Writes the values in [low, high) to `out`, which has room for n + 16, in order. Returns their number.
inline size_t pick(const float* values, size_t n, float low, float high, float* out) {
    size_t count = 0;
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 real = lanes(n - i);
        const __m512 x = _mm512_maskz_loadu_ps(real, values + i);
        const __mmask16 inside = inside_of(real, x, low, high);
        _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(inside, x));
        count += __builtin_popcount(inside);
    }
    return count;
}

// Writes the logits >= `least` to `out`, in order.
inline void select(const DrawRow& row, float least, std::vector<float>& out) {
    out.resize(row.vocab + 16);
    size_t count = 0;
    for (size_t g = 0; g < row.tops.size(); ++g)
        if (row.tops[g] >= least) count += pick(row.logits + g * GROUP, row.size_of(g), least, INFINITE, out.data() + count);
    out.resize(count);
}

inline float kth_largest(std::vector<float>& values, size_t k) {
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[k - 1];
}

// The k-th largest logit. The k-th largest of the groups' maxima is a lower bound, so that only logits that reach it are
// compared.
inline float top_k_bound(const DrawRow& row, size_t k, DrawScratch& s) {
    float least = -INFINITE;
    if (k <= row.tops.size()) {
        s.few = row.tops;
        least = kth_largest(s.few, k);
    }
    select(row, least, s.kept);
    return kth_largest(s.kept, k);
}

// Writes exp((logit - highest) / temperature) of `logits` to `weights`, and returns their sum.
inline double weigh(const DrawRow& row, const std::vector<float>& logits, std::vector<float>& weights) {
    weights.resize(round_up(logits.size(), 16));
    const __m512 factor = _mm512_set1_ps(static_cast<float>(1 / row.temperature));
    __m512d sum = _mm512_setzero_pd();
    for (size_t i = 0; i < logits.size(); i += 16) {
        const __mmask16 real = lanes(logits.size() - i);
        const __m512 x = _mm512_maskz_loadu_ps(real, logits.data() + i);
        const __m512 y = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(row.highest)), factor);
        const __mmask16 some = _mm512_mask_cmp_ps_mask(real, y, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
        const __m512 w = _mm512_maskz_mov_ps(some, exp_ps(y));
        _mm512_storeu_ps(weights.data() + i, w);
        sum = add_to(sum, w);
    }
    return _mm512_reduce_add_pd(sum);
}

// Sum of the weights, and number, of the logits in [low, high).
inline double mass_between(const std::vector<float>& logits, const std::vector<float>& weights, float low, float high,
                           size_t& count) {
    __m512d sum = _mm512_setzero_pd();
    count = 0;
    for (size_t i = 0; i < logits.size(); i += 16) {
        const __mmask16 real = lanes(logits.size() - i);
        const __m512 x = _mm512_maskz_loadu_ps(real, logits.data() + i);
        const __mmask16 inside = inside_of(real, x, low, high);
        count += __builtin_popcount(inside);
        sum = add_to(sum, _mm512_maskz_loadu_ps(inside, weights.data() + i));
    }
    return _mm512_reduce_add_pd(sum);
}

// Bounds of the smallest set of most likely tokens that has `top_p` of the mass of the logits >= `least`; among equals,
// lower ids first.
inline Bounds top_p_bounds(const DrawRow& row, double top_p, float least, DrawScratch& s) {
    select(row, least, s.kept);
    const double total = weigh(row, s.kept, s.weights), target = top_p * total;
    // Tokens below this weight together have less than the mass that top-p drops.
    const double share = 0.999 * (1 - top_p) * total / row.vocab;
    // The boundary is the logit at which the mass of those above it reaches the target. Halving finds a short interval
    // [low, high) around it.
    float low = std::max<double>(std::max(least, -3e38f), row.highest + row.temperature * std::log(share));
    float high = std::nextafter(row.highest, INFINITE);
    if (low > least) select(row, low, s.kept), weigh(row, s.kept, s.weights);
    low = *std::min_element(s.kept.begin(), s.kept.end());  // at high temperatures far above the bound by weight
    double above = 0;
    size_t between = s.kept.size();
    for (int halvings = 0; between > 64 && halvings < 24; ++halvings) {
        const float middle = low + (high - low) / 2;
        if (!(low < middle && middle < high)) break;
        size_t count;
        const double mass = mass_between(s.kept, s.weights, middle, high, count);
        if (above + mass >= target) low = middle, between = count;
        else high = middle, above += mass, between -= std::min(between, count);
    }
    s.few.resize(s.kept.size() + 16);
    s.few.resize(pick(s.kept.data(), s.kept.size(), low, high, s.few.data()));
    std::sort(s.few.begin(), s.few.end(), std::greater<float>());
    size_t count = 0;
    double weight = 0;
    for (; count < s.few.size() && (count == 0 || above < target); ++count) {
        if (count == 0 || s.few[count] != s.few[count - 1]) weight = std::exp(row.scaled(s.few[count]));
        above += weight;
    }
    Bounds bounds{s.few[count - 1]};
    if (count == s.few.size() || s.few[count] != bounds.least) return bounds;
    size_t equal = s.few.begin() + count - std::find(s.few.begin(), s.few.end(), bounds.least);
    for (size_t id = 0; equal > 0; ++id)
        if (row.logits[id] == bounds.least) --equal, bounds.last = id;
    return bounds;
}

// The token that wins the race among those within the bounds.
inline int64_t race(const DrawRow& row, const Bounds& bounds, const OvfDraws& d, size_t index) {
    constexpr double HIGHEST_LUCK = 22.9;  // -log e lies between -2.82 and 22.9
    double best = -2.82;                   // the greatest logit has a higher key
    int64_t winner = -1;
    const __m512 factor = _mm512_set1_ps(static_cast<float>(1 / row.temperature));
    const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (size_t g = 0; g < row.tops.size(); ++g) {
        if (row.tops[g] < bounds.least || row.scaled(row.tops[g]) + HIGHEST_LUCK < best) continue;
        __m512i words[4];
        group_words(d.seeds[index], d.positions[index], d.sample_indices[index], g, words);
        for (size_t i = 0; i < row.size_of(g); i += 16) {
            const size_t start = g * GROUP + i;
            const __m512 x = _mm512_maskz_loadu_ps(lanes(row.size_of(g) - i), row.logits + start);
            // As e >= v, -log v bounds -log e. A float's bits, as a number, are at most 2^23 (127 + log2) of it.
            const __m512 w = _mm512_add_ps(_mm512_cvtepu32_ps(words[i / 16]), _mm512_set1_ps(0.5f));
            const __m512 log2 = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(w)), _mm512_set1_ps(1.0f / (1 << 23)));
            const __m512 luck = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(127 + 32), log2), _mm512_set1_ps(0.69314718f));
            const __m512 y = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(row.highest)), factor);
            const __m512 least_key = _mm512_set1_ps(static_cast<float>(best - 1e-3));
            uint32_t able = _mm512_mask_cmp_ps_mask(lanes(row.size_of(g) - i), _mm512_add_ps(y, luck), least_key, _CMP_GT_OQ);
            if (!able) continue;
            alignas(64) float numbers[16];
            _mm512_store_ps(numbers, w);
            for (; able; able &= able - 1) {
                const int lane = __builtin_ctz(able);
                const int64_t id = start + lane;
                const float logit = row.logits[id];
                if (logit < bounds.least || (logit == bounds.least && id > bounds.last)) continue;
                const float v = std::min(numbers[lane] * 0x1p-32f, 1 - 0x1p-24f);
                const double key = row.scaled(logit) - std::log(-std::log1p(-static_cast<double>(v)));
                if (key > best) best = key, winner = id;
            }
        }
    }
    return winner;
}

inline int64_t draw(const OvfDraws& d, size_t index, DrawScratch& s) {
    const size_t vocab = d.vocab;
    const float* logits = d.logits + index * vocab;
    s.tops.resize((vocab + GROUP - 1) / GROUP);
    float highest = -INFINITE;
    __mmask16 broken = 0;
    for (size_t g = 0; g < s.tops.size(); ++g) {
        __m512 top = _mm512_set1_ps(-INFINITE);
        for (size_t i = g * GROUP; i < std::min(vocab, (g + 1) * GROUP); i += 16) {
            const __mmask16 real = lanes(vocab - i);
            const __m512 x = _mm512_maskz_loadu_ps(real, logits + i);
            broken |= _mm512_mask_cmp_ps_mask(real, x, x, _CMP_UNORD_Q);
            top = _mm512_mask_max_ps(top, real, top, x);
        }
        highest = std::max(highest, s.tops[g] = _mm512_reduce_max_ps(top));
    }
    if (broken || !(__builtin_fabsf(highest) < INFINITE)) return -1;
    const DrawRow row{logits, vocab, highest, std::clamp(d.temperatures[index], 1e-37, 1e37), s.tops};
    Bounds bounds;
    if (d.top_k[index] < d.vocab) bounds.least = top_k_bound(row, d.top_k[index], s);
    if (d.top_p[index] < 1) bounds = top_p_bounds(row, d.top_p[index], bounds.least, s);
    if (d.min_p[index] > 0) {
        const float floor = static_cast<float>(highest + row.temperature * std::log(d.min_p[index]));
        if (floor > bounds.least) bounds = {floor};
    }
    return race(row, bounds, d, index);
}

}  // namespace ovf
