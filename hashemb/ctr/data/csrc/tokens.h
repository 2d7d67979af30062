/* Convert blocks of text to labels and keys, without intermediate strings.
 *
 * Every function takes whole lines, including the last line feed, and arrays that are large enough; none allocates, and
 * none reads a byte outside the text. The result for a line depends only on that line.
 */
#ifndef HASHEMB_TOKENS_H
#define HASHEMB_TOKENS_H

#include <stdint.h>

int64_t tok_count_lines(const uint8_t *text, int64_t size);

/* ---- Criteo ---- */

enum {
    TOK_INTEGERS = 13,
    TOK_CATEGORIES = 26,
    TOK_COLUMNS = TOK_INTEGERS + TOK_CATEGORIES,
    TOK_MAX_LINE_BYTES = 1 << 16
};

/* The output of a column: nothing (out < 0), or a key at that position of the row. */
typedef struct {
    uint64_t null_key;
    int32_t out;
    uint32_t seed;
    int32_t is_count; /* for an integer: hash its bucket instead of its value */
} tok_column;

/* Buckets of counts: `small[x]` for 0 <= x < TOK_SMALL; for larger x, the last b with first[b] <= x. Octave k has the
 * buckets octave[k] <= b <= octave[k + 1], where 2^k has bucket octave[k]. */
enum { TOK_SMALL = 4096, TOK_OCTAVES = 64 };
typedef struct {
    const int16_t *small;
    const int64_t *first;
    int32_t octave[TOK_OCTAVES];
} tok_buckets;

/* An unusual line, which the caller must check, and the row reserved for it; -1: the line is too short to be good. */
typedef struct {
    int64_t line, begin, row;
} tok_odd;

/* Convert `size` bytes of text to `labels` (if `labelled`) and `keys`, `row_keys` per row. There are at most
 * tok_criteo_max_rows(size) rows, and at most as many entries of `odd` as lines. Return the number of rows. */
int64_t tok_criteo(const uint8_t *text, int64_t size, int labelled, const tok_column *columns,
                   const tok_buckets *buckets, int64_t row_keys, float *labels, uint64_t *keys, tok_odd *odd,
                   int64_t *num_odd);
int64_t tok_criteo_max_rows(int64_t size);

/* ---- examples with any number of features: libsvm, libffm, Vowpal Wabbit ---- */

typedef enum { TOK_LIBSVM, TOK_LIBFFM, TOK_VW } tok_format;

typedef enum {
    TOK_OK,
    TOK_EMPTY,
    TOK_TOO_LONG,
    TOK_NO_BAR,
    TOK_NO_LABEL,
    TOK_LABEL,
    TOK_IMPORTANCE,
    TOK_TOO_MANY_WORDS,
    TOK_SCALE,
    TOK_NO_NAME,
    TOK_PAIR,
    TOK_TRIPLE,
    TOK_INDEX,
    TOK_VALUE,
    TOK_FIELD_NAME,
    TOK_NEW_FIELD, /* not a fault: a new field */
} tok_code;

/* The position at which a field was first seen. */
typedef struct {
    int64_t line, begin, length;
} tok_name;

/* Fields by the hash of their names: open addressing in 2^(64 - shift) slots, numbers[i] < 0 if slot i is free. The
 * parser adds new fields, up to `room` in total, which leaves half of the slots free. */
typedef struct {
    uint64_t *hashes;
    int32_t *numbers;
    uint32_t *seeds; /* by number */
    tok_name *names; /* of the last `num_new` fields, whose seeds are not set yet */
    uint64_t secret; /* odd and random, so that no file can choose names that collide */
    int shift;
    int64_t count, num_new, room;
} tok_fields;

void tok_add_field(tok_fields *fields, uint64_t hash, uint32_t seed);

typedef struct {
    tok_format format;
    int labelled;           /* whether each line must have a label; if not, a label is skipped */
    int64_t max_line_bytes; /* a longer line is a fault */
    int num_labels;
    double label_values[4], label_meanings[4];
} tok_rules;

typedef struct {
    int64_t line, code, begin, length; /* code, line and offending part of the text */
} tok_fault;

typedef struct {
    float *labels, *weights; /* weights: only for VW, else NULL */
    int64_t *offsets;        /* offsets[rows] is where the next row begins */
    uint64_t *keys;
    float *values;
    int32_t *fields; /* NULL for libsvm, which has none */
    tok_fault *faults;
    int64_t rows, num_faults;
    int64_t line, begin; /* where to resume: the first line that is not parsed yet */
    tok_fault stopped;   /* code TOK_NEW_FIELD: the first name for which there was no room */
} tok_examples;

/* Parse the lines from examples->begin on, up to the end of the text or to a line with new fields, from which only the
 * names of the fields are stored. The caller then sets the seeds of the last `num_new` fields, makes room if there was
 * none, and calls again. No line is therefore read more than twice, except lines at which the table grows. There are at
 * most tok_max_features(size) features. */
void tok_examples_parse(const uint8_t *text, int64_t size, const tok_rules *rules, tok_fields *fields,
                        tok_examples *examples);
int64_t tok_max_features(int64_t size);

/* Must be called once, before all other functions. */
int tok_init(void);

#endif
