// Vector functions that the kernels share: bfloat16 conversion, exp, reductions. AVX-512 with BF16 and VNNI.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ovf {

using bf16 = uint16_t;

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline __mmask16 lanes(size_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// e^x for x clamped to -87.3..88, with a relative error of about 2^-23. The operand order of max keeps NaN.
inline __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// 2^x for weights that become bfloat16, with a relative error of 1e-4. Infinite if it overflows; NaN stays NaN.
inline __m512 exp2_coarse(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 n = _mm512_roundscale_ps(x, 8);
    const __m512 r = _mm512_sub_ps(x, n);  // -0.5 .. 0.5
    __m512 p = _mm512_set1_ps(5.5502e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9315e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// largest: maximum magnitude of n numbers, ignoring NaN. nan_or_zero: NaN if a number is not finite, else 0.
struct Extent {
    float largest, nan_or_zero;
};

// Computes the extent of n numbers; `load(i)` returns numbers i to i + 16, with zeros from n on.
template <class Load>
inline Extent extent(size_t n, Load load) {
    __m512 largest = _mm512_setzero_ps(), nan_or_zero = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = load(i);
        largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
        nan_or_zero = _mm512_fmadd_ps(v, _mm512_setzero_ps(), nan_or_zero);
    }
    return {_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(nan_or_zero)};
}

// Lane i is the sum of vector v[i]. With WHOLE, the elements are int32.
template <bool WHOLE = false>
inline __m512 sums_of_16(const __m512* v) {
    const auto add = [](__m512 a, __m512 b) {
        return WHOLE ? (__m512)_mm512_add_epi32((__m512i)a, (__m512i)b) : _mm512_add_ps(a, b);
    };
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 *a = v + 4 * i;
        const __m512 ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        const __m512 cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        four[i] = add(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    }
    const __m512 u = add(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                                   _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    const __m512 w = add(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                                   _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return add(_mm512_shuffle_f32x4(u, w, 0x88), _mm512_shuffle_f32x4(u, w, 0xdd));
}

}  // namespace ovf
