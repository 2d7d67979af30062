/* The two phases of an update: planning (which rows, in which order, by which thread) and applying.
 *
 * A plan is made in three passes over the batch, each divided among the threads:
 *   count    hashes keys to rows, counts them by bucket (a range of rows), and checks that gradients are finite;
 *   scatter  puts occurrences into the order of buckets, keeping batch order within each;
 *   merge    finds the distinct rows of each bucket, and sums the gradients of those that occur more than once.
 * Rows are then in roughly ascending order, which saves as many page walks and DRAM page openings as a full sort would,
 * while the gradients of a bucket are read forwards. A bucket's hash set stays in the L1 cache.
 *
 * Each bucket belongs to one thread, so each row has one owner, and its occurrences are summed in batch order: the
 * result does not depend on the number of threads or buckets. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>

#include "numerics.h"
#include "table.h"

enum { KEYS_PER_THREAD = 2048, KEYS_PER_BUCKET_BITS = 8, MAX_BUCKET_BITS = 16, USUAL_BUCKET_BITS = 11 };
enum { ROWS_PER_LOCK = 2048, FIRST_LOOK_ROWS = 256 };

/* Returns the number of bits that hold every number below n. */
static int bits_for(uint64_t n) { return n <= 1 ? 0 : 64 - __builtin_clzll(n - 1); }

static int64_t align_line(int64_t bytes) { return (bytes + HE_LINE_BYTES - 1) / HE_LINE_BYTES * HE_LINE_BYTES; }

static int64_t split(int64_t n, int i, int num_parts) { return (int64_t)((__int128)n * i / num_parts); }

/* ---- layout of a plan's memory ---- */

/* Returns 0, or -1 if a row within its bucket and an occurrence together don't fit an entry of 64 bits. */
int he_plan_init(const he_table *t, he_plan *p) {
    int64_t n = p->batch.num_keys * t->num_hashes;
    int row_bits = bits_for(t->num_rows), bits;
    p->num_occurrences = n;
    p->occurrence_bits = bits_for((uint64_t)n);
    bits = HE_MIN(HE_MAX(p->occurrence_bits - KEYS_PER_BUCKET_BITS, 0), USUAL_BUCKET_BITS);
    bits = HE_MIN(HE_MAX(bits, row_bits + p->occurrence_bits - 64), row_bits);
    p->bucket_shift = row_bits - bits;
    p->num_buckets = t->num_rows ? (int64_t)((t->num_rows - 1) >> p->bucket_shift) + 1 : 0;
    p->num_threads = he_threads_for(n, KEYS_PER_THREAD);
    return n > UINT32_MAX || bits > MAX_BUCKET_BITS ? -1 : 0;
}

/* Takes `bytes` from the memory at *at. */
static void *take(char **at, int64_t bytes) {
    char *here = *at;
    *at += align_line(bytes);
    return here;
}

/* Lays the plan's arrays out from `at`; returns their end. Slots and sums are sized for the worst case, and a batch of
 * distinct rows hardly touches them. */
static char *lay_out(const he_table *t, he_plan *p, char *at) {
    const he_batch *b = &p->batch;
    const int64_t n = p->num_occurrences, row = t->dim * (int64_t)sizeof(float);
    p->offsets = b->offsets ? take(&at, (b->num_bags + 1) * 8) : NULL;
    p->bag_of = b->offsets ? take(&at, b->num_keys * 8) : NULL;
    p->scales = b->offsets && (b->weights || b->pooling != HE_SUM) ? take(&at, b->num_keys * 4) : NULL;
    p->rows = take(&at, n * 8);
    p->entries = take(&at, n * 8);
    p->spare = take(&at, n * 8);
    p->slots = take(&at, n * HE_SLOTS_PER_ENTRY * 4);
    p->bucket_begin = take(&at, (p->num_buckets + 1) * 8);
    p->counts = take(&at, p->num_threads * p->num_buckets * 8);
    for (int i = 0; i < p->num_threads; i++)
        p->shares[i].scratch = (float *)((char *)take(&at, HE_LINE_BYTES + 2 * row) + HE_LINE_BYTES);
    p->sums = take(&at, he_sums_before(n, t->dim) * (int64_t)sizeof(float));
    return at;
}

int64_t he_plan_bytes(const he_table *t, const he_plan *p) {
    he_plan measured = *p;
    char *start = (char *)(uintptr_t)HE_LINE_BYTES;
    return lay_out(t, &measured, start) - start + HE_LINE_BYTES;
}

/* Divides scratch memory of he_plan_bytes bytes and, for bags, copies and checks offsets and fills in each key's bag
 * and scale. */
int64_t he_plan_layout(const he_table *t, he_plan *p, char *memory) {
    lay_out(t, p, (char *)(((uintptr_t)memory + HE_LINE_BYTES - 1) & ~(uintptr_t)(HE_LINE_BYTES - 1)));
    if (!p->offsets) return -1;
    const int64_t bad = he_offsets_copy(p->batch.offsets, p->batch.num_bags, p->batch.num_keys, p->offsets);
    p->batch.offsets = p->offsets;
    if (bad < 0) he_bag_scales(&p->batch, p->bag_of, p->scales);
    return bad;
}

/* ---- planning ---- */

typedef struct {
    const he_table *t;
    he_plan *p;
    uint32_t epoch;
    const he_step *step;
    int lock_fd, watch;
} job;

static void count_share(void *arg, int i) {
    const job *j = arg;
    const he_table *t = j->t;
    he_plan *p = j->p;
    const int64_t k = t->num_hashes, values = p->batch.num_bags * t->dim;
    const int64_t begin = split(p->batch.num_keys, i, p->num_threads),
                  end = split(p->batch.num_keys, i + 1, p->num_threads);
    const int shift = p->bucket_shift;
    int64_t *counts = p->counts + i * p->num_buckets;
    p->shares[i].bad_value = he_kernels_active()->first_not_finite(p->grads, split(values, i, p->num_threads),
                                                                   split(values, i + 1, p->num_threads));
    memset(counts, 0, (size_t)p->num_buckets * sizeof(*counts));
    for (int64_t key = begin; key < end; key++)
        for (int64_t h = 0; h < k; h++) {
            uint64_t row = he_row(p->batch.keys[key], t->salts[h], t->num_rows);
            p->rows[key * k + h] = row;
            counts[row >> shift]++;
        }
}

/* Turns counts into the start of each thread's entries in each bucket. */
static void place_buckets(he_plan *p) {
    int64_t begin = 0;
    for (int64_t b = 0; b < p->num_buckets; b++) {
        p->bucket_begin[b] = begin;
        for (int i = 0; i < p->num_threads; i++) {
            int64_t *counts = p->counts + i * p->num_buckets, count = counts[b];
            counts[b] = begin;
            begin += count;
        }
    }
    p->bucket_begin[p->num_buckets] = begin;
}

static void scatter_share(void *arg, int i) {
    const job *j = arg;
    he_plan *p = j->p;
    const int64_t k = j->t->num_hashes, keys = p->batch.num_keys;
    const int64_t begin = split(keys, i, p->num_threads) * k, end = split(keys, i + 1, p->num_threads) * k;
    const int shift = p->bucket_shift, bits = p->occurrence_bits;
    const uint64_t mask = (UINT64_C(1) << shift) - 1;
    int64_t *next = p->counts + i * p->num_buckets;
    for (int64_t o = begin; o < end; o++) {
        uint64_t row = p->rows[o];
        p->entries[next[row >> shift]++] = (row & mask) << bits | (uint64_t)o;
    }
}

static void merge_share(void *arg, int i) {
    const job *j = arg;
    he_kernels_active()->merge(j->t, j->p, i, j->epoch);
}

int64_t he_update_plan(const he_table *t, he_plan *p, uint32_t epoch) {
    job j = {t, p, epoch, NULL, -1, 0};
    p->epoch = epoch;
    he_parallel(count_share, &j, p->num_threads);
    for (int i = 0; i < p->num_threads; i++)
        if (p->shares[i].bad_value >= 0) return p->shares[i].bad_value;
    place_buckets(p);
    he_parallel(scatter_share, &j, p->num_threads);
    he_parallel(merge_share, &j, p->num_threads);
    return -1;
}

/* Returns the largest magnitude of n finite values, whose bits have the same order; compilers vectorise only that. */
static float largest(const float *values, int64_t n) {
    uint32_t most = 0;
    HE_PRAGMA(omp simd reduction(max : most))
    for (int64_t i = 0; i < n; i++) most = HE_MAX(most, he_bits(values[i]) & UINT32_C(0x7FFFFFFF));
    return he_float(most);
}

/* Returns the first key whose finite gradient times its finite scale is not finite, or -1. */
int64_t he_first_overflow(const he_table *t, const he_plan *p) {
    const float scale = p->scales ? largest(p->scales, p->batch.num_keys) : 0.0f;
    if (scale <= 1.0f || __builtin_isfinite(scale * largest(p->grads, p->batch.num_bags * t->dim))) return -1;
    for (int64_t key = 0; key < p->batch.num_keys; key++)
        for (int64_t j = 0; j < t->dim; j++)
            if (!__builtin_isfinite(p->grads[p->bag_of[key] * t->dim + j] * p->scales[key])) return key;
    return -1;
}

/* ---- applying ---- */

/* Applies rows [from, end) of a share; returns how many were new. */
static uint64_t apply_rows(const job *j, he_share *whole, int64_t from, int64_t end) {
    he_share part = *whole;
    part.rows = whole->rows + from;
    part.sources = whole->sources + from;
    part.num_rows = end - from;
    he_kernels_active()->apply(j->t, j->p, &part, j->step);
    whole->rows_refused += part.rows_refused;
    return part.rows_touched;
}

/* Does the same after asking for the pages of rows [*asked, ahead), if rows are being read from disk. */
static uint64_t apply_reading_ahead(const job *j, he_share *whole, int64_t from, int64_t end, int64_t ahead,
                                    int64_t *asked) {
    int64_t mark;
    const int asking = he_ahead_begin(j->t, &mark);
    if (asking) {
        he_ahead_planned(j->t, whole->rows + HE_MAX(*asked, from), ahead - HE_MAX(*asked, from));
        *asked = ahead;
    }
    const uint64_t touched = apply_rows(j, whole, from, end);
    if (!asking) he_ahead_end(j->t, mark, end - from);
    return touched;
}

static void apply_share(void *arg, int i) {
    const job *j = arg;
    he_share *share = &j->p->shares[i];
    const int64_t n = share->num_rows, chunk = j->watch ? he_ahead_rows(j->t) : n;
    int64_t asked = 0, end;
    uint64_t touched = 0;
    if (!j->watch) touched = apply_rows(j, share, 0, n);
    else
        for (int64_t from = 0; from < n; from = end) {
            end = HE_MIN(from + (from ? chunk : FIRST_LOOK_ROWS), n);
            touched += apply_reading_ahead(j, share, from, end, HE_MIN(end + chunk, n), &asked);
        }
    share->rows_touched = touched;
}

/* Sets where each thread notes the row that it writes: in the table's file, so that a killed process leaves a note, or
 * in the plan. */
static void begin_shares(const he_table *t, he_plan *p) {
    const int64_t words = HE_LINE_BYTES / 8;
    for (int i = 0; i < p->num_threads; i++) {
        he_share *s = &p->shares[i];
        s->rows_refused = 0;
        s->in_flight = t->in_flight ? t->in_flight + i * words : (uint64_t *)s->scratch - words;
    }
}

static int end_shares(he_control *c, const he_plan *p) {
    uint64_t touched = 0, refused = 0;
    for (int i = 0; i < p->num_threads; i++) {
        touched += p->shares[i].rows_touched;
        refused += p->shares[i].rows_refused;
    }
    if (touched) he_rows_touched_add(c, touched);
    return refused ? HE_ROWS_REFUSED : 0;
}

int he_update_apply(const he_table *t, he_control *c, he_plan *p, const he_step *s) {
    job j = {t, p, p->epoch, s, -1, he_ahead_watch(t->ahead)};
    begin_shares(t, p);
    he_parallel(apply_share, &j, p->num_threads);
    he_ahead_done(t->ahead, j.watch);
    return end_shares(c, p);
}

/* ---- applying exactly: no update of another process is lost, and all are in the order of their steps ----
 *
 * A batch moves through the table upwards, each thread through its part, holding locks on the rows from its position.
 * Its step begins when it has locked all rows below the last thread's part, and the beginning of that part; the last
 * thread takes the next span before it releases one. No batch can therefore overtake another, however many threads each
 * has, and the result is that of applying the batches one after the other. With one thread, a batch needs only the
 * first span to start: the batches of several processes follow each other through the table. */

/* Returns the first row of a share's part of the table. Part 0 begins at row 0, and the last part has no end. */
static int64_t share_begin(const he_plan *p, int i) {
    return i ? (int64_t)((uint64_t)(p->num_buckets * i / p->num_threads) << p->bucket_shift) : 0;
}

static int64_t share_end(const he_plan *p, int i) {
    return i + 1 < p->num_threads ? share_begin(p, i + 1) : HE_LOCK_ROWS - 1;
}

/* Returns the end of the group of rows that begins at `from`: after about ROWS_PER_LOCK rows, between two buckets. */
static int64_t group_end(const he_plan *p, const he_share *s, int64_t from) {
    int64_t end = from + ROWS_PER_LOCK;
    if (end >= s->num_rows) return s->num_rows;
    while (end < s->num_rows && s->rows[end] >> p->bucket_shift == s->rows[end - 1] >> p->bucket_shift) end++;
    return end;
}

/* Returns the first row above the span of a group that ends at its share's row number `end`. */
static int64_t span_end(const he_plan *p, int share, int64_t end) {
    const he_share *s = &p->shares[share];
    if (end == s->num_rows) return share_end(p, share);
    return (int64_t)(((s->rows[end - 1] >> p->bucket_shift) + 1) << p->bucket_shift);
}

/* One batch at a time waits here, as a range that many batches pass through might never be free as a whole. */
int he_update_lock_rows(const he_plan *p, int lock_fd) {
    const int last = p->num_threads - 1;
    const int64_t end = span_end(p, last, group_end(p, &p->shares[last], 0));
    int error = he_shared->lock_spinning(lock_fd, F_WRLCK, HE_LOCK_ENTRY, 1);
    if (error) return error;
    error = he_shared->lock_spinning(lock_fd, F_WRLCK, HE_LOCK_ROWS, end);
    he_shared->lock(lock_fd, F_UNLCK, HE_LOCK_ENTRY, 1, 0);
    return error;
}

static void apply_exact_share(void *arg, int i) {
    const job *j = arg;
    he_share *whole = &j->p->shares[i];
    const int is_last = i + 1 == j->p->num_threads;
    int64_t from = 0, asked = 0, at = share_begin(j->p, i);
    uint64_t touched = 0;
    for (;;) {
        const int64_t end = group_end(j->p, whole, from), above = span_end(j->p, i, end);
        touched += j->watch ? apply_reading_ahead(j, whole, from, end, group_end(j->p, whole, end), &asked)
                            : apply_rows(j, whole, from, end);
        if (is_last && end < whole->num_rows) {
            const int64_t next = span_end(j->p, i, group_end(j->p, whole, end));
            he_shared->lock_retrying(j->lock_fd, F_WRLCK, HE_LOCK_ROWS + above, next - above);
        }
        if (at < above) he_shared->lock_retrying(j->lock_fd, F_UNLCK, HE_LOCK_ROWS + at, above - at);
        if (end == whole->num_rows) break;
        from = end;
        at = above;
    }
    whole->rows_touched = touched;
}

int he_update_apply_exact(const he_table *t, he_control *c, he_plan *p, const he_step *s, int lock_fd) {
    job j = {t, p, p->epoch, s, lock_fd, he_ahead_watch(t->ahead)};
    begin_shares(t, p);
    he_parallel(apply_exact_share, &j, p->num_threads);
    he_ahead_done(t->ahead, j.watch);
    return end_shares(c, p);
}
