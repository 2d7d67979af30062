/* The C API of the core: the kernels' view of a table, and the functions that the extension calls.
 *
 * Invariants: kernels never allocate, print, raise or touch Python; rows, counts and bytes are 64 bits; all
 * checks are done before he_update_apply and he_update_apply_exact, the only functions that write rows. */
#ifndef HASHEMB_TABLE_H
#define HASHEMB_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "runtime.h"
#include "sharing.h"

enum { HE_MAX_HASHES = 16 };
enum { HE_FLOAT32 = 0, HE_FLOAT16 = 1, HE_BFLOAT16 = 2 };
enum { HE_SGD = 0, HE_ADAGRAD = 1, HE_ROWWISE_ADAGRAD = 2, HE_FTRL = 3 };
enum { HE_ZEROS = 0, HE_UNIFORM = 1, HE_NORMAL = 2 };
enum { HE_SLOTS_PER_ENTRY = 8 }; /* in the hash sets that find a batch's distinct rows */
enum { HE_SUM = 0, HE_MEAN = 1, HE_SQRTN = 2 };

/* Hints about the disk for an open table, which threads update without a lock (ahead.c). */
typedef struct {
    int32_t off;           /* never asks by itself */
    int32_t asking;        /* rows were recently read from disk */
    int32_t quiet;         /* chunks asked for since then that were all in memory */
    int32_t wait, backoff; /* calls until the next check, and their number the last time */
} he_ahead;

typedef struct {
    char *weight;     /* num_rows rows of row_bytes bytes */
    float *state[2];  /* accumulator | z, n; NULL where the optimiser has none */
    double *paid;     /* the decay total that each row has paid; NULL without weight decay */
    uint32_t *blocks; /* the epoch in which each block was last written */
    uint64_t num_rows;
    int64_t dim, row_bytes;
    int32_t dtype, optimizer, init, num_hashes, block_shift;
    float init_scale; /* already divided by sqrt(num_hashes) */
    double init_std;  /* the same, in the precision that HE_NORMAL needs */
    uint64_t init_key, rounding_key;
    uint64_t salts[HE_MAX_HASHES];
    float eps, initial_accumulator, beta, l1, l2;
    double weight_decay;
    he_ahead *ahead;
    int32_t tmpfs_fd;    /* a file of the table if it is on tmpfs, else -1 */
    uint64_t *in_flight; /* a cache line per thread of this process, in a file that others read if it is killed */
} he_table;

/* The keys of one call. Without bags, offsets is NULL and num_bags is num_keys. */
typedef struct {
    const uint64_t *keys;
    const int64_t *offsets;
    const float *weights; /* per key, or NULL */
    int64_t num_keys, num_bags;
    int32_t pooling;
} he_batch;

/* The parameters of one update, copied from the control page when its step began. */
typedef struct {
    uint64_t step;
    float lr;
    double decay_total;
} he_step;

/* One thread's share of a planned update: distinct rows, roughly ascending, and the source of each one's gradient,
 * which is the number of its only occurrence or HE_SUMMED | the index of its sum. */
#define HE_SUMMED (UINT64_C(1) << 63)
typedef struct {
    uint64_t *rows, *sources;
    int64_t num_rows;
    float *sums;     /* dim floats each */
    uint64_t *stale; /* blocks not yet marked with this epoch, in any order, possibly repeated */
    int64_t num_stale;
    float *scratch;        /* 2 * dim floats */
    int64_t bad_value;     /* the first value in its part of the gradients that is not finite, or -1 */
    int64_t bad_row;       /* the first of its rows with a sum of gradients that is not finite, or -1 */
    uint64_t rows_touched; /* rows updated for the first time, once applied */
    uint64_t rows_refused; /* rows left unchanged, because their gradient was changed after it was checked */
    uint64_t *in_flight;   /* receives the row being written, plus 1 */
} he_share;

/* Returns the floats for the sums of a plan's first n entries: a row that is summed has two or more entries, and rows
 * of one float are all summed. */
static inline int64_t he_sums_before(int64_t n, int64_t dim) { return dim == 1 ? n : n / 2 * dim; }

/* See update.c. An occurrence is one of a key's rows, with the number key * num_hashes + h. Of the caller's arrays,
 * only gradients are read again after they were checked, and they are checked again. */
typedef struct {
    he_batch batch;     /* its offsets are a copy */
    const float *grads; /* (num_bags, dim) */
    int64_t *offsets;   /* the copy, or NULL without bags */
    int64_t *bag_of;    /* per key, or NULL without bags */
    float *scales;      /* per key, or NULL if all are 1 */
    int64_t num_occurrences, num_buckets;
    int32_t num_threads, occurrence_bits, bucket_shift;
    uint64_t *rows;    /* the row of each occurrence; once merged, the shares' distinct rows */
    uint64_t *entries; /* by bucket: row within the bucket << occurrence_bits | occurrence; once merged, the sources */
    uint64_t *spare;
    uint32_t *slots;
    int64_t *bucket_begin, *counts;
    float *sums;
    uint32_t epoch;          /* the stale blocks are older than this epoch; 0 if they are no longer known */
    uint64_t *stale, *fresh; /* blocks, ascending: older than the epoch; of these, those never written */
    int64_t num_stale, num_fresh;
    uint64_t step; /* the step number of this update, once applied */
    he_share shares[HE_MAX_THREADS];
} he_plan;

/* One instruction set's kernels. */
typedef struct {
    void (*lookup)(const he_table *, const uint64_t *keys, int64_t begin, int64_t end, double decay_total,
                   float *scratch, float *out);
    void (*lookup_pooled)(const he_table *, const he_batch *, int64_t bag_begin, int64_t bag_end, double decay_total,
                          float *scratch, float *out);
    int64_t (*first_not_finite)(const float *values, int64_t begin, int64_t end);
    void (*rows)(const he_table *, const uint64_t *keys, int64_t begin, int64_t end, int64_t *out);
    void (*merge)(const he_table *, he_plan *, int share, uint32_t epoch);
    void (*apply)(const he_table *, const he_plan *, he_share *, const he_step *);
} he_kernels;

/* One file each; each file includes the same static functions (kernels.h). */
extern const he_kernels he_kernels_baseline, he_kernels_avx2, he_kernels_avx512;

const he_kernels *he_kernels_active(void); /* kernels.c: those of the chosen instruction set */

/* lookup.c */
int he_lookup_threads(const he_table *t, const he_batch *b);
int64_t he_lookup_scratch(const he_table *t); /* floats per thread */
void he_lookup(const he_table *t, const he_batch *b, double decay_total, int num_threads, float *scratch, float *out);
void he_rows(const he_table *t, const uint64_t *keys, int64_t n, int64_t *out);
int64_t he_first_not_finite(const float *values, int64_t n); /* index, or -1 */

/* Fills in the bag of each key in a batch of bags and, unless scales is NULL, the factor of its gradient. */
void he_bag_scales(const he_batch *b, int64_t *bag_of, float *scales);

/* Copies offsets and checks the copy. Returns -1, or the wrong one: 0 if the first is not 0; i if offsets[i] is below
 * the one before it; num_bags + 1 if the last is not the number of keys. */
int64_t he_offsets_copy(const int64_t *offsets, int64_t num_bags, int64_t num_keys, int64_t *out);

/* update.c. The calls are, in this order: he_plan_init; he_plan_layout on he_plan_bytes bytes, which copies the offsets
 * and returns the first wrong one, or -1; he_update_plan, which returns the first gradient value that is not finite, or
 * -1 (p->shares[i].bad_row is a row whose sum is not); he_commit. */
int he_plan_init(const he_table *t, he_plan *p); /* 0, or -1 if there are too many occurrences for one update */
int64_t he_plan_bytes(const he_table *t, const he_plan *p);
int64_t he_plan_layout(const he_table *t, he_plan *p, char *memory);
int64_t he_update_plan(const he_table *t, he_plan *p, uint32_t epoch);
int64_t he_first_overflow(const he_table *t, const he_plan *p);
int he_update_apply(const he_table *t, he_control *c, he_plan *p, const he_step *s);
int he_update_lock_rows(const he_plan *p, int lock_fd); /* 0, or an errno, with which nothing is locked */
int he_update_apply_exact(const he_table *t, he_control *c, he_plan *p, const he_step *s, int lock_fd);

/* ahead.c: pages are asked for before they are touched. A call asks he_ahead_watch whether to watch the disk at all; if
 * so it works in chunks: he_ahead_begin returns whether to ask for pages (by he_ahead_keys or he_ahead_planned, for the
 * next chunk); if not, he_ahead_end reports how many rows were processed since. he_ahead_done ends the call. */
int he_ahead_watch(he_ahead *a);
void he_ahead_done(he_ahead *a, int watched);
int64_t he_ahead_rows(const he_table *t); /* the rows of a chunk */
int he_ahead_begin(const he_table *t, int64_t *mark);
void he_ahead_end(const he_table *t, int64_t mark, int64_t rows);
void he_ahead_keys(const he_table *t, const uint64_t *keys, int64_t n);
void he_ahead_planned(const he_table *t, const uint64_t *rows, int64_t n); /* with their state */

/* Returns 0 or ENOMEM, at once. */
int he_prefetch_keys(const he_table *t, const uint64_t *keys, int64_t n, int with_state);

/* pages.c: makes the pages of these blocks writable without a fault. Returns 0 or an errno (EFAULT if a store would
 * raise SIGBUS, EINVAL if the kernel is older than 5.14). */
int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes,
                       int64_t total_bytes);
int he_make_room(const he_table *t, const uint64_t *blocks, int64_t num_blocks); /* in all files; 0 or an errno */

/* Called before a batch reads a table on tmpfs: its rows (of_rows), or else its blocks' epochs. Reading a hole takes a
 * page there; if little space is left, the pages are populated one by one, which is slow. Returns 0 or an errno: EFAULT
 * if a read would raise SIGBUS. */
int he_secure_reads(const he_table *t, const he_batch *b, int of_rows);

/* commit.c */
typedef struct {
    int32_t lock_fd, exact, waited;
    int32_t has_room, asks_for_room; /* HE_NEEDS_ROOM has been handled; always asks, for tests */
    const he_saving *saving;         /* the target of a snapshot in progress, or NULL */
} he_commit_options;
int he_commit(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o);

/* control.c: atomic access to the shared page. */
void he_step_begin(he_control *c, double weight_decay, he_step *out);
double he_decay_total(const he_control *c);
void he_rows_touched_add(he_control *c, uint64_t n);

#endif
