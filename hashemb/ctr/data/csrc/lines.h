/* Find lines and their delimiters, 64 bytes of text at a time, as masks with one bit per byte. */
#ifndef HASHEMB_LINES_H
#define HASHEMB_LINES_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { LINES_CHUNK_BYTES = 64 };

typedef struct {
    uint64_t tabs, ends; /* bit i: byte i is a tab, a line feed */
    uint64_t odd;        /* bit i: byte i is another control below 0x0e, such as NUL and the carriage return */
    uint64_t high;       /* bit i: byte i is not ASCII */
} lines_masks;

#if defined(__SSE2__)

static inline uint64_t lines_movemask(__m128i bytes) { return (uint64_t)(uint32_t)_mm_movemask_epi8(bytes); }

static inline lines_masks lines_scan(const uint8_t *p) {
    const __m128i tab = _mm_set1_epi8('\t'), feed = _mm_set1_epi8('\n'), last = _mm_set1_epi8(0x0d);
    lines_masks masks = {0, 0, 0, 0};
    for (int i = 0; i < LINES_CHUNK_BYTES; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(p + i));
        masks.tabs |= lines_movemask(_mm_cmpeq_epi8(bytes, tab)) << i;
        masks.ends |= lines_movemask(_mm_cmpeq_epi8(bytes, feed)) << i;
        masks.odd |= lines_movemask(_mm_cmpeq_epi8(_mm_min_epu8(bytes, last), bytes)) << i;
        masks.high |= lines_movemask(bytes) << i;
    }
    masks.odd ^= masks.tabs | masks.ends;
    return masks;
}

#else

static inline lines_masks lines_scan(const uint8_t *p) {
    lines_masks masks = {0, 0, 0, 0};
    for (int i = 0; i < LINES_CHUNK_BYTES; i++) {
        masks.tabs |= (uint64_t)(p[i] == '\t') << i;
        masks.ends |= (uint64_t)(p[i] == '\n') << i;
        masks.odd |= (uint64_t)(p[i] < 0x0e && p[i] != '\t' && p[i] != '\n') << i;
        masks.high |= (uint64_t)(p[i] >> 7) << i;
    }
    return masks;
}

#endif

/* Return the masks of the bytes from `p` to `end`, at most 64; bytes past the end are treated as letters. */
static inline lines_masks lines_scan_upto(const uint8_t *p, const uint8_t *end) {
    uint8_t padded[LINES_CHUNK_BYTES];
    if (end - p >= LINES_CHUNK_BYTES) return lines_scan(p);
    memset(padded, 'a', sizeof padded);
    memcpy(padded, p, (size_t)(end - p));
    return lines_scan(padded);
}

/* Count the lines in a block of whole lines. The inner loop counts in bytes, which compilers vectorise well. */
static inline int64_t lines_count(const uint8_t *p, int64_t size) {
    int64_t total = 0;
    for (int64_t i = 0; i < size;) {
        int64_t stop = i + 255 < size ? i + 255 : size;
        uint8_t count = 0;
        for (; i < stop; i++) count += p[i] == '\n';
        total += count;
    }
    return total;
}

/* Return the length of the UTF-8 sequence at `p`; 0 if it is invalid: a lone surrogate, overlong or past U+10FFFF. */
static inline int utf8_sequence(const uint8_t *p, const uint8_t *end) {
    uint8_t first = p[0], low = 0x80, high = 0xbf;
    int length = first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
    if (length == 0 || end - p < length) return 0;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
    for (int i = 1; i < length; i++) {
        if (p[i] < low || p[i] > high) return 0;
        low = 0x80, high = 0xbf;
    }
    return length;
}

static inline int utf8_is_valid(const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        int length = utf8_sequence(p, end);
        if (length == 0) return 0;
        p += length;
    }
    return 1;
}

#endif
