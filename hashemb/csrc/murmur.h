/* MurmurHash3 x64-128, of which hashemb keeps the low 64 bits.
 *
 * This implements the algorithm that Austin Appleby placed in the public domain
 * (https://github.com/aappleby/smhasher, src/MurmurHash3.cpp). Nothing here allocates, fails or reads a byte
 * outside its input. Words are little-endian, as is every machine that portability.h admits, so a value has the same
 * key everywhere. */
#ifndef HASHEMB_MURMUR_H
#define HASHEMB_MURMUR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "numerics.h"

#define MURMUR_C1 UINT64_C(0x87c37b91114253d5)
#define MURMUR_C2 UINT64_C(0x4cf5ad432745937f)

static inline uint64_t murmur_rotl64(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

static inline uint64_t murmur_load64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

static inline uint64_t murmur_load32(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* Returns the first `length` <= 8 bytes as a little-endian word; reads no other byte. Loads overlap instead of
 * looping: a byte that is read twice sets the same bits twice. */
static inline uint64_t murmur_load_upto8(const uint8_t *p, size_t length) {
    if (length >= 8) return murmur_load64(p);
    if (length >= 4) return murmur_load32(p) | murmur_load32(p + length - 4) << (8 * (length - 4));
    if (length == 0) return 0;
    return (uint64_t)p[0] | (uint64_t)p[length / 2] << (8 * (length / 2)) |
           (uint64_t)p[length - 1] << (8 * (length - 1));
}

/* Returns a mask of the low `length` bytes; all bits are set from 8 bytes up. */
static inline uint64_t murmur_byte_mask(size_t length) {
    return length >= 8 ? ~UINT64_C(0) : (UINT64_C(1) << (8 * length)) - 1;
}

static inline uint64_t murmur_mix1(uint64_t k) { return murmur_rotl64(k * MURMUR_C1, 31) * MURMUR_C2; }

static inline uint64_t murmur_mix2(uint64_t k) { return murmur_rotl64(k * MURMUR_C2, 33) * MURMUR_C1; }

static inline uint64_t murmur_finish(uint64_t h1, uint64_t h2, size_t length) {
    h1 ^= length;
    h2 ^= length;
    h1 += h2;
    h2 += h1;
    return he_fmix64(h1) + he_fmix64(h2);
}

/* Hashes a value of fewer than 16 bytes, given as two zero-padded words. A zero word mixes to zero, so the
 * original's branches on the length of the tail are not needed. */
static inline uint64_t murmur_hash_short(uint64_t k1, uint64_t k2, size_t length, uint32_t seed) {
    return murmur_finish(seed ^ murmur_mix1(k1), seed ^ murmur_mix2(k2), length);
}

/* Hashes a value of 8 bytes, given as a little-endian word: the key of an integer. */
static inline uint64_t murmur_hash_word(uint64_t word, uint32_t seed) {
    return murmur_finish(seed ^ murmur_mix1(word), seed, 8);
}

/* Returns the key of `length` bytes at `p`, from which `readable` >= `length` bytes may be read. If 16 bytes are
 * left to read, the tail takes two masked loads, without a branch on its length that the CPU could mispredict. */
static inline uint64_t murmur_hash_within(const uint8_t *p, size_t length, size_t readable, uint32_t seed) {
    uint64_t h1 = seed, h2 = seed, k1, k2;
    size_t tail = length & 15, body = length - tail, above8 = tail > 8 ? tail - 8 : 0;
    for (const uint8_t *end = p + body; p != end; p += 16) {
        h1 ^= murmur_mix1(murmur_load64(p));
        h1 = (murmur_rotl64(h1, 27) + h2) * 5 + UINT64_C(0x52dce729);
        h2 ^= murmur_mix2(murmur_load64(p + 8));
        h2 = (murmur_rotl64(h2, 31) + h1) * 5 + UINT64_C(0x38495ab5);
    }
    if (readable - body >= 16) {
        k1 = murmur_load64(p) & murmur_byte_mask(tail);
        k2 = murmur_load64(p + 8) & murmur_byte_mask(above8);
    } else {
        k1 = murmur_load_upto8(p, tail);
        k2 = above8 > 0 ? murmur_load_upto8(p + 8, above8) : 0;
    }
    return murmur_finish(h1 ^ murmur_mix1(k1), h2 ^ murmur_mix2(k2), length);
}

/* Returns the key of `length` bytes at `p`. */
static inline uint64_t murmur_hash(const uint8_t *p, size_t length, uint32_t seed) {
    return murmur_hash_within(p, length, length, seed);
}

/* Returns the key of a missing value, which is the key of the reserved bytes. */
static inline uint64_t murmur_hash_null(uint32_t seed) { return murmur_hash((const uint8_t *)"\0null", 5, seed); }

#endif
