/* Parse decimal numbers: integers of up to 18 digits, and reals rounded to the nearest double. */
#ifndef HASHEMB_NUMBERS_H
#define HASHEMB_NUMBERS_H

#include <math.h>

#include "murmur.h"

enum { NUMBER_MAX_BYTES = 128 };

static inline int is_digit(uint8_t c) { return (uint8_t)(c - '0') <= 9; }

/* Parse eight digits, the first in the lowest byte: three multiplications combine adjacent digits
 * (Lemire, "Quickly parsing eight digits", 2018). Return 0 if one of them is not a digit. */
static inline int parse_eight_digits(uint64_t word, uint64_t *out) {
    const uint64_t nibbles = UINT64_C(0xf0f0f0f0f0f0f0f0), zeros = UINT64_C(0x3030303030303030);
    int ok = ((word & nibbles) == zeros) & (((word + UINT64_C(0x0606060606060606)) & nibbles) == zeros);
    word = (word & ~nibbles) * 2561 >> 8;
    word = (word & UINT64_C(0x00ff00ff00ff00ff)) * 6553601 >> 16;
    *out = (word & UINT64_C(0x0000ffff0000ffff)) * UINT64_C(42949672960001) >> 32;
    return ok;
}

static inline int parse_long_digits(const uint8_t *p, int64_t length, uint64_t *out) {
    uint64_t value = 0;
    if (length > 18) return 0;
    for (int64_t i = 0; i < length; i++) {
        if (!is_digit(p[i])) return 0;
        value = 10 * value + (uint64_t)(p[i] - '0');
    }
    *out = value;
    return 1;
}

/* Parse -?[0-9]{1,18} in `length` > 0 bytes, where `readable` bytes may be read. Return 0 for anything else. */
static inline int parse_integer(const uint8_t *p, int64_t length, int64_t readable, int64_t *out) {
    uint64_t magnitude;
    int negative = p[0] == '-';
    p += negative;
    length -= negative;
    readable -= negative;
    if (length >= 1 && length <= 8 && readable >= 8) {
        uint64_t word = murmur_load64(p) << (64 - 8 * length);
        word |= UINT64_C(0x0030303030303030) >> (8 * (length - 1)); /* leading zeros */
        if (!parse_eight_digits(word, &magnitude)) return 0;
    } else if (length < 1 || !parse_long_digits(p, length, &magnitude)) {
        return 0;
    }
    *out = negative ? -(int64_t)magnitude : (int64_t)magnitude;
    return 1;
}

/* The parts of a number, to a precision of 19 digits. */
typedef struct {
    uint64_t mantissa;
    int exponent, negative, inexact;
} number_parts;

static inline const uint8_t *scan_digits(const uint8_t *p, const uint8_t *end, number_parts *parts, int step) {
    for (; p < end && is_digit(*p); p++) {
        if (parts->mantissa < UINT64_C(1000000000000000000)) {
            parts->mantissa = 10 * parts->mantissa + (uint64_t)(*p - '0');
            parts->exponent += step;
        } else {
            parts->exponent += step + 1; /* a dropped digit; before the point it still shifts the exponent */
            parts->inexact |= *p != '0';
        }
    }
    return p;
}

static inline const uint8_t *scan_exponent(const uint8_t *p, const uint8_t *end, number_parts *parts) {
    int negative = 0, value = 0;
    if (p < end && (*p == '-' || *p == '+')) negative = *p++ == '-';
    if (p == end) return NULL;
    for (; p < end && is_digit(*p); p++) value = value < 10000 ? 10 * value + (*p - '0') : value;
    parts->exponent += negative ? -value : value;
    return p;
}

/* Scan [+-]?(digits[.digits]|.digits)([eE][+-]?digits)?, which must span all of [p, end). */
static inline int scan_number(const uint8_t *p, const uint8_t *end, number_parts *parts) {
    const uint8_t *digits, *point;
    memset(parts, 0, sizeof *parts);
    if (p < end && (*p == '-' || *p == '+')) parts->negative = *p++ == '-';
    digits = p;
    point = p = scan_digits(p, end, parts, 0);
    if (p < end && *p == '.') p = scan_digits(p + 1, end, parts, -1);
    if (point == digits && p <= point + 1) return 0; /* no digit on either side of the point */
    if (p < end && (*p == 'e' || *p == 'E')) p = scan_exponent(p + 1, end, parts);
    return p == end;
}

/* Parse the double nearest to the number in [p, end), like Python's float(). Return 0 if there is no number or it is
 * not finite. Most numbers are exact in one operation (Clinger, "How to read floating point numbers accurately",
 * 1990); `slow` parses a NUL-terminated copy of the others. */
static inline int parse_number(const uint8_t *p, const uint8_t *end, double (*slow)(const char *), double *out) {
    static const double powers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                    1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    number_parts parts;
    char copy[NUMBER_MAX_BYTES];
    if (end - p >= NUMBER_MAX_BYTES || !scan_number(p, end, &parts)) return 0;
    if (parts.mantissa <= UINT64_C(1) << 53 && !parts.inexact && parts.exponent >= -22 && parts.exponent <= 22) {
        double value = (double)parts.mantissa;
        value = parts.exponent < 0 ? value / powers[-parts.exponent] : value * powers[parts.exponent];
        *out = parts.negative ? -value : value;
        return 1;
    }
    memcpy(copy, p, (size_t)(end - p));
    copy[end - p] = '\0';
    *out = slow(copy);
    return isfinite(*out) != 0;
}

#endif
