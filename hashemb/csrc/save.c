/* Copy before first write: what a table held at a point in time is brought to the files of a snapshot, although writers go
 * on.
 *
 * The owner of the snapshot copies blocks, stripe by stripe, under the stripe's byte-range lock. A writer who comes first
 * does not copy the block: of each row that it is about to change it appends the old content to a log, once, as a bit per
 * row says (a block is dozens of rows, and a large batch touches most blocks). A block whose rows are being changed is
 * copied with them; the log has what they were, and the owner puts it back when all is copied.
 *
 * It holds that a row is changed only after a writer has seen its bit set, and that bits are set under the lock, after the
 * old content is in the log or in the copy. Whoever dies in between leaves rows without a bit and unchanged: they are
 * saved again. A block first written in a later epoch, or one that the snapshot doesn't want, has all its bits set when it
 * is marked. The files are written by system calls: a full disk is an errno, not a signal. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "portability.h"
#include "table.h"

static int write_all(int fd, const char *data, int64_t n, int64_t at) {
    while (n > 0) {
        ssize_t done = pwrite(fd, data, (size_t)n, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done ? errno : EIO;
        data += done;
        at += done;
        n -= done;
    }
    return 0;
}

static int read_all(int fd, char *data, int64_t n, int64_t at) {
    while (n > 0) {
        ssize_t done = pread(fd, data, (size_t)n, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done ? errno : EIO;
        data += done;
        at += done;
        n -= done;
    }
    return 0;
}

/* Blocks [begin, end) of every file. */
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

/* Room for the bits of a stripe, so that setting them cannot fail. */
static int reserve_bits(const he_saving *s, int64_t stripe) {
    const int64_t bytes = ((int64_t)HE_STRIPE_BLOCKS << s->block_shift) / 8;
    while (fallocate(s->bits_fd, FALLOC_FL_KEEP_SIZE, stripe * bytes, bytes))
        if (errno != EINTR) return errno == EOPNOTSUPP ? 0 : errno;
    return 0;
}

/* ---- blocks ---- */

static int wanted(const he_saving *s, uint32_t epoch) { return epoch > s->since && epoch <= s->until; }

/* The epochs that the target has for a stripe; how many, in *count. */
static int read_epochs(const he_saving *s, int64_t stripe, uint32_t *epochs, int64_t *count) {
    const int64_t first = stripe * HE_STRIPE_BLOCKS;
    *count = HE_MIN(HE_STRIPE_BLOCKS, s->num_blocks - first);
    return read_all(s->target_blocks_fd, (char *)epochs, *count * 4, s->data_offset + first * 4);
}

static int write_epochs(const he_saving *s, int64_t stripe, const uint32_t *epochs, int64_t count) {
    return write_all(s->target_blocks_fd, (const char *)epochs, count * 4, s->data_offset + stripe * HE_STRIPE_BLOCKS * 4);
}

/* The epochs of a stripe's wanted blocks, before a writer marks them as its own; other blocks need nothing saved. */
static int save_epochs(const he_saving *s, int64_t stripe, const uint64_t *blocks, int64_t n) {
    uint32_t epochs[HE_STRIPE_BLOCKS];
    int64_t count, changed = 0;
    int error = reserve_bits(s, stripe);
    if (!error) error = read_epochs(s, stripe, epochs, &count);
    for (int64_t i = 0; i < n && !error; i++) {
        uint32_t *saved = &epochs[blocks[i] - (uint64_t)(stripe * HE_STRIPE_BLOCKS)], epoch = s->blocks[blocks[i]];
        if (epoch > s->until || *saved) continue;
        if (!wanted(s, epoch)) {
            set_block(s, (int64_t)blocks[i]);
            continue;
        }
        *saved = epoch;
        changed++;
    }
    return error || !changed ? error : write_epochs(s, stripe, epochs, count);
}

static int64_t end_of_stripe(const uint64_t *blocks, int64_t n, int64_t i) {
    const uint64_t stripe = blocks[i] / HE_STRIPE_BLOCKS;
    while (i < n && blocks[i] / HE_STRIPE_BLOCKS == stripe) i++;
    return i;
}

/* Marks blocks (ascending) as of `epoch`, for a writer about to change rows of them; their old epochs are saved first if
 * a snapshot is in progress (s is not NULL). Returns 0, or why that failed: they are marked all the same. */
int he_mark_blocks(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    int error = 0;
    for (int64_t i = 0, end; i < n; i = end) {
        end = s ? end_of_stripe(blocks, n, i) : n;
        const int64_t stripe = (int64_t)(blocks[i] / HE_STRIPE_BLOCKS);
        if (s) he_lock_surely(s->lock_fd, F_WRLCK, HE_LOCK_STRIPES + stripe, 1);
        if (s && !error) error = save_epochs(s, stripe, blocks + i, end - i);
        for (int64_t j = i; j < end; j++) __atomic_store_n(&marks[blocks[j]], epoch, __ATOMIC_RELEASE);
        if (s) he_lock_surely(s->lock_fd, F_UNLCK, HE_LOCK_STRIPES + stripe, 1);
    }
    return error;
}

/* ---- rows ---- */

/* Appends rows whose bit is not set to the log, then sets their bits; the caller holds the lock of their stripes. */
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

/* Saves those of the rows, which a writer is about to change, that are not saved yet. Returns 0 or an errno. */
int he_save_rows(const he_saving *s, const uint64_t *rows, int64_t n) {
    const int stripe_shift = s->block_shift + 10;
    uint64_t group[HE_ROWS_PER_LOG];
    _Static_assert(HE_STRIPE_BLOCKS == 1 << 10, "stripe_shift");
    for (int64_t i = 0; i < n;) {
        uint64_t low = UINT64_MAX, high = 0;
        int64_t m = 0;
        for (; i < n && m < HE_ROWS_PER_LOG; i++) {
            if (i + 16 < n) he_prefetch(&s->bits[rows[i + 16] / 64], HE_NEAR);
            if (is_saved(s, rows[i])) continue;
            prefetch_row(s, rows[i]);
            group[m++] = rows[i];
            low = HE_MIN(low, rows[i] >> stripe_shift);
            high = HE_MAX(high, rows[i] >> stripe_shift);
        }
        if (!m) continue;
        he_lock_surely(s->lock_fd, F_WRLCK, HE_LOCK_STRIPES + (int64_t)low, (int64_t)(high - low) + 1);
        int error = log_rows(s, group, m);
        he_lock_surely(s->lock_fd, F_UNLCK, HE_LOCK_STRIPES + (int64_t)low, (int64_t)(high - low) + 1);
        if (error) return error;
    }
    return 0;
}

/* ---- the owner of the snapshot ---- */

/* Copies the wanted blocks of one stripe; neighbours are written together. */
static int copy_stripe(const he_saving *s, int64_t stripe) {
    uint32_t epochs[HE_STRIPE_BLOCKS];
    const int64_t first = stripe * HE_STRIPE_BLOCKS;
    int64_t count, copied = 0;
    int error = read_epochs(s, stripe, epochs, &count);
    for (int64_t i = 0, end; i < count && !error; i = end + 1) {
        for (end = i; end < count; end++) {
            const uint32_t epoch = __atomic_load_n(&s->blocks[first + end], __ATOMIC_ACQUIRE);
            if (!epochs[end] && !wanted(s, epoch)) break;
            if (!epochs[end]) epochs[end] = epoch; /* else a writer has marked the block, and saved its epoch */
        }
        if (i == end) continue;
        if (!copied) error = reserve_bits(s, stripe);
        if (!error) error = copy_run(s, first + i, first + end);
        copied += end - i;
    }
    if (!error && copied) error = write_epochs(s, stripe, epochs, count);
    for (int64_t i = 0; i < count && !error && copied; i++)
        if (epochs[i]) set_block(s, first + i);
    return error;
}

int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end) {
    int error = 0;
    for (int64_t stripe = begin; stripe < end && !error; stripe++) {
        he_lock_surely(s->lock_fd, F_WRLCK, HE_LOCK_STRIPES + stripe, 1);
        error = copy_stripe(s, stripe);
        he_lock_surely(s->lock_fd, F_UNLCK, HE_LOCK_STRIPES + stripe, 1);
    }
    return error;
}
