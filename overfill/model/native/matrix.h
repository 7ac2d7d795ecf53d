// Weight matrices in the kernels' layout, and products with them.
//
// A matrix [rows, cols] is cut into panels of 32 rows. A panel holds, for every pair of columns, that pair of all its
// rows: [pairs][32][2]. One instruction then multiplies a pair of activations, broadcast, with sixteen rows' pairs and
// adds both products: VDPBF16PS for bfloat16, VPDPWSSD for int8, which is widened to int16 on the way and multiplied
// with activations rounded to int16 (13 bits or more, see `Activations`). Memory is read once, front to back.
#pragma once
#include "simd.h"

namespace ovf {

constexpr int PANEL = 32;      // rows of a panel: two vectors of float32 sums
constexpr int MAX_TILE = 12;   // activations rows of a tile: 24 sums, 2 weights and a broadcast fill the 32 registers
constexpr int STRIP = 192;     // activation rows that stay in the second-level cache while the panels pass

struct Matrix {
    size_t rows = 0, cols = 0;
    void* data = nullptr;           // bf16 or int8, [panels][pairs][32][2]
    const float* scales = nullptr;  // int8: [panels * 32]

    bool is_int8() const { return scales != nullptr; }
    size_t panels() const { return (rows + PANEL - 1) / PANEL; }
    size_t pairs() const { return (cols + 1) / 2; }
    size_t panel_bytes() const { return pairs() * PANEL * 2 * (is_int8() ? 1 : 2); }
    const char* panel(size_t p) const { return static_cast<const char*>(data) + p * panel_bytes(); }
};

// Rows of a product's other side: bfloat16, or int16 with a scale per row. Rows are `stride` elements apart.
struct Activations {
    const uint16_t* data = nullptr;
    const float* scales = nullptr;  // int16 only
    size_t stride = 0;
};

// Largest int16 magnitude whose products with int8 weights cannot overflow a sum over `cols` columns.
inline float int16_limit(size_t cols) {
    const double limit = 2147483647.0 / (127.0 * static_cast<double>(cols));
    return limit > 32767.0 ? 32767.0f : static_cast<float>(static_cast<int>(limit));
}

// x [n] as an operand for `weights`: bfloat16, or int16 and its scale. A NaN or infinity makes the scale NaN.
inline void store_operand(const float* x, size_t n, bool as_int16, uint16_t* out, float* scale) {
    __m512 factor = _mm512_set1_ps(1.0f);
    if (as_int16) {
        __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
        for (size_t i = 0; i < n; i += 16) {
            const __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
            poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
        }
        const float limit = int16_limit(n), top = _mm512_reduce_max_ps(largest);
        *scale = top / limit + _mm512_reduce_add_ps(poison);
        factor = _mm512_set1_ps(top > 0 ? limit / top : 0.0f);
    }
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
        const __m256i packed =
            as_int16 ? _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor))) : narrow(v);
        // The element after an odd last one is multiplied with a zero weight: it must be a number.
        _mm256_mask_storeu_epi16(out + i, lanes(round_up(n - i, 2)), packed);
    }
}

// sums += both products of every pair. In assembly, because compilers copy the sums around the intrinsic, until there
// are no registers left.
template <bool INT8>
inline __attribute__((always_inline)) void add_products(__m512i& sums, __m512i x, __m512i w) {
    if constexpr (INT8) asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    else asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

// A tile: TILE activation rows times one panel -> out [TILE][32] float32; for int8 without the scales.
// `ahead` is fetched into the second-level cache meanwhile, `step` bytes per pair of columns.
template <int TILE, bool INT8>
void tile(const uint16_t* a, size_t stride, const char* panel, size_t pairs, const char* ahead, size_t step,
          float* out) {
    __m512i low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int r = 0; r < TILE; ++r) low[r] = high[r] = _mm512_setzero_si512();
    // Four bases, so that every row is base + {0, 1, 2} * stride: x86 has an address for that.
    const uint16_t* base[4];
    for (int i = 0; i < 4; ++i) base[i] = a + 3 * i * stride;
    for (size_t k = 0; k < pairs; ++k) {
        __m512i w0, w1;
        if constexpr (INT8) {
            const __m256i* w = reinterpret_cast<const __m256i*>(panel + k * 64);
            w0 = _mm512_cvtepi8_epi16(w[0]), w1 = _mm512_cvtepi8_epi16(w[1]);
            _mm_prefetch(ahead + k * step, _MM_HINT_T1);
        } else {
            const __m512i* w = reinterpret_cast<const __m512i*>(panel + k * 128);
            w0 = w[0], w1 = w[1];
            _mm_prefetch(ahead + k * step, _MM_HINT_T1);
            if constexpr (TILE < MAX_TILE) _mm_prefetch(ahead + k * step + 64, _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int r = 0; r < TILE; ++r) {
            int pair;
            memcpy(&pair, base[r / 3] + (r % 3) * stride + 2 * k, 4);
            const __m512i x = _mm512_set1_epi32(pair);
            add_products<INT8>(low[r], x, w0);
            add_products<INT8>(high[r], x, w1);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < TILE; ++r) {
        _mm512_store_ps(out + r * PANEL, INT8 ? _mm512_cvtepi32_ps(low[r]) : (__m512)low[r]);
        _mm512_store_ps(out + r * PANEL + 16, INT8 ? _mm512_cvtepi32_ps(high[r]) : (__m512)high[r]);
    }
}

using TileFunction = void (*)(const uint16_t*, size_t, const char*, size_t, const char*, size_t, float*);

template <bool INT8>
inline TileFunction tile_of(int rows) {
    static constexpr TileFunction functions[] = {
        tile<1, INT8>, tile<2, INT8>, tile<3, INT8>, tile<4, INT8>,  tile<5, INT8>,  tile<6, INT8>,
        tile<7, INT8>, tile<8, INT8>, tile<9, INT8>, tile<10, INT8>, tile<11, INT8>, tile<12, INT8>,
    };
    return functions[rows - 1];
}

// Tiles of near-equal height over `rows` rows.
inline size_t tiles_over(size_t rows) { return (rows + MAX_TILE - 1) / MAX_TILE; }
inline size_t tile_start(size_t rows, size_t tiles, size_t i) { return rows * i / tiles; }

// This thread's share of a @ w.T, for `count` rows of a. Calls `take(row, panel, low, high)` for every row and panel,
// with the sums of the panel's first and second sixteen rows, scales applied.
template <class Take>
void multiply(const Matrix& w, const Activations& a, size_t count, int thread, int threads, Take take) {
    const size_t pairs = w.pairs(), panels = w.panels(), bytes = w.panel_bytes();
    const size_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
    alignas(64) float out[MAX_TILE * PANEL];
    for (size_t strip = 0; strip < count; strip += STRIP) {
        const size_t rows = count - strip < STRIP ? count - strip : STRIP, tiles = tiles_over(rows);
        for (size_t p = first; p < last; ++p) {
            const char* panel = w.panel(p);
            for (size_t t = 0; t < tiles; ++t) {
                const size_t start = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - start;
                // One tile alone waits for memory, and fetches ahead of itself: the more it computes meanwhile, the
                // further, since the hardware then looks less far. Several tiles share the next panel.
                const size_t step = bytes / pairs / tiles, distance = height < 5 ? 2048 : 8192;
                const char* ahead = tiles == 1 ? panel + distance : panel + bytes + t * (bytes / tiles);
                const size_t row = strip + start;
                const TileFunction run = w.is_int8() ? tile_of<true>(height) : tile_of<false>(height);
                run(a.data + row * a.stride, a.stride, panel, pairs, ahead, step, out);
                for (size_t r = 0; r < height; ++r) {
                    __m512 low = _mm512_load_ps(out + r * PANEL), high = _mm512_load_ps(out + r * PANEL + 16);
                    if (w.is_int8()) {
                        const __m512 scale = _mm512_set1_ps(a.scales[row + r]);
                        const float* own = w.scales + p * PANEL;
                        low = _mm512_mul_ps(low, _mm512_mul_ps(scale, _mm512_loadu_ps(own)));
                        high = _mm512_mul_ps(high, _mm512_mul_ps(scale, _mm512_loadu_ps(own + 16)));
                    }
                    take(row + r, p, low, high);
                }
            }
        }
    }
}

// Fills `w.data` from rows in the usual order, [rows][cols] of T; `row_of(i)` is the source of row i, or -1 for none.
template <class T, class RowOf>
void pack(const Matrix& w, const T* source, RowOf row_of) {
    T* out = static_cast<T*>(w.data);
    for (size_t p = 0; p < w.panels(); ++p, out += w.pairs() * PANEL * 2)
        for (size_t r = 0; r < PANEL; ++r) {
            const ptrdiff_t row = row_of(p * PANEL + r);
            for (size_t k = 0; k < 2 * w.pairs(); ++k)
                out[(k / 2 * PANEL + r) * 2 + k % 2] = row >= 0 && k < w.cols ? source[row * w.cols + k] : T(0);
        }
}

}  // namespace ovf
