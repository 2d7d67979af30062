/* Copy before first write: the content of a table at a point in time is saved to the files of a snapshot while writers
 * continue.
 *
 * The owner of the snapshot copies blocks, some at a time, under byte-range locks on them. A writer that gets to a
 * block first does not copy it: it appends the old content of each row that it is about to change to a log, once, as
 * recorded by a bit per row (a block is dozens of rows, and a large batch touches most blocks). A block whose rows are
 * being changed is copied as it is; the log has the old rows, and the owner writes them back when all is copied.
 *
 * Invariants: a row is changed only after its writer has seen its bit set, and bits are set under the lock, after the
 * old content is in the log or in the copy. A process that dies in between leaves rows that have no bit and are
 * unchanged, and they are saved again. No process locks more than a stripe of blocks at a time, and the owner moves
 * downwards while writers move upwards, so that they meet once. A block first written in a later epoch, or one that the
 * snapshot does not need, gets all its bits set when it is marked. The files are written by system calls, for which a
 * full disk is an errno and not a signal. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "numerics.h"
#include "portability.h"
#include "sharing.h"

/* Transfers all n bytes to or from byte `at` of the file. Returns 0 or an errno. */
static int transfer(int fd, char *data, int64_t n, int64_t at, int writing) {
    while (n > 0) {
        ssize_t done = writing ? pwrite(fd, data, (size_t)n, at) : pread(fd, data, (size_t)n, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done ? errno : EIO;
        data += done;
        at += done;
        n -= done;
    }
    return 0;
}

static int write_all(int fd, const char *data, int64_t n, int64_t at) {
    return transfer(fd, (char *)(uintptr_t)data, n, at, 1);
}

static int read_all(int fd, char *data, int64_t n, int64_t at) { return transfer(fd, data, n, at, 0); }

int he_read_units(int fd, const int64_t *units, int64_t n, int64_t size, int64_t offset, int64_t file_bytes,
                  char *out) {
    int error = 0;
    for (int64_t i = 0, end; i < n && error == 0; i = end) {
        end = i + 1;
        while (end < n && units[end] == units[end - 1] + 1) end++;
        const int64_t at = offset + units[i] * size;
        error = read_all(fd, out + i * size, HE_MIN((end - i) * size, file_bytes - at), at);
    }
    return error;
}

/* Copies blocks [begin, end) of every file. */
static int copy_run(const he_saving *s, int64_t begin, int64_t end) {
    for (int i = 0; i < s->num_files; i++) {
        const int64_t block = s->row_bytes[i] << s->block_shift;
        const int64_t first = begin * block, last = HE_MIN(end * block, s->num_rows * s->row_bytes[i]);
        int error = write_all(s->target_fds[i], s->data[i] + first, last - first, s->data_offset + first);
        if (error) return error;
    }
    return 0;
}

/* ---- the bits of rows ---- */

static int is_saved(const he_saving *s, uint64_t row) {
    return __atomic_load_n(&s->bits[row / 64], __ATOMIC_ACQUIRE) >> (row % 64) & 1;
}

static void set_bits(const he_saving *s, uint64_t begin, uint64_t end) {
    while (begin < end) {
        const uint64_t in_word = HE_MIN(64 - begin % 64, end - begin);
        const uint64_t mask = (in_word == 64 ? ~UINT64_C(0) : (UINT64_C(1) << in_word) - 1) << (begin % 64);
        __atomic_fetch_or(&s->bits[begin / 64], mask, __ATOMIC_RELEASE);
        begin += in_word;
    }
}

static void set_block(const he_saving *s, int64_t block) {
    const uint64_t begin = (uint64_t)block << s->block_shift;
    set_bits(s, begin, HE_MIN(begin + (UINT64_C(1) << s->block_shift), (uint64_t)s->num_rows));
}

/* Reserves space for the bits of a stripe, so that setting them cannot fail. */
static int reserve_bits(const he_saving *s, int64_t stripe) {
    const int64_t bytes = ((int64_t)HE_STRIPE_BLOCKS << s->block_shift) / 8;
    while (fallocate(s->bits_fd, FALLOC_FL_KEEP_SIZE, stripe * bytes, bytes))
        if (errno != EINTR) return errno == EOPNOTSUPP ? 0 : errno;
    return 0;
}

/* ---- blocks ---- */

static int wanted(const he_saving *s, uint32_t epoch) { return epoch > s->since && epoch <= s->until; }

/* Reads the epochs that the target has for blocks [begin, end). */
static int read_epochs(const he_saving *s, int64_t begin, int64_t end, uint32_t *epochs) {
    return read_all(s->target_blocks_fd, (char *)epochs, (end - begin) * 4, s->data_offset + begin * 4);
}

static int write_epochs(const he_saving *s, int64_t begin, int64_t end, const uint32_t *epochs) {
    return write_all(s->target_blocks_fd, (const char *)epochs, (end - begin) * 4, s->data_offset + begin * 4);
}

static int lock_blocks(const he_saving *s, int64_t begin, int64_t end) {
    int error;
    while ((error = he_lock_spinning(s->lock_fd, F_WRLCK, HE_LOCK_BLOCKS + begin, end - begin)) == EINTR) continue;
    return error;
}

/* Returns how many of the n items, blocks (shift 0) or rows, ascending, are in the same span of `span` blocks as the
 * first. */
static int64_t together(const uint64_t *items, int64_t n, int shift, uint64_t span) {
    const uint64_t first = (items[0] >> shift) / span;
    int64_t count = 1;
    while (count < n && (items[count] >> shift) / span == first) count++;
    return count;
}

/* Locks the blocks of the first items, from the first block to the last: those in one stripe or, if another process is
 * working there, those that the owner copies at a time. (Waiting for a whole stripe would mean waiting until the owner,
 * which moves from neighbour to neighbour, has finished it.) Returns the number of these items, and an errno. */
static int64_t lock_items(const he_saving *s, const uint64_t *items, int64_t n, int shift, int *error) {
    const int64_t begin = HE_LOCK_BLOCKS + (int64_t)(items[0] >> shift);
    int64_t count = together(items, n, shift, HE_STRIPE_BLOCKS);
    int64_t length = HE_LOCK_BLOCKS + (int64_t)(items[count - 1] >> shift) + 1 - begin;
    if ((*error = he_lock(s->lock_fd, F_WRLCK, begin, length, 0)) != EAGAIN) return count;
    count = together(items, count, shift, HE_BLOCKS_PER_COPY);
    length = HE_LOCK_BLOCKS + (int64_t)(items[count - 1] >> shift) + 1 - begin;
    while ((*error = he_lock_spinning(s->lock_fd, F_WRLCK, begin, length)) == EINTR) continue;
    return count;
}

static void unlock_blocks(const he_saving *s, int64_t begin, int64_t end) {
    he_lock(s->lock_fd, F_UNLCK, HE_LOCK_BLOCKS + begin, end - begin, 0);
}

/* Reports that the snapshot has failed. Its owner checks once it has processed all blocks, so this must precede marking
 * or changing anything that was not saved. */
static void give_up(const he_saving *s, int error) {
    __atomic_store_n(&s->control->save_errno, (uint64_t)error, __ATOMIC_RELEASE);
    __atomic_store_n(&s->control->save_failed, s->until, __ATOMIC_RELEASE);
}

/* Saves the epochs of wanted blocks in one stripe, before a writer marks them; blocks that the snapshot does not need
 * get all their bits set instead. */
static int save_epochs(const he_saving *s, const uint64_t *blocks, int64_t n) {
    uint32_t epochs[HE_STRIPE_BLOCKS];
    const int64_t begin = (int64_t)blocks[0], end = (int64_t)blocks[n - 1] + 1;
    int64_t changed = 0;
    int error = reserve_bits(s, begin / HE_STRIPE_BLOCKS);
    if (!error) error = read_epochs(s, begin, end, epochs);
    for (int64_t i = 0; i < n && !error; i++) {
        uint32_t *saved = &epochs[blocks[i] - blocks[0]], epoch = s->blocks[blocks[i]];
        if (epoch > s->until || *saved) continue;
        if (wanted(s, epoch)) {
            *saved = epoch;
            changed++;
        } else {
            set_block(s, (int64_t)blocks[i]);
        }
    }
    return error || !changed ? error : write_epochs(s, begin, end, epochs);
}

/* Returns where this process begins among n items: writers that started at the same place would wait for each other's
 * locks all the way. */
static int64_t own_beginning(int64_t n) {
    return (int64_t)(((uint64_t)getpid() * HE_GOLDEN >> 32) * (uint64_t)n >> 32);
}

static void mark(uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    for (int64_t i = 0; i < n; i++) __atomic_store_n(&marks[blocks[i]], epoch, __ATOMIC_RELEASE);
}

/* Marks blocks (ascending) with `epoch`, for a writer about to change rows in them; their old epochs are saved first if
 * a snapshot is in progress (s is not NULL). If one cannot be saved, the snapshot fails and the writer continues. */
static void mark_some(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    int64_t i = 0;
    for (int64_t end; s && i < n; i = end) {
        int error;
        end = i + lock_items(s, blocks + i, n - i, 0, &error);
        const int locked = !error;
        if (!error) error = save_epochs(s, blocks + i, end - i);
        if (error) give_up(s, error);
        mark(marks, blocks + i, end - i, epoch);
        if (locked) unlock_blocks(s, (int64_t)blocks[i], (int64_t)blocks[end - 1] + 1);
        if (error) s = NULL;
    }
    mark(marks, blocks + i, n - i, epoch);
}

void he_mark_blocks(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    const int64_t beginning = s ? own_beginning(n) : 0;
    mark_some(s, marks, blocks + beginning, n - beginning, epoch);
    mark_some(s, marks, blocks, beginning, epoch);
}

/* ---- rows ---- */

/* Appends rows whose bit is not set to the log, then sets their bits; the caller holds the lock on their blocks. */
static int log_rows(const he_saving *s, const uint64_t *rows, int64_t n) {
    char *at = s->buffer;
    for (int64_t i = 0; i < n; i++) {
        if (is_saved(s, rows[i])) continue;
        memcpy(at, &rows[i], 8);
        at += 8;
        for (int f = 0; f < s->num_files; f++) {
            memcpy(at, s->data[f] + rows[i] * (uint64_t)s->row_bytes[f], (size_t)s->row_bytes[f]);
            at += s->row_bytes[f];
        }
    }
    for (const char *from = s->buffer; from < at;) {
        ssize_t done = write(s->log_fd, from, (size_t)(at - from));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done ? errno : EIO;
        from += done;
    }
    for (int64_t i = 0; i < n; i++) set_bits(s, rows[i], rows[i] + 1);
    return 0;
}

static void prefetch_row(const he_saving *s, uint64_t row) {
    for (int f = 0; f < s->num_files; f++)
        he_prefetch_range(s->data[f] + row * (uint64_t)s->row_bytes[f], s->row_bytes[f], HE_NEAR);
}

static int by_number(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Selects the rows that are not saved yet, ascending, so that few locks cover many of them. */
static int64_t unsaved_rows(const he_saving *s, const uint64_t *rows, int64_t n, uint64_t *unsaved) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i + 16 < n) he_prefetch(&s->bits[rows[i + 16] / 64], HE_NEAR);
        if (!is_saved(s, rows[i])) unsaved[count++] = rows[i];
    }
    qsort(unsaved, (size_t)count, sizeof(*unsaved), by_number);
    return count;
}

static int save_sorted(const he_saving *s, const uint64_t *rows, int64_t n) {
    int error = 0;
    for (int64_t i = 0, end; i < n && !error; i = end) {
        const int64_t most = HE_MIN(n - i, HE_ROWS_PER_LOG);
        for (int64_t j = i; j < i + most; j++) prefetch_row(s, rows[j]);
        end = i + lock_items(s, rows + i, most, s->block_shift, &error);
        if (error) break;
        error = log_rows(s, rows + i, end - i);
        unlock_blocks(s, (int64_t)(rows[i] >> s->block_shift), (int64_t)(rows[end - 1] >> s->block_shift) + 1);
    }
    if (error) give_up(s, error);
    return error;
}

/* Saves those rows that are not saved yet, before a writer changes them; `scratch` holds n numbers. Returns 0 or an
 * errno. */
int he_save_rows(const he_saving *s, const uint64_t *rows, int64_t n, uint64_t *scratch) {
    const int64_t count = unsaved_rows(s, rows, n, scratch), beginning = own_beginning(count);
    int error = save_sorted(s, scratch + beginning, count - beginning);
    return error ? error : save_sorted(s, scratch, beginning);
}

/* ---- the owner of the snapshot ---- */

/* Copies the wanted blocks in [begin, end); neighbours are written together. */
static int copy_blocks(const he_saving *s, int64_t begin, int64_t end) {
    uint32_t epochs[HE_BLOCKS_PER_COPY];
    int64_t copied = 0, count = end - begin;
    int error = read_epochs(s, begin, end, epochs);
    for (int64_t i = 0, stop; i < count && !error; i = stop + 1) {
        for (stop = i; stop < count; stop++) {
            const uint32_t epoch = __atomic_load_n(&s->blocks[begin + stop], __ATOMIC_ACQUIRE);
            if (!epochs[stop] && !wanted(s, epoch)) break;
            if (!epochs[stop]) epochs[stop] = epoch; /* otherwise a writer has marked the block and saved its epoch */
        }
        if (i < stop) error = copy_run(s, begin + i, begin + stop);
        copied += stop - i;
    }
    if (!error && copied) error = reserve_bits(s, begin / HE_STRIPE_BLOCKS);
    if (!error && copied) error = write_epochs(s, begin, end, epochs);
    for (int64_t i = 0; i < count && !error && copied; i++)
        if (epochs[i]) set_block(s, begin + i);
    return error;
}

/* Copies the wanted blocks of stripes [begin, end), from the last one down. */
int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end) {
    const int64_t first = begin * HE_STRIPE_BLOCKS, last = HE_MIN(end * HE_STRIPE_BLOCKS, s->num_blocks);
    int error = 0;
    for (int64_t at = (last - 1) / HE_BLOCKS_PER_COPY * HE_BLOCKS_PER_COPY; at >= first && !error;
         at -= HE_BLOCKS_PER_COPY) {
        const int64_t stop = HE_MIN(at + HE_BLOCKS_PER_COPY, last);
        if ((error = lock_blocks(s, at, stop))) break;
        error = copy_blocks(s, at, stop);
        unlock_blocks(s, at, stop);
    }
    return error;
}
