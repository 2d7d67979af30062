/* What the kernels know of a table, and the functions that the extension calls. This is the C API of the core.
 *
 * Invariants: kernels never allocate, print, raise or touch Python; rows, counts and bytes are 64 bits; all
 * checks are done before he_update_apply, which is the only function that writes to a table. */
#ifndef HASHEMB_TABLE_H
#define HASHEMB_TABLE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

enum { HE_MAX_HASHES = 16 };
enum { HE_FLOAT32 = 0, HE_FLOAT16 = 1, HE_BFLOAT16 = 2 };
enum { HE_SGD = 0, HE_ADAGRAD = 1, HE_ROWWISE_ADAGRAD = 2, HE_FTRL = 3 };
enum { HE_ZEROS = 0, HE_UNIFORM = 1, HE_NORMAL = 2 };
enum { HE_SLOTS_PER_ENTRY = 8 }; /* of the hash sets that find a batch's distinct rows */
enum { HE_SUM = 0, HE_MEAN = 1, HE_SQRTN = 2 };

/* What an open table knows of the disk: hints that threads update without a lock (ahead.c). */
typedef struct {
    int32_t off;     /* never asks by itself */
    int32_t asking;  /* rows were read from disk of late */
    int32_t quiet;   /* chunks asked for since that were all in memory */
    int32_t wait, backoff; /* calls until the next look, and how many they were the last time */
} he_ahead;

typedef struct {
    char *weight;        /* num_rows rows of row_bytes bytes */
    float *state[2];     /* accumulator | z, n; NULL where the optimiser has none */
    double *paid;        /* per row: the decay total that the row has paid; NULL without weight decay */
    uint32_t *blocks;    /* per block: the epoch that last wrote it */
    uint64_t num_rows;
    int64_t dim, row_bytes;
    int32_t dtype, optimizer, init, num_hashes, block_shift;
    float init_scale;    /* already divided by sqrt(num_hashes) */
    double init_std;     /* the same, in the precision that HE_NORMAL needs */
    uint64_t init_key, rounding_key;
    uint64_t salts[HE_MAX_HASHES];
    float eps, initial_accumulator, beta, l1, l2;
    double weight_decay;
    he_ahead *ahead;
    int32_t tmpfs_fd;    /* a file of the table where it lies on tmpfs, else -1 */
    uint64_t *in_flight; /* a cache line for each thread of this process, in a file that others read should it be killed */
} he_table;

/* One call's keys. offsets == NULL: no bags; num_bags is then num_keys. */
typedef struct {
    const uint64_t *keys;
    const int64_t *offsets;
    const float *weights; /* per key, or NULL */
    int64_t num_keys, num_bags;
    int32_t pooling;
} he_batch;

/* The mutable page that all processes share; the first fields of the file `control`, little-endian. */
typedef struct {
    char magic[8];
    uint32_t format, reserved;
    uint64_t step, epoch;
    double lr, decay_total;
    uint64_t clean, rows_touched;
    uint64_t saving, save_failed, save_errno; /* the epoch that a snapshot in progress saves; the one that failed, and why */
    uint64_t gate_closing;
} he_control;

/* What one update is: a snapshot of the control page taken when its step began. */
typedef struct {
    uint64_t step;
    float lr;
    double decay_total;
} he_step;

/* One thread's share of a planned update: distinct rows, roughly ascending, and where the gradient of each is:
 * the number of its only occurrence, or HE_SUMMED | the index of its sum. */
#define HE_SUMMED (UINT64_C(1) << 63)
typedef struct {
    uint64_t *rows, *sources;
    int64_t num_rows;
    float *sums;           /* dim floats each */
    uint64_t *stale;       /* blocks not yet of this epoch, in any order, perhaps more than once */
    int64_t num_stale;
    float *scratch;        /* 2 * dim floats */
    int64_t bad_value;     /* the first value of its part of the gradients that is not finite, or -1 */
    int64_t bad_row;       /* the first of its rows whose gradients' sum is not finite, or -1 */
    uint64_t rows_touched; /* first updates of a row, once applied */
    uint64_t rows_refused; /* left as they were, because somebody has changed their gradient since it was checked */
    uint64_t *in_flight;   /* where the row being written is noted, plus 1 */
} he_share;

/* Floats for the sums of a plan's first n entries: a row that is summed has two or more; rows of one float all are. */
static inline int64_t he_sums_before(int64_t n, int64_t dim) { return dim == 1 ? n : n / 2 * dim; }

/* See update.c. An occurrence is one of a key's rows: number key * num_hashes + h. Of the caller's arrays only gradients are
 * read again after they were checked, and then checked again. */
typedef struct {
    he_batch batch;     /* its offsets are a copy */
    const float *grads; /* (num_bags, dim) */
    int64_t *offsets;   /* the copy, or NULL without bags */
    int64_t *bag_of;    /* per key, or NULL without bags */
    float *scales;      /* per key, or NULL where all are 1 */
    int64_t num_occurrences, num_buckets;
    int32_t num_threads, occurrence_bits, bucket_shift;
    uint64_t *rows;     /* per occurrence its row; once merged, the shares' distinct rows */
    uint64_t *entries;  /* by bucket: row within the bucket << occurrence_bits | occurrence; merged, the sources */
    uint64_t *spare;
    uint32_t *slots;
    int64_t *bucket_begin, *counts;
    float *sums;
    uint32_t epoch;     /* what its stale blocks are older than; 0: not known any more */
    uint64_t *stale, *fresh; /* blocks, ascending: older than the epoch; of these, those never written */
    int64_t num_stale, num_fresh;
    uint64_t step;      /* which one this was, once applied */
    he_share shares[HE_MAX_THREADS];
} he_plan;

/* One instruction set's kernels. */
typedef struct {
    const char *name;
    void (*lookup)(const he_table *, const uint64_t *keys, int64_t begin, int64_t end, double decay_total, float *scratch,
                   float *out);
    void (*lookup_pooled)(const he_table *, const he_batch *, int64_t bag_begin, int64_t bag_end, double decay_total,
                          float *scratch, float *out);
    int64_t (*first_not_finite)(const float *values, int64_t begin, int64_t end);
    void (*rows)(const he_table *, const uint64_t *keys, int64_t begin, int64_t end, int64_t *out);
    void (*merge)(const he_table *, he_plan *, int share, uint32_t epoch);
    void (*apply)(const he_table *, const he_plan *, he_share *, const he_step *);
} he_kernels;

/* kernels.c: the instruction set is chosen once, by CPU or by name. */
const he_kernels *he_kernels_active(void);
int he_isa_force(const char *name); /* 0, or -1: no such variant on this CPU */
const char *he_isa_available(int i); /* the i-th variant that this CPU runs, slowest first; NULL past the end */

/* lookup.c */
int he_lookup_threads(const he_table *t, const he_batch *b);
int64_t he_lookup_scratch(const he_table *t); /* floats per thread */
void he_lookup(const he_table *t, const he_batch *b, double decay_total, int num_threads, float *scratch, float *out);
void he_rows(const he_table *t, const uint64_t *keys, int64_t n, int64_t *out);
int64_t he_first_not_finite(const float *values, int64_t n); /* index, or -1 */

/* Per key of a batch of bags: its bag, and (where scales is not NULL) what its gradient is multiplied by. */
void he_bag_scales(const he_batch *b, int64_t *bag_of, float *scales);

/* What he_commit and he_gate_enter return beside 0 and errnos. */
enum {
    HE_AGAIN = -1,        /* a signal came, or may have come: look at it, and commit again */
    HE_CLOSED = -2,       /* the table has been closed */
    HE_GATE_CLOSED = -3,  /* he_gate_look, and commit again */
    HE_NEEDS_JOIN = -4,   /* the process has not joined the writers since it was forked */
    HE_NEEDS_ROOM = -5,   /* p->fresh needs space, which faults cannot give: allocate it, or raise */
    HE_NEEDS_SAVING = -6, /* a snapshot in progress wants rows saved: say where */
    HE_ROWS_REFUSED = -7, /* applied but for rows whose gradients have become NaN or infinite since they were checked */
};

/* Offsets copied, and the copies checked. -1, or which is wrong: 0 where the first is not 0; i where offsets[i] is below the
 * one before it; num_bags + 1 where the last is not the number of keys. */
int64_t he_offsets_copy(const int64_t *offsets, int64_t num_bags, int64_t num_keys, int64_t *out);

/* update.c. In this order: he_plan_init; he_plan_layout on he_plan_bytes bytes, which copies the offsets and returns the first
 * that is wrong, or -1; he_update_plan, which returns the first gradient value that is not finite, or -1 (p->shares[i].bad_row
 * has sums that are not); he_commit. */
int he_plan_init(const he_table *t, he_plan *p); /* 0, or -1: too many occurrences for one update */
int64_t he_plan_bytes(const he_table *t, const he_plan *p);
int64_t he_plan_layout(const he_table *t, he_plan *p, char *memory);
int64_t he_update_plan(const he_table *t, he_plan *p, uint32_t epoch);
int64_t he_first_overflow(const he_table *t, const he_plan *p);
int he_update_apply(const he_table *t, he_control *c, he_plan *p, const he_step *s);
int he_update_lock_rows(const he_plan *p, int lock_fd); /* 0 or an errno; then nothing is locked */
int he_update_apply_exact(const he_table *t, he_control *c, he_plan *p, const he_step *s, int lock_fd);

/* ahead.c: pages are asked for before they are touched. A call asks he_ahead_watch whether to look at the disk at all; if so
 * it works chunk by chunk: he_ahead_begin says whether to ask (he_ahead_keys or he_ahead_planned, for the chunk after);
 * if not, he_ahead_end reports how many rows it went through since. he_ahead_done ends the call. */
int he_ahead_watch(he_ahead *a);
void he_ahead_done(he_ahead *a, int watched);
int64_t he_ahead_rows(const he_table *t); /* of a chunk */
int he_ahead_begin(const he_table *t, int64_t *mark);
void he_ahead_end(const he_table *t, int64_t mark, int64_t rows);
void he_ahead_keys(const he_table *t, const uint64_t *keys, int64_t n);
void he_ahead_planned(const he_table *t, const uint64_t *rows, int64_t n); /* with their state */
int he_prefetch_keys(const he_table *t, const uint64_t *keys, int64_t n, int with_state); /* 0 or ENOMEM; returns at once */

/* pages.c: makes the pages of these blocks writable without a fault; 0 or an errno (EFAULT: a store would be a SIGBUS,
 * EINVAL: the kernel is older than 5.14). */
int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes, int64_t total_bytes);
int he_make_room(const he_table *t, const uint64_t *blocks, int64_t num_blocks); /* of all files; 0 or an errno */

/* Before a batch reads a table on tmpfs: its rows (of_rows), or else its blocks' epochs. A read of a hole takes a page
 * there; with little space left the pages are asked for one by one, which is slow. 0 or an errno: EFAULT where a read
 * would be a SIGBUS. */
int he_secure_reads(const he_table *t, const he_batch *b, int of_rows);

/* What a snapshot in progress wants: blocks written after epoch `since` and until `until`, of these files. See save.c. */
enum { HE_MAX_FILES = 4, HE_STRIPE_BLOCKS = 1024, HE_ROWS_PER_LOG = 256,
       HE_BLOCKS_PER_COPY = 64 };
typedef struct {
    int32_t num_files, lock_fd, target_blocks_fd, target_fds[HE_MAX_FILES], bits_fd, log_fd, block_shift;
    const char *data[HE_MAX_FILES]; /* the table's arrays, and the bytes of a row in each */
    int64_t row_bytes[HE_MAX_FILES];
    int64_t data_offset;            /* of the arrays in the target's files */
    const uint32_t *blocks;
    int64_t num_blocks, num_rows;
    he_control *control;            /* the table's, which is told of a failure */
    uint32_t since, until;
    uint64_t *bits;                 /* per row: it is saved, or need not be */
    char *buffer;                   /* HE_ROWS_PER_LOG entries of the log: a row's number, and the row of each file */
} he_saving;

/* save.c; 0 or an errno. */
void he_mark_blocks(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch);
int he_save_rows(const he_saving *s, const uint64_t *rows, int64_t n, uint64_t *scratch);
int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end);

/* save.c: reads units of `size` bytes, ascending, of the array that a file holds behind `offset`: to `out`, one after the
 * other. What the last lacks of the array's end is left as it is. 0 or an errno: EIO where the file ends before. */
int he_read_units(int fd, const int64_t *units, int64_t n, int64_t size, int64_t offset, int64_t file_bytes, char *out);

/* locks.c: places in the file `lock`. Always taken in this order: snapshot, turnstile, gate, blocks (one range at a time),
 * entry, rows (ascending). Nobody who holds a later one waits for an earlier one. */
#define HE_LOCK_WRITERS INT64_C(0)  /* shared: has the table open for writing */
#define HE_LOCK_GATE INT64_C(1)     /* shared: has a batch in flight */
#define HE_LOCK_TURNSTILE INT64_C(2)
#define HE_LOCK_SNAPSHOT INT64_C(3) /* exclusive: takes a snapshot or delta, or applies one */
#define HE_LOCK_BLOCKS (INT64_C(1) << 32)
#define HE_LOCK_ROWS (INT64_C(1) << 62)
#define HE_LOCK_SEATS INT64_C(1024) /* exclusive: a page of the file `inflight` */
#define HE_LOCK_ENTRY (HE_LOCK_ROWS - 1) /* exclusive: the next exact batch to lock rows */
int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait);
int he_lock_soon(int fd, int kind, int64_t begin, int64_t length);
void he_lock_surely(int fd, int kind, int64_t begin, int64_t length);
int he_gate_enter(const he_control *c, int fd, int waited);
int he_gate_look(int fd);
void he_gate_leave(int fd);
int he_gate_close(he_control *c, int fd);
void he_gate_open(he_control *c, int fd);
int he_begin_point(he_control *c, int fd, char *page, int64_t page_bytes);

/* commit.c: the batches of one open table, one after another. */
typedef struct {
    pthread_mutex_t mutex;
    int32_t closed, dirty; /* dirty: something has been written since it was last 0 */
} he_batches;
typedef struct {
    int32_t lock_fd, exact, waited;
    int32_t has_room, asks_for_room;          /* HE_NEEDS_ROOM has been seen to; always asks, as tests want */
    const he_saving *saving;                  /* where a snapshot in progress wants rows saved, or NULL */
} he_commit_options;
void he_batches_init(he_batches *b);
void he_batches_after_fork(he_batches *b);
int he_batches_enter(he_batches *b); /* 0 or HE_AGAIN */
void he_batches_leave(he_batches *b);
int he_batches_dirty(const he_batches *b);
void he_batches_set_dirty(he_batches *b, int value);
int he_commit(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o);

/* control.c: atomic access to the shared page. */
void he_step_begin(he_control *c, double weight_decay, he_step *out);
double he_decay_total(const he_control *c);
uint64_t he_epoch(const he_control *c);
void he_rows_touched_add(he_control *c, uint64_t n);

#endif
