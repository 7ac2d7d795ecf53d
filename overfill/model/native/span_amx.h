// Decode attention in AMX tiles: computes what `attend_span` does, three times as fast if the data is in the CPU's
// cache. It packs nothing: tiles are loaded directly from the paged cache.
//
// Scores. A tile of keys has sixteen tokens and 32 elements of one KV head. The other tile holds queries, one head per
// column, and zeros for heads of other KV heads. So one tile accumulates all scores of sixteen tokens.
//
// Values. Tiles multiply pairs of neighbours. The product needs pairs of two tokens, but neighbours in the cache are
// two elements of one token. So each weight has two rows, (weight, 0) and (0, weight). The sums of the first row belong
// to even elements, those of the second row to odd elements.
#pragma once
#include "attention.h"

namespace ovf {

constexpr size_t SPAN_CHUNK = 256;  // tokens whose scores are held at once
constexpr size_t BAND = 16;         // query heads, whose scores are the columns of one tile
constexpr size_t SPAN_SUMS = 6;     // tiles of weighted values that are summed at once; the other two hold operands

// A thread's scratch memory. `q` and `sums` are indexed by unit: 32 elements of a KV head.
struct SpanScratch {
    alignas(64) uint32_t q[BAND * 8][16][16];
    alignas(64) float scores[BAND][SPAN_CHUNK], tile[16][16], sums[SPAN_SUMS][16][16];
    alignas(64) uint32_t weights[2 * BAND][SPAN_CHUNK];
    alignas(64) bf16 rows[16][32];
};

// True if the model's heads fill tiles, so that this code can compute its attention.
inline bool spans_fit_amx(const AttentionShape& s) { return s.dim % 32 == 0 && 2 * s.group() <= AMX_ROWS; }

#ifdef OVF_AMX

// Writes columns 0 to count - 1 of a tile as rows, `stride` floats apart.
inline void transpose_tile(const float (*tile)[16], size_t count, float* out, size_t stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(tile[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    // Now lane l of a[i + j], i a multiple of four, is column 4 * l + j of rows i to i + 3.
    for (size_t j = 0; j < 4; ++j) {
        const __m512 even_0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd_0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 even_8 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 odd_8 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        const __m512 columns[] = {_mm512_shuffle_f32x4(even_0, even_8, 0x88), _mm512_shuffle_f32x4(odd_0, odd_8, 0x88),
                                  _mm512_shuffle_f32x4(even_0, even_8, 0xdd), _mm512_shuffle_f32x4(odd_0, odd_8, 0xdd)};
        for (size_t l = 0; l < 4; ++l)
            if (4 * l + j < count) _mm512_store_ps(out + (4 * l + j) * stride, columns[l]);
    }
}

// Attention of one span for the KV heads of one band.
class BandSpan {
  public:
    BandSpan(const AttentionShape& s, const KvLayer& kv, const int64_t* table, size_t last, size_t kv_head,
             size_t kv_heads, float* partial, SpanScratch& scratch)
        : s_(s), kv_(kv), table_(table), last_(last), offset_(kv_head * s.dim), halves_(s.dim / 32),
          units_(kv_heads * halves_), heads_(kv_heads * s.group()), partial_(partial), t_(scratch) {}

    // q: [heads][dim], the band's heads.
    void run(const bf16* q, size_t first) {
        memset(t_.q, 0, units_ * sizeof t_.q[0]);
        for (size_t h = 0; h < heads_; ++h) {
            for (size_t d = 0; d < s_.dim; d += 2)
                memcpy(&t_.q[h / s_.group() * halves_ + d / 32][d % 32 / 2][h], q + h * s_.dim + d, 4);
            float* own = partial_ + h * s_.partial();
            own[0] = -__builtin_inff(), own[1] = 0;
            memset(own + 2, 0, s_.dim * sizeof(float));
        }
        for (size_t start = first; start < last_; start += SPAN_CHUNK) {
            const size_t n = std::min(SPAN_CHUNK, last_ - start);
            score(start, n);
            for (size_t h = 0; h < heads_; ++h) {
                float* own = partial_ + h * s_.partial();
                keep_[h] = weigh_into(t_.scores[h], n, s_.log2_scale(), own[0], own[1], [&](size_t i, __m512 weights) {
                    const __m512i wide = _mm512_cvtepu16_epi32(narrow(weights));
                    _mm512_store_si512(t_.weights[2 * h] + i, wide);
                    _mm512_store_si512(t_.weights[2 * h + 1] + i, _mm512_slli_epi32(wide, 16));
                });
            }
            use_tiles(TileShapes(2 * s_.group(), 7));
            for (size_t unit = 0; unit < units_; unit += SPAN_SUMS) add_values(start, n, unit);
        }
    }

  private:
    // Address of sixteen tokens' rows; null if they are not contiguous, or if the span ends before the last one.
    const bf16* together(const bf16* cells, size_t token) const {
        if (kv_.block_size % 16 || token % 16 || token + 16 > last_) return nullptr;
        return cells + kv_.at(table_, token) + offset_;
    }

    // Copies a unit of sixteen tokens to a tile's rows; tokens behind the span become zeros, because theirs are
    // undefined.
    const bf16* gather(const bf16* cells, size_t token, size_t unit) {
        for (size_t i = 0; i < 16; ++i)
            _mm512_store_si512(t_.rows[i], token + i < last_ ? _mm512_loadu_si512(cells + kv_.at(table_, token + i) + offset_ + unit * 32)
                                                             : _mm512_setzero_si512());
        return t_.rows[0];
    }

    // Prefetches a unit of the next sixteen tokens.
    void fetch(const bf16* next, size_t unit) const {
        for (size_t i = 0; next && i < 16; ++i) prefetch(next + i * kv_.row + unit * 32);
    }

    void score(size_t start, size_t n) {
        use_tiles(TileShapes());
        for (size_t i = 0; i < n; i += 16) {
            const bf16* k = together(kv_.k, start + i);
            const bf16* next = i + 16 < n ? together(kv_.k, start + i + 16) : together(kv_.v, start);
            asm volatile("tilezero %%tmm0" ::: "memory");
            for (size_t u = 0; u < units_; ++u) {
                if (k) OVF_LOAD_TILE(1, k + u * 32, kv_.row * sizeof(bf16));
                else OVF_LOAD_TILE(1, gather(kv_.k, start + i, u), 64);
                OVF_LOAD_TILE(2, t_.q[u], 64);
                fetch(next, u);
                OVF_ADD_PRODUCTS("tdpbf16ps", 0, 1, 2);
            }
            OVF_STORE_TILE(0, t_.tile, 64);
            transpose_tile(t_.tile, heads_, t_.scores[0] + i, SPAN_CHUNK);
        }
    }

    // Adds the chunk's weighted values for up to SPAN_SUMS units from `first_unit` on.
    void add_values(size_t start, size_t n, size_t first_unit) {
        const size_t count = std::min(SPAN_SUMS, units_ - first_unit);
        asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n" ::: "memory");
        asm volatile("tilezero %%tmm3\n tilezero %%tmm4\n tilezero %%tmm5\n" ::: "memory");
        for (size_t i = 0; i < n; i += 16) {
            const bf16* v = together(kv_.v, start + i);
            const bf16* next = i + 16 < n ? together(kv_.v, start + i + 16) : together(kv_.k, start + n);
#pragma GCC unroll 6
            for (size_t j = 0; j < SPAN_SUMS; ++j) {
                if (j == count) break;
                const size_t u = first_unit + j;
                if (j == 0 || u % halves_ == 0)
                    OVF_LOAD_TILE(6, t_.weights[2 * s_.group() * (u / halves_)] + i, SPAN_CHUNK * sizeof(uint32_t));
                if (v) OVF_LOAD_TILE(7, v + u * 32, kv_.row * sizeof(bf16));
                else OVF_LOAD_TILE(7, gather(kv_.v, start + i, u), 64);
                fetch(next, u);
                switch (j) {
                    case 0: OVF_ADD_PRODUCTS("tdpbf16ps", 0, 6, 7); break;
                    case 1: OVF_ADD_PRODUCTS("tdpbf16ps", 1, 6, 7); break;
                    case 2: OVF_ADD_PRODUCTS("tdpbf16ps", 2, 6, 7); break;
                    case 3: OVF_ADD_PRODUCTS("tdpbf16ps", 3, 6, 7); break;
                    case 4: OVF_ADD_PRODUCTS("tdpbf16ps", 4, 6, 7); break;
                    case 5: OVF_ADD_PRODUCTS("tdpbf16ps", 5, 6, 7); break;
                }
            }
        }
        OVF_STORE_TILE(0, t_.sums[0], 64);
        OVF_STORE_TILE(1, t_.sums[1], 64);
        OVF_STORE_TILE(2, t_.sums[2], 64);
        OVF_STORE_TILE(3, t_.sums[3], 64);
        OVF_STORE_TILE(4, t_.sums[4], 64);
        OVF_STORE_TILE(5, t_.sums[5], 64);
        for (size_t j = 0; j < count; ++j) join_unit(first_unit + j, t_.sums[j]);
    }

    // Interleaves a unit's sums of even and odd elements and adds them to the sums of earlier chunks.
    void join_unit(size_t unit, const float (*sums)[16]) {
        const __m512i front = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
        for (size_t g = 0; g < s_.group(); ++g) {
            const size_t h = unit / halves_ * s_.group() + g;
            float* out = partial_ + h * s_.partial() + 2 + unit % halves_ * 32;
            const __m512 even = _mm512_load_ps(sums[2 * g]), odd = _mm512_load_ps(sums[2 * g + 1]);
            const __m512 keep = _mm512_set1_ps(keep_[h]);
            _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_loadu_ps(out), keep, _mm512_permutex2var_ps(even, front, odd)));
            _mm512_storeu_ps(out + 16, _mm512_fmadd_ps(_mm512_loadu_ps(out + 16), keep, _mm512_permutex2var_ps(even, back, odd)));
        }
    }

    const AttentionShape& s_;
    const KvLayer& kv_;
    const int64_t* table_;
    const size_t last_, offset_, halves_, units_, heads_;
    float* partial_;
    SpanScratch& t_;
    float keep_[BAND];
};

// Implements `attend_span` in tiles, which the caller releases. Requires `spans_fit_amx`.
inline void attend_span_amx(const AttentionShape& s, const KvLayer& kv, const int64_t* table, const bf16* q, size_t first,
                            size_t last, float* partial, SpanScratch& scratch) {
    const size_t most = BAND / s.group();
    for (size_t kv_head = 0; kv_head < s.kv_heads; kv_head += most) {
        const size_t head = kv_head * s.group();
        BandSpan(s, kv, table, last, kv_head, std::min(most, s.kv_heads - kv_head), partial + head * s.partial(), scratch)
            .run(q + head * s.dim, first);
    }
}

#else

inline void attend_span_amx(const AttentionShape&, const KvLayer&, const int64_t*, const bf16*, size_t, size_t, float*, SpanScratch&) {}

#endif

}  // namespace ovf
