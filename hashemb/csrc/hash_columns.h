/* Loops that hash whole columns in NumPy's layout.
 *
 * Results are written to out[0], out[stride], out[2 * stride] ..., so that a column of a row-major matrix is
 * filled in place. Columns are raw bytes that are read with memcpy and need no alignment. Nothing here allocates.
 */
#ifndef HASHEMB_HASH_COLUMNS_H
#define HASHEMB_HASH_COLUMNS_H

#include "murmur.h"

/* A kernel returns HASH_OK, or the position of the first element that it cannot read. */
#define HASH_OK INT64_C(-1)

/* Integers are hashed as 8 bytes: narrower ones are sign- or zero-extended by the conversion. */
#define HASH_INTEGERS_LOOP(TYPE)                                       \
    for (int64_t i = 0; i < n; i++) {                                  \
        TYPE value;                                                    \
        memcpy(&value, raw + i * (int64_t)sizeof value, sizeof value); \
        out[i * stride] = murmur_hash_word((uint64_t)value, seed);     \
    }                                                                  \
    break

/* `width` is 1, 2, 4 or 8 bytes. */
static inline void hash_integers(const uint8_t *raw, int width, int is_signed, int64_t n, uint32_t seed, uint64_t *out,
                                 ptrdiff_t stride) {
    switch (is_signed ? -width : width) {
        case -1: HASH_INTEGERS_LOOP(int8_t);
        case -2: HASH_INTEGERS_LOOP(int16_t);
        case -4: HASH_INTEGERS_LOOP(int32_t);
        case 1: HASH_INTEGERS_LOOP(uint8_t);
        case 2: HASH_INTEGERS_LOOP(uint16_t);
        case 4: HASH_INTEGERS_LOOP(uint32_t);
        default: HASH_INTEGERS_LOOP(uint64_t);
    }
}

static inline size_t significant_bytes(uint64_t word) { return word == 0 ? 0 : 8 - (size_t)__builtin_clzll(word) / 8; }

/* Returns the number of bytes up to and including the last one that is not zero. */
static inline size_t stripped_length(const uint8_t *p, size_t width) {
    while (width >= 8) {
        uint64_t word = murmur_load64(p + width - 8);
        if (word != 0) return width - 8 + significant_bytes(word);
        width -= 8;
    }
    return significant_bytes(murmur_load_upto8(p, width));
}

/* Hashes fewer than 16 bytes, given as two zero-padded words. */
static inline uint64_t hash_padded_short(uint64_t k1, uint64_t k2, uint32_t seed) {
    size_t length = k2 == 0 ? significant_bytes(k1) : 8 + significant_bytes(k2);
    return murmur_hash_short(k1, k2, length, seed);
}

static inline void hash_fixed_bytes_narrow(const uint8_t *raw, size_t width, int64_t n, uint32_t seed, uint64_t *out,
                                           ptrdiff_t stride) {
    uint64_t mask1 = murmur_byte_mask(width), mask2 = murmur_byte_mask(width > 8 ? width - 8 : 0);
    int64_t total = n * (int64_t)width;
    int64_t i = 0;
    for (int64_t at = 0; at + 16 <= total; at += (int64_t)width, i++)
        out[i * stride] = hash_padded_short(murmur_load64(raw + at) & mask1, murmur_load64(raw + at + 8) & mask2, seed);
    for (; i < n; i++) {
        const uint8_t *p = raw + i * (int64_t)width;
        out[i * stride] = hash_padded_short(murmur_load_upto8(p, width < 8 ? width : 8),
                                            width > 8 ? murmur_load_upto8(p + 8, width - 8) : 0, seed);
    }
}

/* Hashes NumPy `S` values: `width` > 0 bytes each, padded with zeros, which are not part of the value. */
static inline void hash_fixed_bytes(const uint8_t *raw, size_t width, int64_t n, uint32_t seed, uint64_t *out,
                                    ptrdiff_t stride) {
    if (width < 16) {
        hash_fixed_bytes_narrow(raw, width, n, seed, out, stride);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *p = raw + i * (int64_t)width;
        out[i * stride] = murmur_hash_within(p, stripped_length(p, width), (size_t)(n - i) * width, seed);
    }
}

static inline uint32_t load_char(const uint8_t *text, size_t i) {
    uint32_t c;
    memcpy(&c, text + 4 * i, sizeof c);
    return c;
}

/* Writes a code point from U+0080 up; returns NULL for a surrogate or a value that is not a code point. */
static inline uint8_t *put_multibyte(uint8_t *to, uint32_t c) {
    if (c < 0x800) {
        *to++ = (uint8_t)(0xc0 | c >> 6);
    } else if (c < 0x10000) {
        if (c >= 0xd800 && c < 0xe000) return NULL;
        *to++ = (uint8_t)(0xe0 | c >> 12);
        *to++ = (uint8_t)(0x80 | (c >> 6 & 0x3f));
    } else {
        if (c > 0x10ffff) return NULL;
        *to++ = (uint8_t)(0xf0 | c >> 18);
        *to++ = (uint8_t)(0x80 | (c >> 12 & 0x3f));
        *to++ = (uint8_t)(0x80 | (c >> 6 & 0x3f));
    }
    *to++ = (uint8_t)(0x80 | (c & 0x3f));
    return to;
}

/* Loads two adjacent native code points. */
static inline uint64_t load_char_pair(const uint8_t *text, size_t i) {
    uint64_t pair;
    memcpy(&pair, text + 4 * i, sizeof pair);
    return pair;
}

/* Encodes `length` code points, ASCII four at a time; returns the end of the text, or NULL. */
static inline uint8_t *encode_utf8(const uint8_t *from, size_t length, uint8_t *to) {
    for (size_t i = 0; i < length;) {
        if (length - i >= 4) {
            uint64_t a = load_char_pair(from, i), b = load_char_pair(from, i + 2);
            if (((a | b) & UINT64_C(0xffffff80ffffff80)) == 0) {
                for (int j = 0; j < 4; j++) to[j] = (uint8_t)load_char(from, i + j);
                to += 4;
                i += 4;
                continue;
            }
        }
        uint32_t c = load_char(from, i++);
        if (c < 0x80) *to++ = (uint8_t)c;
        else if ((to = put_multibyte(to, c)) == NULL) return NULL;
    }
    return to;
}

/* Returns the number of code points up to and including the last one that is not zero. */
static inline size_t stripped_chars(const uint8_t *text, size_t width) {
    while (width >= 2 && load_char_pair(text, width - 2) == 0) width -= 2;
    return width > 0 && load_char(text, width - 1) == 0 ? width - 1 : width;
}

/* Hashes NumPy `U` values: `width` > 0 code points each, in native order, padded with zeros. `scratch` holds
 * 4 * width + 16 bytes. */
static inline int64_t hash_fixed_ucs4(const uint8_t *raw, size_t width, int64_t n, uint32_t seed, uint8_t *scratch,
                                      uint64_t *out, ptrdiff_t stride) {
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *text = raw + i * (int64_t)(4 * width);
        uint8_t *end = encode_utf8(text, stripped_chars(text, width), scratch);
        if (end == NULL) return i;
        out[i * stride] = murmur_hash_within(scratch, (size_t)(end - scratch), 4 * width + 16, seed);
    }
    return HASH_OK;
}

#endif
