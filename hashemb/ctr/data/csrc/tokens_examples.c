/* Convert libsvm, libffm and Vowpal Wabbit lines to keys, values and fields of any number of features.
 *
 * A line is accepted as a whole or not at all: a fault anywhere discards the features that the line has written.
 */
#define _GNU_SOURCE
#include <locale.h>
#include <stdlib.h>

#include "lines.h"
#include "numbers.h"
#include "tokens.h"

static locale_t c_locale; /* its decimal separator is a point */

int tok_init(void) {
    if (c_locale == (locale_t)0) c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    return c_locale != (locale_t)0;
}

/* The shortest feature of all formats, with the blank before it, is " a" in VW. */
int64_t tok_max_features(int64_t size) { return size / 2 + 1; }

/* The state of parsing a line. */
typedef struct {
    const tok_rules *rules;
    tok_fields *fields;
    tok_examples *out;
    const uint8_t *text, *end; /* the end of the line */
    int64_t at;                /* the position of the next feature */
    double label, importance;
    tok_fault fault;
} work;

static int blame(work *w, tok_code code, const uint8_t *begin, const uint8_t *end) {
    w->fault = (tok_fault){w->out->line, code, begin - w->text, end - begin};
    return 0;
}

static double slow_number(const char *text) { return strtod_l(text, NULL, c_locale); }

static inline int number(const uint8_t *p, const uint8_t *end, double *out) {
    return parse_number(p, end, slow_number, out);
}

/* Parse a value that float32 can hold. */
static inline int finite_value(const uint8_t *p, const uint8_t *end, double *out) {
    return number(p, end, out) && isfinite((float)*out);
}

static inline int is_blank(uint8_t c) { return c == ' ' || c == '\t'; }

static inline const uint8_t *skip_blanks(const uint8_t *p, const uint8_t *end) {
    while (p < end && is_blank(*p)) p++;
    return p;
}

static inline const uint8_t *word_end(const uint8_t *p, const uint8_t *end) {
    while (p < end && !is_blank(*p)) p++;
    return p;
}

static inline const uint8_t *find(const uint8_t *p, const uint8_t *end, uint8_t c) {
    while (p < end && *p != c) p++;
    return p;
}

/* ---- fields ---- */

/* Return the first slot to probe: the high bits of a product with a secret are as good as random (Dietzfelbinger et
 * al., "A reliable randomized algorithm for the closest-pair problem", 1997). */
static inline uint64_t first_slot(const tok_fields *fields, uint64_t hash) {
    return hash * fields->secret >> fields->shift;
}

/* Return the slot of a field, or the free slot where it belongs. */
static inline uint64_t find_slot(const tok_fields *fields, uint64_t hash) {
    uint64_t slot = first_slot(fields, hash), mask = ~UINT64_C(0) >> fields->shift;
    while (fields->numbers[slot] >= 0 && fields->hashes[slot] != hash) slot = (slot + 1) & mask;
    return slot;
}

static int32_t fill_slot(tok_fields *fields, uint64_t slot, uint64_t hash, uint32_t seed) {
    fields->hashes[slot] = hash;
    fields->numbers[slot] = (int32_t)fields->count;
    fields->seeds[fields->count] = seed;
    return (int32_t)fields->count++;
}

void tok_add_field(tok_fields *fields, uint64_t hash, uint32_t seed) {
    uint64_t slot = find_slot(fields, hash);
    if (fields->numbers[slot] < 0) fill_slot(fields, slot, hash, seed);
    else fields->seeds[fields->count++] = seed; /* names with the same hash share the field of the first name */
}

/* Add a new field and return its number; return -1, and set the fault of the line, if it cannot be added. */
static int32_t new_field(work *w, uint64_t slot, uint64_t hash, const uint8_t *name, const uint8_t *end) {
    tok_fields *fields = w->fields;
    if (!utf8_is_valid(name, end)) return blame(w, TOK_FIELD_NAME, name, end) - 1;
    if (fields->count >= fields->room) return blame(w, TOK_NEW_FIELD, name, end) - 1;
    fields->names[fields->num_new++] = (tok_name){w->out->line, name - w->text, end - name};
    return fill_slot(fields, slot, hash, 0);
}

static inline int32_t field_number(work *w, const uint8_t *name, const uint8_t *end) {
    uint64_t hash = murmur_hash_within(name, (size_t)(end - name), (size_t)(w->end - name), 0);
    uint64_t slot = find_slot(w->fields, hash);
    int32_t found = w->fields->numbers[slot];
    return found >= 0 ? found : new_field(w, slot, hash, name, end);
}

static inline void add_feature(work *w, uint64_t key, double value, int32_t field) {
    w->out->keys[w->at] = key;
    w->out->values[w->at] = (float)value;
    if (w->out->fields != NULL) w->out->fields[w->at] = field;
    w->at++;
}

static int take_label(work *w, const uint8_t *p, const uint8_t *end) {
    double value;
    if (!w->rules->labelled) return 1;
    if (number(p, end, &value))
        for (int i = 0; i < w->rules->num_labels; i++)
            if (value == w->rules->label_values[i]) {
                w->label = w->rules->label_meanings[i];
                return 1;
            }
    return blame(w, TOK_LABEL, p, end);
}

static int need_label(work *w, const uint8_t *p) { return w->rules->labelled ? blame(w, TOK_NO_LABEL, p, p) : 1; }

/* ---- libsvm and libffm ---- */

static inline int take_pair(work *w, const uint8_t *p, const uint8_t *end) {
    const uint8_t *colon = find(p, end, ':');
    int64_t index;
    double value;
    if (colon == end) return blame(w, TOK_PAIR, p, end);
    if (colon == p || !parse_integer(p, colon - p, w->end - p, &index)) return blame(w, TOK_INDEX, p, colon);
    if (!finite_value(colon + 1, end, &value)) return blame(w, TOK_VALUE, colon + 1, end);
    add_feature(w, murmur_hash_word((uint64_t)index, w->fields->seeds[0]), value, 0);
    return 1;
}

static inline int take_triple(work *w, const uint8_t *p, const uint8_t *end) {
    const uint8_t *first = find(p, end, ':');
    const uint8_t *second = first == end ? end : find(first + 1, end, ':');
    int64_t index;
    double value;
    if (second == end || first == p) return blame(w, TOK_TRIPLE, p, end);
    if (second == first + 1 || !parse_integer(first + 1, second - first - 1, w->end - first - 1, &index))
        return blame(w, TOK_INDEX, first + 1, second);
    if (!finite_value(second + 1, end, &value)) return blame(w, TOK_VALUE, second + 1, end);
    int32_t field = field_number(w, p, first);
    if (field < 0) return 0;
    add_feature(w, murmur_hash_word((uint64_t)index, w->fields->seeds[field]), value, field);
    return 1;
}

/* Parse: label feature feature …, where a label contains no colon. */
static int take_indexed_line(work *w, const uint8_t *p) {
    const uint8_t *end = w->end;
    p = skip_blanks(p, end);
    const uint8_t *next = word_end(p, end);
    if (find(p, next, ':') == next) {
        if (!take_label(w, p, next)) return 0;
    } else {
        if (!need_label(w, p)) return 0;
        next = p;
    }
    for (p = skip_blanks(next, end); p < end; p = skip_blanks(next, end)) {
        next = word_end(p, end);
        if (!(w->rules->format == TOK_LIBSVM ? take_pair(w, p, next) : take_triple(w, p, next))) return 0;
    }
    return 1;
}

/* ---- Vowpal Wabbit ---- */

/* Parse: [label [importance]] ['tag], up to the first bar. The last word is a tag if it begins with a quote or touches
 * the bar. */
static int take_vw_head(work *w, const uint8_t *p, const uint8_t *bar) {
    const uint8_t *begins[4], *ends[4];
    int count = 0;
    for (p = skip_blanks(p, bar); p < bar; p = skip_blanks(p, bar)) {
        if (count == 4) return blame(w, TOK_TOO_MANY_WORDS, begins[0], bar);
        begins[count] = p;
        ends[count++] = p = word_end(p, bar);
    }
    if (count > 0 && (ends[count - 1] == bar || *begins[count - 1] == '\'')) count--;
    if (count > 2) return blame(w, TOK_TOO_MANY_WORDS, begins[0], bar);
    if (count == 0) return need_label(w, bar);
    if (!take_label(w, begins[0], ends[0])) return 0;
    if (count == 2 && (!finite_value(begins[1], ends[1], &w->importance) || w->importance < 0.0))
        return blame(w, TOK_IMPORTANCE, begins[1], ends[1]);
    return 1;
}

static inline const uint8_t *vw_name_end(const uint8_t *p, const uint8_t *end) {
    while (p < end && !is_blank(*p) && *p != ':' && *p != '|') p++;
    return p;
}

/* Parse an optional ":number" at *p, and move *p past it. */
static inline int take_vw_number(work *w, const uint8_t **p, tok_code code, double *out) {
    const uint8_t *begin = *p + 1, *end = begin;
    *out = 1.0;
    if (*p == w->end || **p != ':') return 1;
    while (end < w->end && !is_blank(*end) && *end != '|') end++;
    *p = end;
    return finite_value(begin, end, out) ? 1 : blame(w, code, begin, end);
}

/* Parse the namespace at *p, after its bar, up to the next bar. */
static int take_vw_namespace(work *w, const uint8_t **p) {
    const uint8_t *name = *p, *end = w->end;
    double scale, value;
    *p = vw_name_end(name, end);
    int32_t field = field_number(w, name, *p);
    if (field < 0 || !take_vw_number(w, p, TOK_SCALE, &scale)) return 0;
    uint32_t seed = w->fields->seeds[field];
    for (*p = skip_blanks(*p, end); *p < end && **p != '|'; *p = skip_blanks(*p, end)) {
        name = *p;
        *p = vw_name_end(name, end);
        uint64_t key = murmur_hash_within(name, (size_t)(*p - name), (size_t)(end - name), seed);
        if (*p == name) return blame(w, TOK_NO_NAME, name, word_end(name, end));
        if (!take_vw_number(w, p, TOK_VALUE, &value)) return 0;
        if (!isfinite((float)(value * scale))) return blame(w, TOK_VALUE, name, *p);
        add_feature(w, key, value * scale, field);
    }
    return 1;
}

static int take_vw_line(work *w, const uint8_t *p) {
    const uint8_t *bar = find(p, w->end, '|');
    if (bar == w->end) return blame(w, TOK_NO_BAR, p, w->end);
    if (!take_vw_head(w, p, bar)) return 0;
    for (p = bar; p < w->end;) {
        p++;
        if (!take_vw_namespace(w, &p)) return 0;
    }
    return 1;
}

/* ---- lines ---- */

static int take_example(work *w, const uint8_t *p) {
    if (w->end - p > w->rules->max_line_bytes) return blame(w, TOK_TOO_LONG, p, w->end);
    if (skip_blanks(p, w->end) == w->end) return blame(w, TOK_EMPTY, p, w->end);
    return w->rules->format == TOK_VW ? take_vw_line(w, p) : take_indexed_line(w, p);
}

static void keep_example(work *w) {
    tok_examples *out = w->out;
    if (w->rules->labelled) out->labels[out->rows] = (float)w->label;
    if (out->weights != NULL) out->weights[out->rows] = (float)w->importance;
    out->offsets[++out->rows] = w->at;
}

/* In libsvm and libffm a # begins a comment. A line that contains only a comment is neither an example nor a fault. */
static int is_comment(work *w, const uint8_t *p) {
    if (w->rules->format == TOK_VW) return 0;
    const uint8_t *mark = find(p, w->end, '#');
    int found = mark < w->end;
    w->end = mark;
    return found && skip_blanks(p, mark) == mark;
}

void tok_examples_parse(const uint8_t *text, int64_t size, const tok_rules *rules, tok_fields *fields,
                        tok_examples *examples) {
    const uint8_t *limit = text + size;
    examples->stopped.code = TOK_OK;
    fields->num_new = 0;
    while (examples->begin < size) {
        const uint8_t *p = text + examples->begin, *feed = memchr(p, '\n', (size_t)(limit - p));
        work w = {.rules = rules, .fields = fields, .out = examples, .text = text, .end = feed, .importance = 1.0};
        w.at = examples->offsets[examples->rows];
        if (!is_comment(&w, p)) {
            int is_taken = take_example(&w, p);
            if (!is_taken && w.fault.code == TOK_NEW_FIELD) examples->stopped = w.fault;
            if (fields->num_new > 0 || examples->stopped.code != TOK_OK) return;
            if (is_taken) keep_example(&w);
            else examples->faults[examples->num_faults++] = w.fault;
        }
        examples->begin = feed + 1 - text;
        examples->line++;
    }
}
