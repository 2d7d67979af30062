/* Copy before first write: blocks of a point in time are brought to the files of a snapshot, by its owner in passing
 * and by every writer just before it first changes one.
 *
 * A stripe of blocks is worked on under its byte-range lock. Within it a block is saved if it was written after the
 * epoch `since` and not after `until`, and has no epoch in the target yet; only then, still under the lock, does a writer
 * mark the block as its own. So nobody saves a block that somebody is changing, and whoever dies in between leaves blocks
 * unmarked and unchanged: they are saved again. The target is written by pwrite: a full disk is an errno, not a signal. */
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
static int save_run(const he_saving *s, int64_t begin, int64_t end) {
    for (int i = 0; i < s->num_files; i++) {
        const int64_t first = begin * s->block_bytes[i], last = HE_MIN(end * s->block_bytes[i], s->total_bytes[i]);
        int error = write_all(s->target_fds[i], s->data[i] + first, last - first, s->data_offset + first);
        if (error) return error;
    }
    return 0;
}

static int due(const he_saving *s, uint32_t epoch, uint32_t saved) {
    return epoch > s->since && epoch <= s->until && !saved;
}

/* Saves what is due of the blocks listed, all of one stripe and ascending; neighbours are written together. */
static int save_listed(const he_saving *s, const uint64_t *blocks, int64_t n) {
    uint32_t saved[HE_STRIPE_BLOCKS];
    const int64_t first = (int64_t)(blocks[0] / HE_STRIPE_BLOCKS * HE_STRIPE_BLOCKS);
    const int64_t count = HE_MIN(HE_STRIPE_BLOCKS, s->num_blocks - first), at = s->data_offset + first * 4;
    int64_t changed = 0;
    int error = read_all(s->target_blocks_fd, (char *)saved, count * 4, at);
    for (int64_t i = 0; i < n && !error;) {
        if (!due(s, s->blocks[blocks[i]], saved[blocks[i] - first])) {
            i++;
            continue;
        }
        int64_t end = i;
        for (; end < n && blocks[end] - blocks[i] == (uint64_t)(end - i); end++) {
            const uint32_t epoch = s->blocks[blocks[end]];
            if (!due(s, epoch, saved[blocks[end] - first])) break;
            saved[blocks[end] - first] = epoch;
        }
        error = save_run(s, (int64_t)blocks[i], (int64_t)blocks[i] + end - i);
        changed += end - i;
        i = end;
    }
    return error || !changed ? error : write_all(s->target_blocks_fd, (const char *)saved, count * 4, at);
}

static int64_t end_of_stripe(const uint64_t *blocks, int64_t n, int64_t i) {
    const uint64_t stripe = blocks[i] / HE_STRIPE_BLOCKS;
    while (i < n && blocks[i] / HE_STRIPE_BLOCKS == stripe) i++;
    return i;
}

static int lock_stripe(const he_saving *s, int kind, int64_t stripe) {
    int error;
    while ((error = he_lock(s->lock_fd, kind, HE_LOCK_STRIPES + stripe, 1, 1)) == EINTR) continue;
    return error;
}

/* Says that the snapshot has failed: its owner looks once it has gone over all blocks, so this comes before a block that
 * was not saved is marked. */
static void give_up(const he_saving *s, int error) {
    __atomic_store_n(&s->control->save_errno, (uint64_t)error, __ATOMIC_RELEASE);
    __atomic_store_n(&s->control->save_failed, s->until, __ATOMIC_RELEASE);
}

static void mark(uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    for (int64_t i = 0; i < n; i++) __atomic_store_n(&marks[blocks[i]], epoch, __ATOMIC_RELEASE);
}

/* For a writer about to change these blocks (ascending): saves them where a snapshot needs them (s may be NULL: none
 * does), then marks them as of `epoch`. Where one cannot be saved the snapshot has failed, and the writer goes on. */
void he_mark_blocks(const he_saving *s, uint32_t *marks, const uint64_t *blocks, int64_t n, uint32_t epoch) {
    int64_t i = 0;
    for (int64_t end; s && i < n; i = end) {
        end = end_of_stripe(blocks, n, i);
        const int64_t stripe = (int64_t)(blocks[i] / HE_STRIPE_BLOCKS);
        int error = lock_stripe(s, F_WRLCK, stripe);
        const int locked = !error;
        if (!error) error = save_listed(s, blocks + i, end - i);
        if (error) give_up(s, error);
        mark(marks, blocks + i, end - i, epoch);
        if (locked) lock_stripe(s, F_UNLCK, stripe);
        if (error) s = NULL;
    }
    mark(marks, blocks + i, n - i, epoch);
}

/* For the owner of the snapshot: saves what is still due of the stripes [begin, end). 0 or an errno. */
int he_save_stripes(const he_saving *s, int64_t begin, int64_t end) {
    uint64_t blocks[HE_STRIPE_BLOCKS];
    int error = 0;
    for (int64_t stripe = begin; stripe < end && !error; stripe++) {
        const int64_t first = stripe * HE_STRIPE_BLOCKS, last = HE_MIN(first + HE_STRIPE_BLOCKS, s->num_blocks);
        int64_t n = 0;
        if ((error = lock_stripe(s, F_WRLCK, stripe))) break;
        for (int64_t b = first; b < last; b++) {
            const uint32_t epoch = __atomic_load_n(&s->blocks[b], __ATOMIC_ACQUIRE);
            if (epoch > s->since && epoch <= s->until) blocks[n++] = (uint64_t)b;
        }
        if (n) error = save_listed(s, blocks, n);
        lock_stripe(s, F_UNLCK, stripe);
    }
    return error;
}
