/* Convert Criteo lines to keys. Unusual lines are not checked here but returned to the caller. */
#include "lines.h"
#include "numbers.h"
#include "runtime.h"
#include "tokens.h"

enum { MIN_LINE_BYTES = TOK_COLUMNS - 1, MAX_TABS = TOK_COLUMNS + 1, ROW_WORDS = 40 };

/* The ends of a line's columns: tabs and, for the last column, the line feed. */
typedef struct {
    int32_t tabs[MAX_TABS];
    int64_t num_tabs;
    int64_t length; /* without the line feed */
    int is_plain;
} line_index;

typedef struct criteo_work criteo_work;
typedef struct line_words line_words;

struct criteo_work {
    const tok_column *columns;
    const tok_buckets *buckets;
    const uint8_t *limit;                            /* the end of the text */
    uint64_t seeds[ROW_WORDS], null_keys[ROW_WORDS]; /* of the columns, and padding */
    int takes_all;                                   /* every column is selected, in the order of the file */
    void (*hash_words)(const criteo_work *work, line_words *line);
};

const he_runtime *he_linked;

int64_t tok_count_lines(const uint8_t *text, int64_t size) { return lines_count(text, size); }

int64_t tok_criteo_max_rows(int64_t size) { return size / (MIN_LINE_BYTES + 1) + 1; }

/* Store the first tabs and count all of them; bits are visited from the lowest up. */
static inline int64_t keep_tabs(line_index *index, uint64_t bits, int64_t offset) {
    int64_t count = index->num_tabs + __builtin_popcountll(bits);
    for (int64_t i = index->num_tabs; bits != 0 && i < MAX_TABS; i++, bits &= bits - 1)
        index->tabs[i] = (int32_t)(offset + __builtin_ctzll(bits));
    return count;
}

static inline void index_line(const uint8_t *line, const uint8_t *limit, line_index *index) {
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

static inline int64_t count_bucket(const tok_buckets *buckets, int64_t x) {
    if (x < TOK_SMALL) return x < 0 ? x : buckets->small[x];
    int octave = 63 - __builtin_clzll((uint64_t)x);
    int64_t low = buckets->octave[octave], high = buckets->octave[octave + 1];
    while (low < high) { /* find the last bucket with first <= x */
        int64_t middle = (low + high + 1) / 2;
        if (buckets->first[middle] <= x) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* The hash input of a line: a word for each column, all bytes of which are hashed; the rest is padding. */
struct line_words {
    uint64_t words[ROW_WORDS], lengths[ROW_WORDS], is_missing[ROW_WORDS], keys[ROW_WORDS];
};

/* Return 0 if any integer of the line is not a plain one. */
static inline int take_integers(const criteo_work *work, const uint8_t *line, const int32_t *ends, int32_t begin,
                                line_words *to) {
    for (int j = 0; j < TOK_INTEGERS; j++) {
        const uint8_t *p = line + begin;
        int32_t length = ends[j] - begin;
        int64_t value = 0;
        begin = ends[j] + 1;
        if (length > 0 && !parse_integer(p, length, work->limit - p, &value)) return 0;
        if (work->columns[j].is_count) value = count_bucket(work->buckets, value);
        to->words[j] = (uint64_t)value;
        to->lengths[j] = sizeof value;
        to->is_missing[j] = length == 0;
    }
    return 1;
}

/* Return the set of columns that are longer than a word. */
static inline uint64_t take_categories(const criteo_work *work, const uint8_t *line, const int32_t *ends, int32_t begin,
                                       line_words *to) {
    uint64_t longer = 0;
    for (int j = TOK_INTEGERS; j < TOK_COLUMNS; j++) {
        const uint8_t *p = line + begin;
        size_t length = (size_t)(ends[j] - begin);
        begin = ends[j] + 1;
        to->words[j] = work->limit - p >= 8 ? murmur_load64(p) & murmur_byte_mask(length)
                                            : murmur_load_upto8(p, length);
        to->lengths[j] = length;
        to->is_missing[j] = length == 0;
        longer |= (uint64_t)(length > 8) << j;
    }
    return longer;
}

/* Compute murmur_hash_short of one word for all columns in parallel. */
static inline void hash_words(const criteo_work *work, line_words *line) {
    for (int j = 0; j < ROW_WORDS; j++) {
        uint64_t seed = work->seeds[j];
        uint64_t key = murmur_finish(seed ^ murmur_mix1(line->words[j]), seed, line->lengths[j]);
        line->keys[j] = line->is_missing[j] ? work->null_keys[j] : key;
    }
}

static void hash_words_baseline(const criteo_work *work, line_words *line) { hash_words(work, line); }

#if HE_X86
HE_BEGIN_TARGET(HE_AVX512) /* has a multiplication of 64-bit words */
static void hash_words_avx512(const criteo_work *work, line_words *line) { hash_words(work, line); }
HE_END_TARGET
#endif

static void hash_line(const criteo_work *work, const uint8_t *line, const int32_t *ends, uint64_t longer,
                      line_words *words, uint64_t *row) {
    work->hash_words(work, words);
    for (; longer; longer &= longer - 1) {
        int j = __builtin_ctzll(longer);
        const uint8_t *p = line + ends[j - 1] + 1;
        words->keys[j] = murmur_hash_within(p, words->lengths[j], (size_t)(work->limit - p), work->columns[j].seed);
    }
    if (work->takes_all) memcpy(row, words->keys, TOK_COLUMNS * sizeof *row);
    else
        for (int j = 0; j < TOK_COLUMNS; j++)
            if (work->columns[j].out >= 0) row[work->columns[j].out] = words->keys[j];
}

static inline int take_line(const criteo_work *work, const uint8_t *line, line_index *index, int labelled, float *label,
                            uint64_t *row) {
    if (!index->is_plain || index->num_tabs != TOK_COLUMNS - 1 + labelled) return 0;
    index->tabs[index->num_tabs] = (int32_t)index->length; /* the end of the last column */
    if (labelled) {
        if (index->tabs[0] != 1 || (line[0] | 1) != '1') return 0;
        *label = (float)(line[0] - '0');
    }
    int32_t begin = labelled ? index->tabs[0] + 1 : 0;
    line_words words;
    words.words[TOK_COLUMNS] = words.lengths[TOK_COLUMNS] = words.is_missing[TOK_COLUMNS] = 0;
    const int32_t *ends = index->tabs + labelled;
    if (!take_integers(work, line, ends, begin, &words)) return 0;
    hash_line(work, line, ends, take_categories(work, line, ends, ends[TOK_INTEGERS - 1] + 1, &words), &words, row);
    return 1;
}

static criteo_work work_on(const tok_column *columns, const tok_buckets *buckets, const uint8_t *limit) {
    criteo_work work = {columns, buckets, limit, {0}, {0}, 1, hash_words_baseline};
    for (int j = 0; j < TOK_COLUMNS; j++) {
        work.seeds[j] = columns[j].seed;
        work.null_keys[j] = columns[j].null_key;
        work.takes_all &= columns[j].out == j;
    }
#if HE_X86
    if (he_isa() == HE_ISA_AVX512) work.hash_words = hash_words_avx512;
#endif
    return work;
}

int64_t tok_criteo(const uint8_t *text, int64_t size, int labelled, const tok_column *columns,
                   const tok_buckets *buckets, int64_t row_keys, float *labels, uint64_t *keys, tok_odd *odd,
                   int64_t *num_odd) {
    criteo_work work = work_on(columns, buckets, text + size);
    int64_t row = 0, line = 0;
    float unused;
    *num_odd = 0;
    for (const uint8_t *p = text; p < work.limit; line++) {
        line_index index;
        index_line(p, work.limit, &index);
        float *label = labelled ? labels + row : &unused;
        int is_short = index.length < MIN_LINE_BYTES;
        int is_taken = !is_short && index.length <= TOK_MAX_LINE_BYTES &&
                       take_line(&work, p, &index, labelled, label, keys + row * row_keys);
        if (!is_taken) odd[(*num_odd)++] = (tok_odd){line, p - text, is_short ? -1 : row};
        row += !is_short;
        p += index.length + 1;
    }
    return row;
}
