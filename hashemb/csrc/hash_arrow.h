/* Hashing of columns received through the Arrow C data interface
 * (https://arrow.apache.org/docs/format/CDataInterface.html), which pyarrow, polars and others support.
 *
 * Values are hashed in place, in the producer's buffers; the library itself is neither linked nor imported.
 * Ranges that the interface allows us to check (offsets, views, dictionary codes) are checked before they are
 * followed. Nothing here allocates.
 */
#ifndef HASHEMB_HASH_ARROW_H
#define HASHEMB_HASH_ARROW_H

#include "hash_columns.h"

#ifndef ARROW_C_DATA_INTERFACE
#define ARROW_C_DATA_INTERFACE
struct ArrowSchema {
    const char *format, *name, *metadata;
    int64_t flags, n_children;
    struct ArrowSchema **children, *dictionary;
    void (*release)(struct ArrowSchema *);
    void *private_data;
};

struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children, *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
};
#endif

#ifndef ARROW_C_STREAM_INTERFACE
#define ARROW_C_STREAM_INTERFACE
struct ArrowArrayStream {
    int (*get_schema)(struct ArrowArrayStream *, struct ArrowSchema *out);
    int (*get_next)(struct ArrowArrayStream *, struct ArrowArray *out);
    const char *(*get_last_error)(struct ArrowArrayStream *);
    void (*release)(struct ArrowArrayStream *);
    void *private_data;
};
#endif

static inline int arrow_bit(const uint8_t *bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

static inline const uint8_t *arrow_validity(const struct ArrowArray *array) {
    int absent = array->null_count == 0 || array->n_buffers == 0;
    return absent ? NULL : (const uint8_t *)array->buffers[0];
}

static inline int64_t arrow_load_offset(const uint8_t *offsets, int wide, int64_t i) {
    int64_t offset64;
    int32_t offset32;
    if (wide) {
        memcpy(&offset64, offsets + 8 * i, sizeof offset64);
        return offset64;
    }
    memcpy(&offset32, offsets + 4 * i, sizeof offset32);
    return offset32;
}

/* Hashes strings or bytes in one buffer, with element i between offsets i and i + 1. */
static inline int64_t arrow_hash_spans(const struct ArrowArray *array, int wide, int64_t first, int64_t n,
                                       uint32_t seed, uint64_t *out, ptrdiff_t stride) {
    const uint8_t *offsets = array->buffers[1], *data = array->buffers[2];
    int64_t limit = arrow_load_offset(offsets, wide, first + n);
    int64_t start = arrow_load_offset(offsets, wide, first);
    if (start < 0) return 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t stop = arrow_load_offset(offsets, wide, first + i + 1);
        if (stop < start || stop > limit) return i;
        size_t length = (size_t)(stop - start);
        out[i * stride] = murmur_hash_within(data + start, length, (size_t)(limit - start), seed);
        start = stop;
    }
    return HASH_OK;
}

/* Hashes views of 16 bytes: a length, then up to 12 bytes of the value itself, or its prefix, buffer and offset. */
static inline int64_t arrow_hash_views(const struct ArrowArray *array, int64_t first, int64_t n, uint32_t seed,
                                       uint64_t *out, ptrdiff_t stride) {
    const uint8_t *validity = arrow_validity(array);
    const int64_t *sizes = array->buffers[array->n_buffers - 1];
    int64_t num_buffers = array->n_buffers - 3;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *view = (const uint8_t *)array->buffers[1] + 16 * (first + i);
        struct {
            int32_t length, prefix, buffer, offset;
        } parts;
        memcpy(&parts, view, sizeof parts);
        if (validity != NULL && !arrow_bit(validity, first + i)) continue; /* the view of a null is undefined */
        if (parts.length < 0) return i;
        if (parts.length <= 12) {
            size_t length = (size_t)parts.length, above8 = length > 8 ? length - 8 : 0;
            uint64_t k1 = murmur_load64(view + 4) & murmur_byte_mask(length);
            uint64_t k2 = murmur_load32(view + 12) & murmur_byte_mask(above8);
            out[i * stride] = murmur_hash_short(k1, k2, length, seed);
            continue;
        }
        if (parts.buffer < 0 || parts.buffer >= num_buffers || parts.offset < 0 ||
            parts.offset + (int64_t)parts.length > sizes[parts.buffer])
            return i;
        const uint8_t *data = array->buffers[2 + parts.buffer];
        out[i * stride] = murmur_hash_within(data + parts.offset, (size_t)parts.length,
                                             (size_t)(sizes[parts.buffer] - parts.offset), seed);
    }
    return HASH_OK;
}

static inline void arrow_hash_fixed(const uint8_t *values, size_t width, int64_t n, uint32_t seed, uint64_t *out,
                                    ptrdiff_t stride) {
    for (int64_t i = 0; i < n; i++) out[i * stride] = murmur_hash(values + i * (int64_t)width, width, seed);
}

static inline void arrow_hash_bits(const uint8_t *bits, int64_t first, int64_t n, uint32_t seed, uint64_t *out,
                                   ptrdiff_t stride) {
    uint64_t keys[2] = {murmur_hash_word(0, seed), murmur_hash_word(1, seed)};
    for (int64_t i = 0; i < n; i++) out[i * stride] = keys[arrow_bit(bits, first + i)];
}

/* Returns up to 56 bits from `first`; reads only bytes that hold some of them. */
static inline uint64_t arrow_bits(const uint8_t *bits, int64_t first, int n) {
    int shift = first & 7;
    uint64_t word = murmur_load_upto8(bits + (first >> 3), (size_t)(shift + n + 7) / 8);
    return word >> shift & ((UINT64_C(1) << n) - 1);
}

/* Overwrites the keys of elements whose validity bit is clear. */
static inline void arrow_hash_nulls(const uint8_t *validity, int64_t first, int64_t n, uint32_t seed, uint64_t *out,
                                    ptrdiff_t stride) {
    enum { STEP = 56 };
    uint64_t null_key = murmur_hash_null(seed);
    for (int64_t i = 0; i < n; i += STEP) {
        int num_bits = n - i < STEP ? (int)(n - i) : STEP;
        uint64_t absent = arrow_bits(validity, first + i, num_bits) ^ ((UINT64_C(1) << num_bits) - 1);
        for (; absent != 0; absent &= absent - 1) out[(i + __builtin_ctzll(absent)) * stride] = null_key;
    }
}

/* Returns the width in bytes of an integer format, negative if signed, or 0 for any other format. */
static inline int arrow_integer_width(const char *format) {
    static const char letters[] = "cCsSiIlL";
    const char *found = format[0] != '\0' && format[1] == '\0' ? strchr(letters, format[0]) : NULL;
    if (found == NULL) return 0;
    int index = (int)(found - letters), width = 1 << (index / 2);
    return index % 2 == 0 ? -width : width;
}

/* Returns the width in bytes of a fixed-size binary format "w:<width>", or -1 for any other format. */
static inline int64_t arrow_fixed_width(const char *format) {
    if (format[0] != 'w' || format[1] != ':') return -1;
    int64_t width = 0;
    for (const char *digit = format + 2; *digit >= '0' && *digit <= '9'; digit++) width = 10 * width + (*digit - '0');
    return width;
}

/* Hashes elements first .. first + n of the buffers, which hold values and no dictionary codes. */
static inline int64_t arrow_hash_values(const char *format, const struct ArrowArray *array, int64_t first, int64_t n,
                                        uint32_t seed, uint64_t *out, ptrdiff_t stride) {
    int width = arrow_integer_width(format);
    int64_t fixed = arrow_fixed_width(format);
    const uint8_t *values = array->n_buffers > 1 ? array->buffers[1] : NULL;
    if (width != 0)
        hash_integers(values + first * (width < 0 ? -width : width), width < 0 ? -width : width, width < 0, n, seed,
                      out, stride);
    else if (fixed >= 0) arrow_hash_fixed(values + first * fixed, (size_t)fixed, n, seed, out, stride);
    else if (strcmp(format, "u") == 0 || strcmp(format, "z") == 0)
        return arrow_hash_spans(array, 0, first, n, seed, out, stride);
    else if (strcmp(format, "U") == 0 || strcmp(format, "Z") == 0)
        return arrow_hash_spans(array, 1, first, n, seed, out, stride);
    else if (strcmp(format, "vu") == 0 || strcmp(format, "vz") == 0)
        return arrow_hash_views(array, first, n, seed, out, stride);
    else arrow_hash_bits(values, first, n, seed, out, stride);
    return HASH_OK;
}

/* Returns whether the type of the column, or of its dictionary, can be hashed: integers, booleans, strings,
 * bytes, null. */
static inline int arrow_is_supported(const struct ArrowSchema *schema) {
    static const char *const others[] = {"b", "n", "u", "z", "U", "Z", "vu", "vz"};
    if (schema->dictionary != NULL && schema->dictionary->dictionary != NULL) return 0;
    const char *format = schema->dictionary != NULL ? schema->dictionary->format : schema->format;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strcmp(format, others[i]) == 0) return 1;
    return arrow_integer_width(format) != 0 || arrow_fixed_width(format) >= 0;
}

/* Hashes elements start .. start + n of an array without a dictionary. */
static inline int64_t arrow_hash_plain(const char *format, const struct ArrowArray *array, int64_t start, int64_t n,
                                       uint32_t seed, uint64_t *out, ptrdiff_t stride) {
    int64_t first = array->offset + start;
    if (n == 0) return HASH_OK;
    if (strcmp(format, "n") == 0) {
        for (int64_t i = 0; i < n; i++) out[i * stride] = murmur_hash_null(seed);
        return HASH_OK;
    }
    int64_t status = arrow_hash_values(format, array, first, n, seed, out, stride);
    const uint8_t *validity = arrow_validity(array);
    if (status == HASH_OK && validity != NULL) arrow_hash_nulls(validity, first, n, seed, out, stride);
    return status;
}

static inline uint64_t arrow_load_code(const uint8_t *codes, int width, int64_t i) {
    uint64_t key = 0;
    switch (width) {
#define ARROW_CODE(WIDTH, TYPE)                                       \
    case WIDTH: {                                                     \
        TYPE code;                                                    \
        memcpy(&code, codes + i * (int64_t)sizeof code, sizeof code); \
        key = (uint64_t)code;                                         \
        break;                                                        \
    }
        ARROW_CODE(-1, int8_t)
        ARROW_CODE(-2, int16_t)
        ARROW_CODE(-4, int32_t)
        ARROW_CODE(1, uint8_t)
        ARROW_CODE(2, uint16_t)
        ARROW_CODE(4, uint32_t)
        default: memcpy(&key, codes + 8 * i, sizeof key);
#undef ARROW_CODE
    }
    return key;
}

/* Hashes dictionary codes. `distinct` holds the keys of the dictionary's values, or is NULL if the dictionary is
 * longer than the column (a short batch of a long file): then each element's value is hashed by itself. */
static inline int64_t arrow_hash_codes(const struct ArrowSchema *schema, const struct ArrowArray *array,
                                       const uint64_t *distinct, uint32_t seed, uint64_t *out, ptrdiff_t stride) {
    const struct ArrowArray *dictionary = array->dictionary;
    const uint8_t *validity = arrow_validity(array);
    int width = arrow_integer_width(schema->format);
    for (int64_t i = 0; i < array->length; i++) {
        uint64_t code = arrow_load_code(array->buffers[1], width, array->offset + i);
        if (code >= (uint64_t)dictionary->length) {
            if (validity == NULL || arrow_bit(validity, array->offset + i)) return i;
            continue; /* the code of a null is undefined */
        }
        if (distinct != NULL) out[i * stride] = distinct[code];
        else if (arrow_hash_plain(schema->dictionary->format, dictionary, (int64_t)code, 1, seed, out + i * stride,
                                  1) != HASH_OK)
            return i;
    }
    if (validity != NULL) arrow_hash_nulls(validity, array->offset, array->length, seed, out, stride);
    return HASH_OK;
}

/* Returns the number of keys that `distinct` must have room for in arrow_hash. */
static inline int64_t arrow_num_distinct(const struct ArrowArray *array) {
    int hash_once = array->dictionary != NULL && array->dictionary->length <= array->length;
    return hash_once ? array->dictionary->length : 0;
}

/* Hashes a whole array of a supported type to array->length keys. Returns HASH_OK or the position of an element that
 * points outside the array's buffers or its dictionary (if the dictionary is damaged, a position in it). */
static inline int64_t arrow_hash(const struct ArrowSchema *schema, const struct ArrowArray *array, uint64_t *distinct,
                                 uint32_t seed, uint64_t *out, ptrdiff_t stride) {
    if (schema->dictionary == NULL) return arrow_hash_plain(schema->format, array, 0, array->length, seed, out, stride);
    if (array->dictionary->length > array->length) return arrow_hash_codes(schema, array, NULL, seed, out, stride);
    int64_t status = arrow_hash_plain(schema->dictionary->format, array->dictionary, 0, array->dictionary->length, seed,
                                      distinct, 1);
    return status == HASH_OK ? arrow_hash_codes(schema, array, distinct, seed, out, stride) : status;
}

#endif
