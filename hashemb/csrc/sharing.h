/* Sharing of a table between threads and processes: the control page, byte-range locks, the mutex of an open table, and
 * saving for a snapshot.
 *
 * The extension _sharing has this code. The core receives a pointer to he_process_sharing when it is loaded and stores
 * it in he_shared; the functions in he_sharing are all that it calls. */
#ifndef HASHEMB_SHARING_H
#define HASHEMB_SHARING_H

#include <pthread.h>
#include <stdint.h>

/* The mutable page that all processes share: the first fields of the file `control`, little-endian. */
typedef struct {
    char magic[8];
    uint32_t format, reserved;
    uint64_t step, epoch;
    double lr, decay_total;
    uint64_t clean, rows_touched;
    uint64_t saving;                  /* the epoch that a snapshot in progress saves */
    uint64_t save_failed, save_errno; /* the epoch of the one that failed, and why */
    uint64_t gate_closing;
} he_control;

static inline uint64_t he_epoch(const he_control *c) { return __atomic_load_n(&c->epoch, __ATOMIC_ACQUIRE); }

/* The batches of one open table, which are applied one after another. */
typedef struct {
    pthread_mutex_t mutex;
    int32_t closed, dirty; /* dirty: the table has been written to since this was last 0 */
} he_batches;

/* Results of he_commit, he_batches_enter and he_gate_enter other than 0 and errnos. */
enum {
    HE_AGAIN = -1,        /* a signal may have arrived: handle it, and commit again */
    HE_CLOSED = -2,       /* the table has been closed */
    HE_GATE_CLOSED = -3,  /* call he_gate_look, and commit again */
    HE_NEEDS_JOIN = -4,   /* the process has not joined the writers since it was forked */
    HE_NEEDS_ROOM = -5,   /* p->fresh needs space that faults could not reserve: allocate it, or raise */
    HE_NEEDS_SAVING = -6, /* a snapshot in progress needs rows saved: pass the target */
    HE_ROWS_REFUSED = -7, /* applied, except to rows whose gradients became NaN or infinite after they were checked */
};

/* The request of a snapshot in progress: save blocks of these files written after epoch `since`, up to `until`. See
 * save.c. */
enum { HE_MAX_FILES = 4, HE_STRIPE_BLOCKS = 1024, HE_ROWS_PER_LOG = 256, HE_BLOCKS_PER_COPY = 64 };
typedef struct {
    int32_t num_files, lock_fd, target_blocks_fd, target_fds[HE_MAX_FILES], bits_fd, log_fd, block_shift;
    const char *data[HE_MAX_FILES]; /* the table's arrays, and the bytes of a row in each */
    int64_t row_bytes[HE_MAX_FILES];
    int64_t data_offset; /* offset of the arrays in the target's files */
    const uint32_t *blocks;
    int64_t num_blocks, num_rows;
    he_control *control; /* the table's control page, which records a failure */
    uint32_t since, until;
    uint64_t *bits; /* per row, set if it is saved or need not be */
    char *buffer;   /* HE_ROWS_PER_LOG log entries: a row's number, and the row in each file */
} he_saving;

/* Places in the file `lock`. They are always taken in this order: snapshot, turnstile, gate, blocks (one range at a
 * time), entry, rows (ascending). A process that holds a later one never waits for an earlier one. */
#define HE_LOCK_WRITERS INT64_C(0) /* shared: the process has the table open for writing */
#define HE_LOCK_GATE INT64_C(1)    /* shared: the process has a batch in flight */
#define HE_LOCK_TURNSTILE INT64_C(2)
#define HE_LOCK_SNAPSHOT INT64_C(3) /* exclusive: the process takes a snapshot or delta, or applies a delta */
#define HE_LOCK_BLOCKS (INT64_C(1) << 32)
#define HE_LOCK_ROWS (INT64_C(1) << 62)
#define HE_LOCK_SEATS INT64_C(1024)      /* exclusive: the process uses a page of the file `inflight` */
#define HE_LOCK_ENTRY (HE_LOCK_ROWS - 1) /* exclusive: the process has the next exact batch to lock rows */

/* ---- what the core takes ---- */

typedef struct {
    int (*lock)(int fd, int kind, int64_t begin, int64_t length, int wait);
    int (*lock_spinning)(int fd, int kind, int64_t begin, int64_t length);
    void (*lock_retrying)(int fd, int kind, int64_t begin, int64_t length);
    int (*gate_enter)(const he_control *c, int fd, int waited);
    int (*gate_look)(int fd);
    void (*gate_leave)(int fd);
    int (*batches_enter)(he_batches *b); /* 0 or HE_AGAIN */
    void (*batches_leave)(he_batches *b);
    void (*batches_set_dirty)(he_batches *b, int value);
    void (*mark_blocks)(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch);
    int (*save_rows)(const he_saving *s, const uint64_t *rows, int64_t n, uint64_t *scratch);
} he_sharing;

extern const he_sharing *he_shared;

/* ---- in _sharing: each function is described where it is defined ---- */

extern const he_sharing he_process_sharing;

/* locks.c */
int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait);
int he_lock_spinning(int fd, int kind, int64_t begin, int64_t length);
void he_lock_retrying(int fd, int kind, int64_t begin, int64_t length);
int he_gate_enter(const he_control *c, int fd, int waited);
int he_gate_look(int fd);
void he_gate_leave(int fd);
int he_gate_close(he_control *c, int fd);
void he_gate_open(he_control *c, int fd);
int he_begin_point(he_control *c, int fd, char *page, int64_t page_bytes);

/* sharing.c */
void he_batches_init(he_batches *b);
void he_batches_after_fork(he_batches *b);
int he_batches_enter(he_batches *b);
void he_batches_leave(he_batches *b);
int he_batches_dirty(const he_batches *b);
void he_batches_set_dirty(he_batches *b, int value);

/* save.c; each returns 0 or an errno. he_read_units reads units of `size` bytes, ascending, of the array at `offset` in
 * a file to `out`, one after the other. If the array ends within the last unit, the rest of `out` is unchanged; if the
 * file ends before, the result is EIO. */
void he_mark_blocks(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch);
int he_save_rows(const he_saving *s, const uint64_t *rows, int64_t n, uint64_t *scratch);
int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end);
int he_read_units(int fd, const int64_t *units, int64_t n, int64_t size, int64_t offset, int64_t file_bytes, char *out);

#endif
