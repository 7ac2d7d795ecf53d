// Chunks between a paged KV cache and contiguous memory, their checksums computed on the way; see library.py for the
// other side. Takes no locks and starts no threads: callers let go of Python's lock while it runs.
#include <algorithm>

#include "xxh3.h"

using namespace ovf;

namespace {

// Keys and values of a cache: [layers, blocks, block_size, heads, cell], cell in bytes.
struct OvfCells {
    uint8_t *k, *v;
    int64_t layers, blocks, block_size, heads, cell;
};

// A box of a sequence and where its payload is: keys then values, each [layers, tokens, heads, cell].
struct OvfPiece {
    int64_t layer_start, layer_end, token_start, token_end, head_start, head_end;
    uint8_t* payload;
    uint64_t checksum;  // of header and payload
    int64_t header_bytes;  // 0: no checksum is wanted
    uint8_t header[64];
};

// Copies to memory that is not looked at soon: past the caches, which saves reading it first.
void stream(uint8_t* to, const uint8_t* from, size_t size) {
    const size_t head = std::min(size, -reinterpret_cast<uintptr_t>(to) % 32);
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 128; to += 128, from += 128, size -= 128) {
        __m256i parts[4];
        for (int i = 0; i < 4; ++i) parts[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
        for (int i = 0; i < 4; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, parts[i]);
    }
    memcpy(to, from, size);
}

bool inside(const OvfCells& cells, int64_t table_length, const OvfPiece& p) {
    return 0 <= p.layer_start && p.layer_start < p.layer_end && 0 <= p.token_start && p.token_start < p.token_end &&
           p.token_end <= table_length * cells.block_size && 0 <= p.head_start && p.head_start < p.head_end &&
           p.head_end <= cells.heads;
}

// Calls `each(cell of the cache, bytes)` for what lies together, in the order of the payload's tokens.
template <class Each>
void runs(const OvfCells& cells, const int64_t* table, const OvfPiece& p, uint8_t* half, int64_t layer, Each each) {
    const size_t token = cells.heads * cells.cell, width = (p.head_end - p.head_start) * cells.cell;
    uint8_t* const base = half + layer * cells.blocks * cells.block_size * token + p.head_start * cells.cell;
    const int64_t most = width == token ? cells.block_size : 1;
    for (int64_t t = p.token_start; t < p.token_end;) {
        const int64_t in_block = t % cells.block_size;
        const int64_t count = std::min({cells.block_size - in_block, p.token_end - t, most});
        each(base + (table[t / cells.block_size] * cells.block_size + in_block) * token, count * width);
        t += count;
    }
}

bool table_inside(const OvfCells& cells, const int64_t* table, int64_t length) {
    return std::all_of(table, table + length, [&](int64_t block) { return 0 <= block && block < cells.blocks; });
}

}  // namespace

extern "C" {

// Reads pieces out of the cache, and sets the checksums of those with a header. 0, or 1 when something is out of range.
int ovf_kv_gather(const OvfCells* cells, const int64_t* table, int64_t length, OvfPiece* pieces, int64_t count) {
    if (!table_inside(*cells, table, length)) return 1;
    for (OvfPiece* p = pieces; p < pieces + count; ++p) {
        if (!inside(*cells, length, *p) || p->layer_end > cells->layers) return 1;
        const int64_t cells_in = (p->layer_end - p->layer_start) * (p->token_end - p->token_start) * (p->head_end - p->head_start);
        Xxh3 hash(p->header_bytes + 2 * cells_in * cells->cell);
        if (p->header_bytes) hash.feed(p->header, p->header_bytes);
        uint8_t* to = p->payload;
        for (uint8_t* half : {cells->k, cells->v})
            for (int64_t layer = p->layer_start; layer < p->layer_end; ++layer)
                runs(*cells, table, *p, half, layer, [&](const uint8_t* from, size_t size) {
                    memcpy(to, from, size);
                    if (p->header_bytes) hash.feed(to, size);  // while it is in the nearest cache
                    to += size;
                });
        if (p->header_bytes) p->checksum = hash.finish();
    }
    return 0;
}

// Writes pieces into the cache: payload layer l of the full model into layers targets[starts[l]] .. targets[starts[l + 1]].
// What was written of a piece whose checksum is not its own is void. The index of the first such piece, `count` when there
// is none, -1 when something is out of range. Pieces without a header are not checked.
int64_t ovf_kv_scatter(const OvfCells* cells, const int64_t* table, int64_t length, const OvfPiece* pieces,
                       int64_t count, const int64_t* starts, int64_t full_layers, const int64_t* targets) {
    if (!table_inside(*cells, table, length)) return -1;
    for (int64_t t = 0; t < starts[full_layers]; ++t)
        if (targets[t] < 0 || targets[t] >= cells->layers) return -1;
    for (int64_t i = 0; i < count; ++i) {
        const OvfPiece& p = pieces[i];
        if (!inside(*cells, length, p) || p.layer_end > full_layers) return -1;
        const size_t layer_bytes = (p.token_end - p.token_start) * (p.head_end - p.head_start) * cells->cell;
        Xxh3 hash(p.header_bytes + 2 * (p.layer_end - p.layer_start) * layer_bytes);
        if (p.header_bytes) hash.feed(p.header, p.header_bytes);
        const uint8_t* from = p.payload;
        for (uint8_t* half : {cells->k, cells->v})
            for (int64_t layer = p.layer_start; layer < p.layer_end; ++layer, from += layer_bytes) {
                bool first = p.header_bytes > 0;
                for (int64_t t = starts[layer]; t < starts[layer + 1]; ++t, first = false) {
                    const uint8_t* at = from;
                    runs(*cells, table, p, half, targets[t], [&](uint8_t* to, size_t size) {
                        if (first) hash.feed(at, size);
                        stream(to, at, size);
                        at += size;
                    });
                }
                if (first) hash.feed(from, layer_bytes);  // a layer that nobody takes
            }
        _mm_sfence();
        if (p.header_bytes && hash.finish() != p.checksum) return i;
    }
    return count;
}
}
