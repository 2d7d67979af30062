/* Criteo lines -> keys. A line in which anything is out of the ordinary is not judged here but handed back. */
#include "lines.h"
#include "numbers.h"
#include "tokens.h"

enum { MIN_LINE_BYTES = TOK_COLUMNS - 1, MAX_TABS = TOK_COLUMNS + 1 };

/* Where the columns of a line end: at tabs, and the last one at its line feed. */
typedef struct {
    int32_t tabs[MAX_TABS];
    int64_t num_tabs;
    int64_t length; /* without the line feed */
    int is_plain;
} line_index;

typedef struct {
    const tok_column *columns;
    const tok_buckets *buckets;
    const uint8_t *limit; /* where the text ends */
} criteo_work;

int64_t tok_count_lines(const uint8_t *text, int64_t size) { return lines_count(text, size); }

int64_t tok_criteo_max_rows(int64_t size) { return size / (MIN_LINE_BYTES + 1) + 1; }

/* Sets of bits are walked from the lowest up. The first tabs are kept, all are counted. */
static inline int64_t keep_tabs(line_index *index, uint64_t bits, int64_t offset)
{
    int64_t count = index->num_tabs + __builtin_popcountll(bits);
    for (int64_t i = index->num_tabs; bits != 0 && i < MAX_TABS; i++, bits &= bits - 1)
        index->tabs[i] = (int32_t)(offset + __builtin_ctzll(bits));
    return count;
}

static inline void index_line(const uint8_t *line, const uint8_t *limit, line_index *index)
{
    uint64_t odd = 0, high = 0;
    index->num_tabs = 0;
    for (int64_t offset = 0;; offset += LINES_CHUNK_BYTES) {
        lines_masks masks = lines_scan_upto(line + offset, limit);
        uint64_t inside = masks.ends ? (masks.ends & -masks.ends) - 1 : ~UINT64_C(0);
        odd |= masks.odd & inside;
        high |= masks.high & inside;
        index->num_tabs = keep_tabs(index, masks.tabs & inside, offset);
        if (masks.ends) {
            index->length = offset + __builtin_ctzll(masks.ends);
            break;
        }
    }
    index->is_plain = odd == 0 && (high == 0 || utf8_is_valid(line, line + index->length));
}

static inline int64_t count_bucket(const tok_buckets *buckets, int64_t x)
{
    if (x < TOK_SMALL)
        return x < 0 ? x : buckets->small[x];
    int octave = 63 - __builtin_clzll((uint64_t)x);
    int64_t low = buckets->octave[octave], high = buckets->octave[octave + 1];
    while (low < high) { /* the last one that begins at x or below */
        int64_t middle = (low + high + 1) / 2;
        if (buckets->first[middle] <= x)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* Returns 0 where the integers of the line are not all plain ones. */
static inline int hash_integers_of(const criteo_work *work, const uint8_t *line, const int32_t *ends, int32_t begin,
                                   uint64_t *row)
{
    for (int j = 0; j < TOK_INTEGERS; j++) {
        const tok_column *column = &work->columns[j];
        const uint8_t *p = line + begin;
        int32_t length = ends[j] - begin;
        int64_t value = 0;
        begin = ends[j] + 1;
        if (length > 0 && !parse_integer(p, length, work->limit - p, &value))
            return 0;
        if (column->out < 0)
            continue;
        if (column->is_count)
            value = count_bucket(work->buckets, value);
        row[column->out] = length > 0 ? murmur_hash_word((uint64_t)value, column->seed) : column->null_key;
    }
    return 1;
}

static inline void hash_categories_of(const criteo_work *work, const uint8_t *line, const int32_t *ends, int32_t begin,
                                      uint64_t *row)
{
    for (int j = 0; j < TOK_CATEGORIES; j++) {
        const tok_column *column = &work->columns[TOK_INTEGERS + j];
        const uint8_t *p = line + begin;
        int32_t length = ends[j] - begin;
        begin = ends[j] + 1;
        if (column->out < 0)
            continue;
        uint64_t key = murmur_hash_within(p, (size_t)length, (size_t)(work->limit - p), column->seed);
        row[column->out] = length > 0 ? key : column->null_key;
    }
}

static inline int take_line(const criteo_work *work, const uint8_t *line, line_index *index, int labelled,
                            float *label, uint64_t *row)
{
    if (!index->is_plain || index->num_tabs != TOK_COLUMNS - 1 + labelled)
        return 0;
    index->tabs[index->num_tabs] = (int32_t)index->length; /* the last column ends there */
    if (labelled) {
        if (index->tabs[0] != 1 || (line[0] | 1) != '1')
            return 0;
        *label = (float)(line[0] - '0');
    }
    int32_t begin = labelled ? index->tabs[0] + 1 : 0;
    if (!hash_integers_of(work, line, index->tabs + labelled, begin, row))
        return 0;
    begin = index->tabs[labelled + TOK_INTEGERS - 1] + 1;
    hash_categories_of(work, line, index->tabs + labelled + TOK_INTEGERS, begin, row);
    return 1;
}

int64_t tok_criteo(const uint8_t *text, int64_t size, int labelled, const tok_column *columns,
                   const tok_buckets *buckets, int64_t row_keys, float *labels, uint64_t *keys, tok_odd *odd,
                   int64_t *num_odd)
{
    criteo_work work = {columns, buckets, text + size};
    int64_t row = 0, line = 0;
    float unused;
    *num_odd = 0;
    for (const uint8_t *p = text; p < work.limit; line++) {
        line_index index;
        index_line(p, work.limit, &index);
        float *label = labelled ? labels + row : &unused;
        int is_short = index.length < MIN_LINE_BYTES;
        int is_taken = !is_short && index.length <= TOK_MAX_LINE_BYTES
                       && take_line(&work, p, &index, labelled, label, keys + row * row_keys);
        if (!is_taken)
            odd[(*num_odd)++] = (tok_odd){line, p - text, is_short ? -1 : row};
        row += !is_short;
        p += index.length + 1;
    }
    return row;
}
