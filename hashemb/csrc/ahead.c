/* Fault-ahead: where rows are not in memory, the kernel is asked for all pages of a chunk before any is touched.
 *
 * A thread waits while its page fault is served, so it keeps only one read in flight; disks need dozens. Pages are
 * requested by MADV_WILLNEED, in bulk by process_madvise, one chunk of rows ahead of the one being processed. All
 * requests are advice: if one fails, the page faults do the work; nothing is written, and no result depends on them.
 *
 * The decision to ask is measured, not guessed: the kernel counts what a thread has read from disks (ru_inblock). While
 * nothing is read, one call in 64 checks that count, and the others cost a branch. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "numerics.h"
#include "table.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

enum { MAX_RANGES = 1024 };     /* of one process_madvise: UIO_MAXIOV */
enum { FILTER_BITS = 12 };      /* 4096 of the pages just asked for are remembered */
enum { CHUNK_BYTES = 1 << 24 }; /* of pages asked for ahead, by each thread: far more than a disk's queue */
enum { MAX_WAIT = 63 };         /* calls between two checks while nothing is read */
enum { WORTH_ONE_IN = 64 };     /* rows read: if fewer, asking for pages that are in memory costs more than it saves */
enum { QUIET_CHUNKS = 8 };      /* chunks asked for in vain before asking ends */
enum { MAX_QUEUED = 64 };       /* waiting prefetch calls: with more, the disk lags so far that they are useless */

/* ---- asking ---- */

static void ask_one_by_one(const struct iovec *ranges, int64_t n) {
    for (int64_t i = 0; i < n; i++) madvise(ranges[i].iov_base, ranges[i].iov_len, MADV_WILLNEED);
}

/* process_madvise exists since Linux 5.10, and some sandboxes forbid it. */
static void ask(const struct iovec *ranges, int64_t n) {
    const int self = n > 1 ? (int)syscall(SYS_pidfd_open, getpid(), 0) : -1;
    for (int64_t i = 0; i < n; i += MAX_RANGES) {
        const int64_t count = HE_MIN(n - i, MAX_RANGES);
        if (self < 0 || syscall(SYS_process_madvise, self, ranges + i, (size_t)count, MADV_WILLNEED, 0) < 0)
            ask_one_by_one(ranges + i, count);
    }
    if (self >= 0) close(self);
}

/* Page ranges to pass to the kernel, or to collect in `kept`, which grows. The filter drops most repeats, which come
 * from the hot rows of a batch and from rows that share a page. */
typedef struct {
    uintptr_t page;
    int64_t count, kept_count, kept_room;
    int keep;
    struct iovec *kept;
    struct iovec ranges[MAX_RANGES];
    uintptr_t seen[1 << FILTER_BITS];
} asker;

static void asker_init(asker *a, int keep) {
    a->page = (uintptr_t)sysconf(_SC_PAGESIZE);
    a->count = a->kept_count = a->kept_room = 0;
    a->keep = keep;
    a->kept = NULL;
    memset(a->seen, 0, sizeof(a->seen));
}

/* If there is no memory for it, the rest is not asked for. */
static void keep(asker *a) {
    if (a->kept_count + a->count > a->kept_room) {
        const int64_t room = 2 * a->kept_room + MAX_RANGES;
        struct iovec *grown = realloc(a->kept, (size_t)room * sizeof(*grown));
        if (!grown) return;
        a->kept = grown;
        a->kept_room = room;
    }
    memcpy(a->kept + a->kept_count, a->ranges, (size_t)a->count * sizeof(*a->kept));
    a->kept_count += a->count;
}

static void flush(asker *a) {
    if (a->keep) keep(a);
    else ask(a->ranges, a->count);
    a->count = 0;
}

static void add(asker *a, const void *begin, int64_t bytes) {
    const uintptr_t low = (uintptr_t)begin & ~(a->page - 1);
    const uintptr_t high = ((uintptr_t)begin + (uintptr_t)bytes + a->page - 1) & ~(a->page - 1);
    uintptr_t *seen = &a->seen[(low / a->page * HE_GOLDEN) >> (64 - FILTER_BITS)];
    if (*seen == high) return; /* `high` identifies both pages of a row that crosses a page boundary */
    *seen = high;
    if (a->count == MAX_RANGES) flush(a);
    a->ranges[a->count++] = (struct iovec){(void *)low, high - low};
}

static void add_row(asker *a, const he_table *t, uint64_t row, const int with_state) {
    const int64_t state_bytes = t->optimizer == HE_ROWWISE_ADAGRAD ? 4 : t->dim * 4;
    add(a, t->weight + row * (uint64_t)t->row_bytes, t->row_bytes);
    if (t->paid) add(a, t->paid + row, 8);
    for (int i = 0; with_state && i < 2 && t->state[i]; i++)
        add(a, (const char *)t->state[i] + row * (uint64_t)state_bytes, state_bytes);
}

static void add_keys(asker *a, const he_table *t, const uint64_t *keys, int64_t n, const int with_state) {
    for (int64_t i = 0; i < n; i++)
        for (int h = 0; h < t->num_hashes; h++) add_row(a, t, he_row(keys[i], t->salts[h], t->num_rows), with_state);
}

/* ---- the decision to ask ---- */

/* Returns the number of 512-byte units that have been read from disks for this thread. */
static int64_t blocks_read(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_inblock;
}

static int is_worth_it(int64_t read, int64_t rows) {
    return read * 512 / sysconf(_SC_PAGESIZE) * WORTH_ONE_IN >= HE_MAX(rows, 1);
}

static int32_t get(const int32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static void set(int32_t *p, int32_t value) { __atomic_store_n(p, value, __ATOMIC_RELAXED); }

int he_ahead_watch(he_ahead *a) {
    const int32_t wait = get(&a->wait);
    if (HE_LIKELY(wait > 0)) {
        set(&a->wait, wait - 1);
        return 0;
    }
    return !get(&a->off);
}

void he_ahead_done(he_ahead *a, int watched) {
    if (!watched || get(&a->asking)) return;
    const int32_t next = HE_MIN(2 * get(&a->backoff) + 1, MAX_WAIT);
    set(&a->backoff, next);
    set(&a->wait, next);
}

/* Learns from the amount read when a chunk was asked for, or read without asking. */
static void learn(he_ahead *a, int64_t read, int64_t rows) {
    if (is_worth_it(read, rows)) {
        set(&a->asking, 1);
        set(&a->quiet, 0);
        set(&a->backoff, 0);
    } else if (get(&a->asking)) {
        const int32_t quiet = get(&a->quiet) + 1;
        set(&a->quiet, quiet);
        if (quiet >= QUIET_CHUNKS) set(&a->asking, 0);
    }
}

/* Returns the rows of a chunk. It keeps the data in flight small compared with any memory, as the working set may not
 * fit at all. */
int64_t he_ahead_rows(const he_table *t) {
    const int64_t page = sysconf(_SC_PAGESIZE), pages = 1 + (t->row_bytes + page - 1) / page;
    return HE_MAX(CHUNK_BYTES / (page * pages * t->num_hashes), 16);
}

int he_ahead_begin(const he_table *t, int64_t *mark) {
    *mark = blocks_read();
    return get(&t->ahead->asking);
}

void he_ahead_end(const he_table *t, int64_t mark, int64_t rows) { learn(t->ahead, blocks_read() - mark, rows); }

void he_ahead_keys(const he_table *t, const uint64_t *keys, int64_t n) {
    const int64_t before = blocks_read();
    asker a;
    if (n <= 0) return;
    asker_init(&a, 0);
    add_keys(&a, t, keys, n, 0);
    flush(&a);
    learn(t->ahead, blocks_read() - before, n * t->num_hashes);
}

void he_ahead_planned(const he_table *t, const uint64_t *rows, int64_t n) {
    const int64_t before = blocks_read();
    asker a;
    if (n <= 0) return;
    asker_init(&a, 0);
    for (int64_t i = 0; i < n; i++) add_row(&a, t, rows[i], 1);
    flush(&a);
    learn(t->ahead, blocks_read() - before, n);
}

/* ---- prefetch: in its own thread, because the kernel makes a thread that fills the disk's queue wait ---- */

typedef struct queued {
    struct queued *next;
    int64_t count;
    struct iovec *ranges;
} queued;

static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static queued *first_queued, **last_queued = &first_queued;
static int num_queued, is_running;

/* The child has no such thread, and does not need the pages that its parent requested. */
static void after_fork_in_child(void) {
    static const pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
    memcpy(&queue_lock, &unlocked, sizeof(unlocked));
    first_queued = NULL;
    last_queued = &first_queued;
    num_queued = is_running = 0;
}

__attribute__((constructor)) static void set_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

static void discard(queued *q) {
    free(q->ranges);
    free(q);
}

/* Takes the first item of the queue; NULL ends the thread. A table may be closed meanwhile: where nothing is mapped the
 * advice fails, and where something else is mapped it only reads. */
static queued *take_queued(void) {
    pthread_mutex_lock(&queue_lock);
    queued *q = first_queued;
    if (q) {
        first_queued = q->next;
        if (!first_queued) last_queued = &first_queued;
        num_queued--;
    } else {
        is_running = 0;
    }
    pthread_mutex_unlock(&queue_lock);
    return q;
}

static void *queue_main(void *unused) {
    (void)unused;
    for (queued *q; (q = take_queued());) {
        ask(q->ranges, q->count);
        discard(q);
    }
    return NULL;
}

static int start_thread(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, queue_main, NULL)) return 0;
    pthread_detach(thread);
    return 1;
}

/* Asks at once if no thread can be started. */
static void enqueue(queued *q) {
    pthread_mutex_lock(&queue_lock);
    if (!is_running) is_running = start_thread();
    const int taken = is_running && num_queued < MAX_QUEUED, refused = is_running && !taken;
    if (taken) {
        q->next = NULL;
        *last_queued = q;
        last_queued = &q->next;
        num_queued++;
    }
    pthread_mutex_unlock(&queue_lock);
    if (taken) return;
    if (!refused) ask(q->ranges, q->count);
    discard(q);
}

int he_prefetch_keys(const he_table *t, const uint64_t *keys, int64_t n, int with_state) {
    asker *a = malloc(sizeof(*a));
    queued *q = malloc(sizeof(*q));
    if (a && q) {
        asker_init(a, 1);
        add_keys(a, t, keys, n, with_state);
        flush(a);
        q->ranges = a->kept;
        q->count = a->kept_count;
        enqueue(q);
    } else {
        free(q);
    }
    free(a);
    return a && q ? 0 : ENOMEM;
}
