// XXH3-64, default secret, seed 0, of inputs of more than 240 bytes whose length is known. The input is fed in parts of any size.
// After the specification at https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ovf {

constexpr size_t STRIPE = 64, SECRET_BYTES = 192;

alignas(64) constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

class Xxh3 {
  public:
    explicit Xxh3(size_t total) : total_(total), stripes_((total - 1) / STRIPE) {
        constexpr uint64_t start[8] = {0xC2B2AE3D,         0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                       0x85EBCA77C2B2AE63, 0x85EBCA77,         0x27D4EB2F165667C5, 0x9E3779B1};
        memcpy(sums_, start, sizeof sums_);
    }

    void feed(const uint8_t* data, size_t size) {
        if (carried_) {
            const size_t taken = size < STRIPE - carried_ ? size : STRIPE - carried_;
            memcpy(carry_ + carried_, data, taken);
            carried_ += taken, data += taken, size -= taken;
            if (carried_ < STRIPE || done_ == stripes_) return;  // finish() needs the last stripe, even a whole one
            take(carry_, 1);
            memcpy(previous_, carry_, STRIPE);
            carried_ = 0;
        }
        size_t whole = size / STRIPE;
        if (whole > stripes_ - done_) whole = stripes_ - done_;
        if (whole) {
            take(data, whole);
            data += whole * STRIPE, size -= whole * STRIPE;
            memcpy(previous_, data - STRIPE, STRIPE);
        }
        memcpy(carry_, data, size);
        carried_ = size;
    }

    // The hash. All `total` bytes must have been fed.
    uint64_t finish() {
        uint8_t last[STRIPE];
        memcpy(last, previous_ + carried_, STRIPE - carried_);
        memcpy(last + STRIPE - carried_, carry_, carried_);
        accumulate(last, SECRET + SECRET_BYTES - STRIPE - 7);
        uint64_t result = total_ * 0x9E3779B185EBCA87;
        for (int i = 0; i < 4; ++i) {
            const auto product = static_cast<unsigned __int128>(sums_[2 * i] ^ secret(11 + 16 * i)) *
                                 (sums_[2 * i + 1] ^ secret(19 + 16 * i));
            result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
        }
        result = (result ^ result >> 37) * 0x165667919E3779F9;
        return result ^ result >> 32;
    }

  private:
    static constexpr size_t STRIPES_IN_BLOCK = (SECRET_BYTES - STRIPE) / 8;

    static uint64_t secret(size_t at) {
        uint64_t word;
        memcpy(&word, SECRET + at, 8);
        return word;
    }

    void accumulate(const uint8_t* stripe, const uint8_t* key) {
        auto* sums = reinterpret_cast<__m256i*>(sums_);
        for (int half = 0; half < 2; ++half) sums[half] = mixed(sums[half], stripe + 32 * half, key + 32 * half);
    }

    static __m256i mixed(__m256i sum, const uint8_t* stripe, const uint8_t* key) {
        const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stripe));
        const __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        return _mm256_add_epi64(sum, _mm256_add_epi64(product, _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2))));
    }

    static __m256i scrambled(__m256i sum, const uint8_t* key) {
        sum = _mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47));
        sum = _mm256_xor_si256(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
        const __m256i prime = _mm256_set1_epi64x(0x9E3779B1);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(sum, 32), prime);
        return _mm256_add_epi64(_mm256_mul_epu32(sum, prime), _mm256_slli_epi64(high, 32));
    }

    // Adds the next stripes to the sums. A block ends after every sixteenth stripe.
    void take(const uint8_t* data, size_t count) {
        auto* sums = reinterpret_cast<__m256i*>(sums_);
        __m256i low = sums[0], high = sums[1];
        size_t in_block = done_ % STRIPES_IN_BLOCK;
        done_ += count;
        for (; count; --count, data += STRIPE) {
            low = mixed(low, data, SECRET + 8 * in_block);
            high = mixed(high, data + 32, SECRET + 8 * in_block + 32);
            if (++in_block == STRIPES_IN_BLOCK) {
                in_block = 0;
                low = scrambled(low, SECRET + SECRET_BYTES - STRIPE);
                high = scrambled(high, SECRET + SECRET_BYTES - STRIPE + 32);
            }
        }
        sums[0] = low, sums[1] = high;
    }

    alignas(32) uint64_t sums_[8];
    uint8_t carry_[STRIPE], previous_[STRIPE];
    size_t carried_ = 0, done_ = 0, total_, stripes_;
};

}  // namespace ovf
