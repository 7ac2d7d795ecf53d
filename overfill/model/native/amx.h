// Products in AMX tiles, on CPUs that have them: one instruction multiplies sixteen rows of activations with sixteen
// rows of weights. The code is assembly, so that one set of compiler flags serves every machine. A compiler that is too
// old for it leaves it out. Panels have the layout of the other kernels: 64 bytes of a panel's step are a row of a
// tile.
#pragma once
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"

#if __has_include(<amxbf16intrin.h>)
#define OVF_AMX 1
#endif

namespace ovf {

constexpr size_t AMX_ROWS = 16;   // rows of a tile
constexpr size_t AMX_STEPS = 16;  // steps of a panel in a tile of weights: 32 columns of bfloat16, 64 of int8
constexpr size_t AMX_COLUMNS = 65536;  // columns of a matrix at most: 65536 * 127 * 255 fits 31 bits

// True if this process may use tiles. Asks the operating system's kernel once, for all threads.
inline bool has_amx() {
#ifdef OVF_AMX
    static const bool granted = [] {
        constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24, INT8 = 1u << 25, NEEDED = BF16 | TILES | INT8;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & NEEDED) == NEEDED &&
               syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

#ifdef OVF_AMX

// Configuration of the tiles: by default eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    TileShapes() = default;
    // All tiles have `height` rows, except that tile `whole` has 16. Fewer rows of sums take less time.
    TileShapes(size_t height, size_t whole) {
        for (size_t i = 0; i < 8; ++i) rows[i] = static_cast<uint8_t>(i == whole ? 16 : height);
    }
};

// Configures the tiles and sets them to zero.
inline void use_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }

// Reserves the tiles for this thread until the end of the scope. Code that uses tiles in between needs its own scope.
struct AmxScope {
    AmxScope() { use_tiles(TileShapes()); }
    AmxScope(const AmxScope&) = delete;
    ~AmxScope() { asm volatile("tilerelease"); }
};

#define OVF_LOAD_TILE(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(static_cast<size_t>(stride)) : "memory")
#define OVF_STORE_TILE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<size_t>(stride)) : "memory")
#define OVF_ADD_PRODUCTS(kind, sums, a, b) asm volatile(kind " %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::)

// Contents of the two tiles of activations that are multiplied with the two halves of a panel.
enum class AmxKind {
    BF16,        // rows 0 to 15, and rows 16 to 31
    BF16_SHORT,  // rows 0 to 15 only
    INT8,        // upper (signed) and lower (unsigned) bytes of rows 0 to 15
};

// Computes the sums of one panel.
// out: 32 rows (16 for BF16_SHORT) of 32 float32 or int32, `out_stride` bytes apart.
// a: operand of the first row, rows `stride` bytes apart; int8 operands alternate 64 upper and 64 lower bytes.
// steps: steps of the panel. If they are not a multiple of AMX_STEPS, `end` holds the remaining ones, padded with
// zeros.
// ahead: memory to fetch into the second-level cache, `fetch` bytes for every AMX_STEPS.
template <AmxKind KIND>
inline void amx_tile(const char* a, size_t stride, const char* panel, size_t steps, const char* end, const char* ahead,
                     size_t fetch, void* out, size_t out_stride) {
    constexpr bool INT8 = KIND == AmxKind::INT8, BOTH = KIND != AmxKind::BF16_SHORT;
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::: "memory");
    const char* second = INT8 ? a + 64 : a + AMX_ROWS * stride;
    for (size_t k = 0; k < steps; k += AMX_STEPS) {
        const char* w = k + AMX_STEPS <= steps ? panel + k * 128 : end;
        OVF_LOAD_TILE(6, w, 128);
        OVF_LOAD_TILE(7, w + 64, 128);
        OVF_LOAD_TILE(4, a, stride);
        if constexpr (INT8) {
            OVF_LOAD_TILE(5, second, stride);
            OVF_ADD_PRODUCTS("tdpbssd", 0, 4, 6);
            OVF_ADD_PRODUCTS("tdpbssd", 1, 4, 7);
            OVF_ADD_PRODUCTS("tdpbusd", 2, 5, 6);
            OVF_ADD_PRODUCTS("tdpbusd", 3, 5, 7);
        } else {
            OVF_ADD_PRODUCTS("tdpbf16ps", 0, 4, 6);
            OVF_ADD_PRODUCTS("tdpbf16ps", 1, 4, 7);
            if constexpr (BOTH) {
                OVF_LOAD_TILE(5, second, stride);
                OVF_ADD_PRODUCTS("tdpbf16ps", 2, 5, 6);
                OVF_ADD_PRODUCTS("tdpbf16ps", 3, 5, 7);
            }
        }
        for (size_t i = 0; i < fetch; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
        ahead += fetch, a += INT8 ? 128 : 64, second += INT8 ? 128 : 64;
    }
    char* to = static_cast<char*>(out);
    OVF_STORE_TILE(0, to, out_stride);
    OVF_STORE_TILE(1, to + 64, out_stride);
    if constexpr (BOTH) {
        OVF_STORE_TILE(2, to + AMX_ROWS * out_stride, out_stride);
        OVF_STORE_TILE(3, to + AMX_ROWS * out_stride + 64, out_stride);
    }
}

#else

struct AmxScope {};
enum class AmxKind { BF16, BF16_SHORT, INT8 };
template <AmxKind KIND>
inline void amx_tile(const char*, size_t, const char*, size_t, const char*, const char*, size_t, void*, size_t) {}

#endif

}  // namespace ovf
