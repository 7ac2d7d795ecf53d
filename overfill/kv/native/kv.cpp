// Copies chunks between a paged KV cache and contiguous memory, and computes their checksums meanwhile. library.py is the
// Python side. Takes no locks and starts no threads; ctypes releases Python's lock during a call.
#include <algorithm>

#include "xxh3.h"

using namespace ovf;

namespace {

// Keys and values of a cache: [layers, blocks, block_size, heads, vector_bytes]. A vector is one head of one token.
struct OvfCache {
    uint8_t *k, *v;
    int64_t layers, blocks, block_size, heads, vector_bytes;
};

// A range of a sequence and the address of its payload: keys then values, each [layers, tokens, heads, vector_bytes].
struct OvfChunk {
    int64_t layer_start, layer_end, token_start, token_end, head_start, head_end;
    uint8_t* payload;
    uint64_t checksum;  // of header and payload
    int64_t header_bytes;  // 0 means that the chunk has no checksum
    uint8_t header[64];
};

// Copies past the CPU's caches: the target is not read soon, and its lines need not be loaded before they are written.
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

bool inside(const OvfCache& cache, int64_t table_length, const OvfChunk& c) {
    return 0 <= c.layer_start && c.layer_start < c.layer_end && 0 <= c.token_start && c.token_start < c.token_end &&
           c.token_end <= table_length * cache.block_size && 0 <= c.head_start && c.head_start < c.head_end &&
           c.head_end <= cache.heads;
}

// Calls `each(address in the cache, bytes)` for each contiguous run of the chunk in one layer, in the order of tokens.
template <class Each>
void each_run(const OvfCache& cache, const int64_t* table, const OvfChunk& c, uint8_t* half, int64_t layer, Each each) {
    const size_t token = cache.heads * cache.vector_bytes, width = (c.head_end - c.head_start) * cache.vector_bytes;
    uint8_t* const base = half + layer * cache.blocks * cache.block_size * token + c.head_start * cache.vector_bytes;
    const int64_t max_tokens = width == token ? cache.block_size : 1;
    for (int64_t t = c.token_start; t < c.token_end;) {
        const int64_t in_block = t % cache.block_size;
        const int64_t count = std::min({cache.block_size - in_block, c.token_end - t, max_tokens});
        each(base + (table[t / cache.block_size] * cache.block_size + in_block) * token, count * width);
        t += count;
    }
}

bool table_inside(const OvfCache& cache, const int64_t* table, int64_t length) {
    return std::all_of(table, table + length, [&](int64_t block) { return 0 <= block && block < cache.blocks; });
}

}  // namespace

extern "C" {

// Reads chunks out of the cache and sets the checksums of those with a header. Returns 1 if a chunk or a block of the
// table lies outside the cache, otherwise 0.
int ovf_kv_gather(const OvfCache* cache, const int64_t* table, int64_t length, OvfChunk* chunks, int64_t count) {
    if (!table_inside(*cache, table, length)) return 1;
    for (OvfChunk* c = chunks; c < chunks + count; ++c) {
        if (!inside(*cache, length, *c) || c->layer_end > cache->layers) return 1;
        const int64_t num_vectors = 2 * (c->layer_end - c->layer_start) * (c->token_end - c->token_start) * (c->head_end - c->head_start);
        Xxh3 hash(c->header_bytes + num_vectors * cache->vector_bytes);
        if (c->header_bytes) hash.feed(c->header, c->header_bytes);
        uint8_t* to = c->payload;
        for (uint8_t* half : {cache->k, cache->v})
            for (int64_t layer = c->layer_start; layer < c->layer_end; ++layer)
                each_run(*cache, table, *c, half, layer, [&](const uint8_t* from, size_t size) {
                    memcpy(to, from, size);
                    if (c->header_bytes) hash.feed(to, size);  // while the bytes are in the L1 cache
                    to += size;
                });
        if (c->header_bytes) c->checksum = hash.finish();
    }
    return 0;
}

// Writes chunks into the cache: full-model layer l goes to the layers targets[starts[l]] up to targets[starts[l + 1]].
// Checks chunks that have a header while it writes them. Returns the index of the first damaged chunk, whose range is then
// undefined; `count` if none is damaged; -1 if a chunk, a block of the table or a target layer lies outside the cache.
int64_t ovf_kv_scatter(const OvfCache* cache, const int64_t* table, int64_t length, const OvfChunk* chunks,
                       int64_t count, const int64_t* starts, int64_t full_layers, const int64_t* targets) {
    if (!table_inside(*cache, table, length)) return -1;
    for (int64_t t = 0; t < starts[full_layers]; ++t)
        if (targets[t] < 0 || targets[t] >= cache->layers) return -1;
    for (int64_t i = 0; i < count; ++i) {
        const OvfChunk& c = chunks[i];
        if (!inside(*cache, length, c) || c.layer_end > full_layers) return -1;
        const size_t layer_bytes = (c.token_end - c.token_start) * (c.head_end - c.head_start) * cache->vector_bytes;
        Xxh3 hash(c.header_bytes + 2 * (c.layer_end - c.layer_start) * layer_bytes);
        if (c.header_bytes) hash.feed(c.header, c.header_bytes);
        const uint8_t* from = c.payload;
        for (uint8_t* half : {cache->k, cache->v})
            for (int64_t layer = c.layer_start; layer < c.layer_end; ++layer, from += layer_bytes) {
                bool first = c.header_bytes > 0;
                for (int64_t t = starts[layer]; t < starts[layer + 1]; ++t, first = false) {
                    const uint8_t* at = from;
                    each_run(*cache, table, c, half, targets[t], [&](uint8_t* to, size_t size) {
                        if (first) hash.feed(at, size);
                        stream(to, at, size);
                        at += size;
                    });
                }
                if (first) hash.feed(from, layer_bytes);  // this layer is stored nowhere
            }
        _mm_sfence();
        if (c.header_bytes && hash.finish() != c.checksum) return i;
    }
    return count;
}
}
