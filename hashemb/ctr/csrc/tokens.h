/* Blocks of text -> labels and keys, without a string in between.
 *
 * Every function here takes whole lines, the last one ended too, and arrays that the caller has made large enough;
 * none allocates, and none reads a byte outside the text. What a line is worth depends on that line alone.
 */
#ifndef HASHEMB_TOKENS_H
#define HASHEMB_TOKENS_H

#include <stdint.h>

int64_t tok_count_lines(const uint8_t *text, int64_t size);

/* ---- Criteo ---- */

enum { TOK_INTEGERS = 13, TOK_CATEGORIES = 26, TOK_COLUMNS = TOK_INTEGERS + TOK_CATEGORIES, TOK_MAX_LINE_BYTES = 1 << 16 };

/* What becomes of a column: nothing (out < 0), or a key in that place of the row. */
typedef struct {
    uint64_t null_key;
    int32_t out;
    uint32_t seed;
    int32_t is_count; /* of an integer: its bucket is hashed, not itself */
} tok_column;

/* Buckets of counts: `small[x]` for 0 <= x < TOK_SMALL; above, the last b with first[b] <= x. Octave k holds the
 * buckets octave[k] <= b <= octave[k + 1], where 2^k has bucket octave[k]. */
enum { TOK_SMALL = 4096, TOK_OCTAVES = 64 };
typedef struct {
    const int16_t *small;
    const int64_t *first;
    int32_t octave[TOK_OCTAVES];
} tok_buckets;

/* A line that is left to be judged elsewhere, and the row kept free for it; -1: too short to be a good one. */
typedef struct {
    int64_t line, begin, row;
} tok_odd;

/* Rows made of `size` bytes of text: `labels` (when `labelled`), and `keys`, `row_keys` to a row. No more than
 * tok_criteo_max_rows(size) rows, and no more entries of `odd` than lines. */
int64_t tok_criteo(const uint8_t *text, int64_t size, int labelled, const tok_column *columns,
                   const tok_buckets *buckets, int64_t row_keys, float *labels, uint64_t *keys, tok_odd *odd,
                   int64_t *num_odd);
int64_t tok_criteo_max_rows(int64_t size);
/* Keys are the same with and without. */
int tok_uses_avx512(void);
void tok_limit_isa(int limited);

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
    TOK_NEW_FIELD, /* not a fault: a field that is in no table yet */
} tok_code;

/* Where a field was first seen. */
typedef struct {
    int64_t line, begin, length;
} tok_name;

/* Fields by the hash of their names: open addressing in 2^(64 - shift) slots, numbers[i] < 0 where slot i is free. The
 * parser adds those that it meets, up to `room` of them, which leaves half of the slots free. */
typedef struct {
    uint64_t *hashes;
    int32_t *numbers;
    uint32_t *seeds;  /* by number */
    tok_name *names;  /* of the last `num_new` fields, whose seeds are not known yet */
    uint64_t secret;  /* odd, drawn at random, so that no file can aim its names at a few slots */
    int shift;
    int64_t count, num_new, room;
} tok_fields;

void tok_add_field(tok_fields *fields, uint64_t hash, uint32_t seed);

typedef struct {
    tok_format format;
    int labelled;           /* whether each line must have a label; where not, one is passed over */
    int64_t max_line_bytes; /* a longer line is a fault */
    int num_labels;
    double label_values[4], label_meanings[4];
} tok_rules;

typedef struct {
    int64_t line, code, begin, length; /* the part of the text that is to blame */
} tok_fault;

typedef struct {
    float *labels, *weights; /* weights: of VW, else NULL */
    int64_t *offsets;        /* offsets[rows] is where the next row begins */
    uint64_t *keys;
    float *values;
    int32_t *fields;         /* NULL for libsvm, which has none */
    tok_fault *faults;
    int64_t rows, num_faults;
    int64_t line, begin;     /* where to go on: the first line not yet taken */
    tok_fault stopped;       /* code TOK_NEW_FIELD: the first name that there was no room for */
} tok_examples;

/* Takes the lines from examples->begin on, to the end of the text or to a line with fields that `fields` lacked, of
 * which only their names are kept: give the last `num_new` fields their seeds, or make room if it has stopped for want
 * of it, and call again. So no line is read more than twice, but for those that the table grows in. Features: no more
 * than tok_max_features(size). */
void tok_examples_parse(const uint8_t *text, int64_t size, const tok_rules *rules, tok_fields *fields,
                        tok_examples *examples);
int64_t tok_max_features(int64_t size);

/* Once, before anything else. */
int tok_init(void);

#endif
