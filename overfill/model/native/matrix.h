// Weight matrices in the kernels' layout, and products with them.
//
// A matrix [rows, cols] is divided into panels of 32 rows. A panel is a sequence of steps; each step has four bytes of
// each row: two columns in bfloat16, or four columns in int8 in the order 0, 2, 1, 3. One instruction multiplies a
// broadcast pair of activations with the pairs of sixteen rows and adds both products:
//
// - bfloat16: VDPBF16PS.
// - int8: VPDPWSSD. Even and odd bytes are each widened to a pair of int16 and multiplied with activations that are
//   rounded to int16, relative to the largest of their row. Sums are exact: an int32 sum has the products of at most
//   `EXACT_COLUMNS` columns, and float64 adds these sums. The total is rounded to float32 once.
//
// A thread reads its panels from front to back.
//
// Steps of many rows use AMX tiles if the CPU has them. AMX sums bfloat16 in another order. With int8 weights it
// multiplies the upper and the lower bytes of int16 activations separately. While these sums are below 2^24, as nearly
// all are, the results are equal to the last bit.
#pragma once
#include <algorithm>

#include "amx.h"

namespace ovf {

constexpr size_t PANEL = 32;   // rows of a panel: two vectors of float32 sums
constexpr int MAX_TILE = 12;   // activation rows of a tile: 24 sums, 2 weights and a broadcast fit the 32 registers
constexpr size_t STRIP = 192;  // activation rows that stay in the second-level cache while all panels are read
constexpr size_t MIN_ROWS_PER_THREAD = 128;  // with as many activation rows, threads share rows; with fewer, panels
constexpr size_t STEP_BYTES = 4 * PANEL;
constexpr size_t EXACT_COLUMNS = 512;  // 512 * 127 * 32768 fits 31 bits
constexpr size_t ROW_UNIT = 64;   // operand rows are padded with zeros to a multiple of it, because AMX reads them
constexpr size_t AMX_BLOCK = 32;  // operand rows that AMX reads at once; they must be allocated, with any contents
constexpr size_t AMX_STRIP_BYTES = 1 << 20;  // operands that stay in the second-level cache while all panels are read

struct Matrix {
    size_t rows = 0, cols = 0;
    bool int8 = false;
    void* data = nullptr;           // bf16 or int8, [panels][steps][32][2 or 4]
    const float* scales = nullptr;  // [panels * 32], int8 only

    size_t panels() const { return (rows + PANEL - 1) / PANEL; }
    size_t columns_a_step() const { return int8 ? 4 : 2; }
    size_t steps() const { return (cols + columns_a_step() - 1) / columns_a_step(); }
    size_t panel_bytes() const { return steps() * STEP_BYTES; }
    const char* panel(size_t p) const { return static_cast<const char*>(data) + p * panel_bytes(); }
};

// Format of the activations of a product.
enum class Operand {
    BF16,
    INT16,        // with a scale per row
    INT16_BYTES,  // INT16 for AMX: of every 64 columns upper, then lower bytes, each four as 0, 2, 1, 3
};

// The activations of a product: rows that are `stride` 16-bit elements apart.
struct Activations {
    const uint16_t* data = nullptr;
    const float* scales = nullptr;  // null for bfloat16
    size_t stride = 0;
    bool amx = false;  // multiply in AMX tiles
};

// Stores x [n] as an operand. A NaN or infinity in x makes the scale NaN.
inline void store_operand(const float* x, size_t n, Operand kind, uint16_t* out, float* scale) {
    __m512 factor = _mm512_set1_ps(1.0f);
    if (kind != Operand::BF16) {
        const auto [top, nan_or_zero] = extent(n, [&](size_t i) { return _mm512_maskz_loadu_ps(lanes(n - i), x + i); });
        *scale = top / 32767.0f + nan_or_zero;
        factor = _mm512_set1_ps(top > 1e-30f ? 32767.0f / top : 0.0f);
    }
    for (size_t i = 0; i < round_up(n, ROW_UNIT); i += 16) {
        const __m512 v = i < n ? _mm512_maskz_loadu_ps(lanes(n - i), x + i) : _mm512_setzero_ps();
        if (kind == Operand::BF16) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), narrow(v));
            continue;
        }
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, factor));
        if (kind == Operand::INT16) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtsepi32_epi16(whole));
            continue;
        }
        const __m256i x16 = _mm512_cvtsepi32_epi16(_mm512_shuffle_epi32(whole, _MM_PERM_DBCA));
        __m128i* to = reinterpret_cast<__m128i*>(reinterpret_cast<char*>(out + i / 64 * 64) + i % 64);
        _mm_storeu_si128(to, _mm256_cvtepi16_epi8(_mm256_srai_epi16(x16, 8)));
        _mm_storeu_si128(to + 4, _mm256_cvtepi16_epi8(x16));
    }
}

// Adds both products of every pair to `sums`. It is assembly, because around the intrinsic compilers copy the sums
// until they run out of registers.
template <bool INT8>
inline __attribute__((always_inline)) void add_products(__m512i& sums, __m512i x, __m512i w) {
    if constexpr (INT8) asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    else asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

// Sums a tile over the steps from `begin` to `end` into out [TILE][32], float32 or int32; other parameters as in `tile`.
// A function of its own, because the compiler keeps its sums in registers only if nothing else is live.
template <int TILE, bool INT8>
__attribute__((noinline)) void sum_steps(const uint16_t* a, size_t stride, const char* panel, size_t begin, size_t end,
                                         const char* ahead, size_t fetch, void* out, size_t out_stride) {
    __m512i low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int r = 0; r < TILE; ++r) low[r] = high[r] = _mm512_setzero_si512();
    // With four bases every row is base + {0, 1, 2} * stride, which is an x86 addressing mode.
    const uint16_t* base[4];
    for (int i = 0; i < 4; ++i) base[i] = a + 3 * i * stride;
    for (size_t k = begin; k < end; ++k) {
        const __m512i* w = reinterpret_cast<const __m512i*>(panel + k * STEP_BYTES);
        _mm_prefetch(ahead + k * fetch, _MM_HINT_T1);
        if constexpr (TILE < MAX_TILE) _mm_prefetch(ahead + k * fetch + 64, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int part = 0; part < (INT8 ? 2 : 1); ++part) {
            __m512i w0 = w[0], w1 = w[1];
            if constexpr (INT8) {
                if (part == 0) w0 = _mm512_slli_epi16(w0, 8), w1 = _mm512_slli_epi16(w1, 8);
                w0 = _mm512_srai_epi16(w0, 8), w1 = _mm512_srai_epi16(w1, 8);
            }
#pragma GCC unroll 12
            for (int r = 0; r < TILE; ++r) {
                int pair;
                memcpy(&pair, base[r / 3] + (r % 3) * stride + (INT8 ? 4 : 2) * k + 2 * part, 4);
                const __m512i x = _mm512_set1_epi32(pair);
                add_products<INT8>(low[r], x, w0);
                add_products<INT8>(high[r], x, w1);
            }
        }
    }
    int32_t* row = static_cast<int32_t*>(out);
#pragma GCC unroll 12
    for (int r = 0; r < TILE; ++r) {
        _mm512_store_si512(row + r * out_stride, low[r]);
        _mm512_store_si512(row + r * out_stride + 16, high[r]);
    }
}

// Computes a tile: TILE activation rows times one panel into out [TILE][32] float32, rows `out_stride` elements apart.
// Int8 scales are not applied. Fetches `fetch` bytes per step from `ahead` into the second-level cache.
template <int TILE, bool INT8>
void tile(const uint16_t* a, size_t stride, const char* panel, size_t steps, const char* ahead, size_t fetch,
          float* out, size_t out_stride) {
    if constexpr (!INT8) {
        sum_steps<TILE, INT8>(a, stride, panel, 0, steps, ahead, fetch, out, out_stride);
    } else {
        alignas(64) int32_t sums[TILE][PANEL];
        alignas(64) double exact[TILE][PANEL];
        for (size_t begin = 0; begin < steps; begin += EXACT_COLUMNS / 4) {
            const size_t end = std::min(steps, begin + EXACT_COLUMNS / 4);
            sum_steps<TILE, INT8>(a, stride, panel, begin, end, ahead, fetch, sums, PANEL);
            for (size_t i = 0; i < TILE * PANEL; i += 16) {
                const __m512i x = _mm512_load_si512(&sums[0][i]);
                double* total = &exact[0][i];
                __m512d front = _mm512_cvtepi32_pd(_mm512_castsi512_si256(x));
                __m512d back = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1));
                if (begin > 0) {
                    front = _mm512_add_pd(front, _mm512_load_pd(total));
                    back = _mm512_add_pd(back, _mm512_load_pd(total + 8));
                }
                if (end < steps) {
                    _mm512_store_pd(total, front);
                    _mm512_store_pd(total + 8, back);
                } else {
                    const __m512 once = _mm512_castps256_ps512(_mm512_cvtpd_ps(front));
                    const __m512 both = _mm512_insertf32x8(once, _mm512_cvtpd_ps(back), 1);
                    _mm512_store_ps(out + i / PANEL * out_stride + i % PANEL, both);
                }
            }
        }
    }
}

using TileFunction = void (*)(const uint16_t*, size_t, const char*, size_t, const char*, size_t, float*, size_t);

template <bool INT8>
inline TileFunction tile_of(int rows) {
    static constexpr TileFunction functions[] = {
        tile<1, INT8>, tile<2, INT8>, tile<3, INT8>, tile<4, INT8>,  tile<5, INT8>,  tile<6, INT8>,
        tile<7, INT8>, tile<8, INT8>, tile<9, INT8>, tile<10, INT8>, tile<11, INT8>, tile<12, INT8>,
    };
    return functions[rows - 1];
}

// Number of tiles over `rows` rows, and the first row of tile `i`; the tiles have nearly equal heights.
inline size_t tiles_over(size_t rows) { return (rows + MAX_TILE - 1) / MAX_TILE; }
inline size_t tile_start(size_t rows, size_t tiles, size_t i) { return rows * i / tiles; }

// Passes one row of a panel's sums to `sink`, as float32 with int8 scales applied.
template <class Sink>
inline void emit_row(const Matrix& w, const Activations& a, size_t row, size_t p, __m512 low, __m512 high, Sink& sink) {
    if (w.int8) {
        const __m512 scale = _mm512_set1_ps(a.scales[row]);
        const float* own = w.scales + p * PANEL;
        low = _mm512_mul_ps(low, _mm512_mul_ps(scale, _mm512_loadu_ps(own)));
        high = _mm512_mul_ps(high, _mm512_mul_ps(scale, _mm512_loadu_ps(own + 16)));
    }
    sink(row, p, low, high);
}

// Implements `multiply` in AMX tiles.
template <class Sink>
void multiply_amx(const Matrix& w, const Activations& a, size_t count, size_t first, size_t last, Sink& sink) {
    const AmxScope scope;
    const size_t steps = w.steps(), bytes = w.panel_bytes(), rest = steps % AMX_STEPS, whole = steps - rest;
    const size_t loads = (steps + AMX_STEPS - 1) / AMX_STEPS, stride = a.stride * sizeof(uint16_t);
    const size_t height = w.int8 ? AMX_ROWS : AMX_BLOCK;
    // Strips have equal heights; a low last strip would not have enough arithmetic to hide the reading of the panels.
    const size_t strips = (count * stride + AMX_STRIP_BYTES - 1) / AMX_STRIP_BYTES;
    const size_t strip_rows = round_up((count + strips - 1) / strips, AMX_BLOCK);
    alignas(64) char end[AMX_STEPS * STEP_BYTES] = {};  // steps behind a panel's last whole tile, and zeros
    alignas(64) float out[AMX_BLOCK * PANEL];
    for (size_t strip = 0; strip < count; strip += strip_rows) {
        const size_t stop = std::min(count, strip + strip_rows), blocks = (stop - strip + height - 1) / height;
        // As in `multiply`, a single block fetches ahead in its own panel; several blocks share the next panel.
        const size_t fetch = round_up(bytes / loads / blocks, 64);
        for (size_t p = first; p < last; ++p) {
            const char* panel = w.panel(p);
            memcpy(end, panel + whole * STEP_BYTES, rest * STEP_BYTES);
            for (size_t row = strip; row < stop; row += height) {
                const char* ahead = blocks == 1 ? panel + 8192 : panel + bytes + (row - strip) / height * fetch * loads;
                const size_t rows = std::min(height, stop - row);
                const char* x = reinterpret_cast<const char*>(a.data + row * a.stride);
                const auto run = [&]<AmxKind KIND>() {
                    amx_tile<KIND>(x, stride, panel, steps, end, ahead, fetch, out, PANEL * sizeof(float));
                };
                if (w.int8) run.template operator()<AmxKind::INT8>();
                else if (rows <= AMX_ROWS) run.template operator()<AmxKind::BF16_SHORT>();
                else run.template operator()<AmxKind::BF16>();
                for (size_t r = 0; r < rows; ++r) {
                    const float* sums = out + r * PANEL;
                    __m512 half[2];
                    for (size_t i = 0; i < 2; ++i) {
                        half[i] = _mm512_load_ps(sums + 16 * i);
                        if (!w.int8) continue;
                        const __m512i lower = _mm512_load_si512(sums + AMX_ROWS * PANEL + 16 * i);
                        const __m512 upper = _mm512_cvtepi32_ps((__m512i)half[i]);
                        half[i] = _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(lower));
                    }
                    emit_row(w, a, row + r, p, half[0], half[1], sink);
                }
            }
        }
    }
}

// Computes this thread's share of a @ w.T for `count` rows of a. With few rows, that is some panels of all rows. With
// many rows, it is all panels of the rows that this thread also normalises and rotates, so that they stay in its core's
// caches.
// Calls `sink(row, panel, low, high)` with the sums of the panel's first and second sixteen rows, scales applied.
template <class Sink>
void multiply(const Matrix& w, const Activations& a, size_t count, int thread, int threads, Sink sink) {
    const size_t steps = w.steps(), panels = w.panels(), bytes = w.panel_bytes();
    const bool by_rows = !a.amx && count >= MIN_ROWS_PER_THREAD * threads;
    const size_t first = by_rows ? 0 : panels * thread / threads, last = by_rows ? panels : panels * (thread + 1) / threads;
    if (a.amx) return multiply_amx(w, a, count, first, last, sink);
    const size_t begin = by_rows ? count * thread / threads : 0, end = by_rows ? count * (thread + 1) / threads : count;
    alignas(64) float out[MAX_TILE * PANEL];
    const size_t strips = (end - begin + STRIP - 1) / STRIP;  // of nearly equal heights
    for (size_t i = 0; i < strips; ++i) {
        const size_t strip = begin + (end - begin) * i / strips, rows = begin + (end - begin) * (i + 1) / strips - strip;
        const size_t tiles = tiles_over(rows);
        for (size_t p = first; p < last; ++p) {
            const char* panel = w.panel(p);
            for (size_t t = 0; t < tiles; ++t) {
                const size_t start = tile_start(rows, tiles, t), height = tile_start(rows, tiles, t + 1) - start;
                // A single tile waits for memory and fetches ahead in its own panel. The more it computes per step, the
                // further it must fetch, because the hardware then prefetches less far. Several tiles share the next
                // panel.
                const size_t fetch = STEP_BYTES / tiles, distance = height < 5 ? 2048 : 8192;
                const char* ahead = tiles == 1 ? panel + distance : panel + bytes + t * (bytes / tiles);
                const size_t row = strip + start;
                const TileFunction run = w.int8 ? tile_of<true>(height) : tile_of<false>(height);
                run(a.data + row * a.stride, a.stride, panel, steps, ahead, fetch, out, PANEL);
                for (size_t r = 0; r < height; ++r)
                    emit_row(w, a, row + r, p, _mm512_load_ps(out + r * PANEL), _mm512_load_ps(out + r * PANEL + 16), sink);
            }
        }
    }
}

// Fills `w.data` from `source`, [rows][cols] of T. Row i comes from source row `row_of(i)`; -1 makes it zeros.
template <class T, class RowOf>
void pack(const Matrix& w, const T* source, RowOf row_of) {
    constexpr size_t COLUMNS = 4 / sizeof(T), PLACES[] = {0, COLUMNS == 4 ? 2 : 1, 1, 3};
    T* out = static_cast<T*>(w.data);
    for (size_t p = 0; p < w.panels(); ++p, out += w.steps() * PANEL * COLUMNS)
        for (size_t r = 0; r < PANEL; ++r) {
            const ptrdiff_t row = row_of(p * PANEL + r);
            for (size_t k = 0; k < COLUMNS * w.steps(); ++k)
                out[(k / COLUMNS * PANEL + r) * COLUMNS + PLACES[k % COLUMNS]] =
                    row >= 0 && k < w.cols ? source[row * w.cols + k] : T(0);
        }
}

}  // namespace ovf
