/* Ensures, before anything is written or read, that the pages about to be touched are accessible.
 *
 * A store to a hole of a file on a full disk raises SIGBUS, and so does a load from a hole on a full tmpfs.
 * MADV_POPULATE_* (Linux 5.14) takes the same fault on request and reports an error; it also saves the fault at the
 * access. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "numerics.h"
#include "portability.h"
#include "table.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

/* Space that others may take on a tmpfs between this check and the batch's last read. */
enum { MARGIN_BYTES = 16 << 20 };

static int populate(uintptr_t begin, uintptr_t end, int how) {
    while (madvise((void *)begin, end - begin, how))
        if (errno != EINTR && errno != EAGAIN) return errno;
    return 0;
}

/* Blocks are ascending; those with adjoining pages are populated together. */
int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes,
                       int64_t total_bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = 0, end = 0;
    for (int64_t i = 0; i < num_blocks; i++) {
        int64_t first = (int64_t)blocks[i] * block_bytes;
        uintptr_t low = ((uintptr_t)base + (uintptr_t)first) & ~(page - 1);
        uintptr_t high = ((uintptr_t)base + (uintptr_t)HE_MIN(first + block_bytes, total_bytes) + page - 1) &
                         ~(page - 1);
        if (low <= end && low >= begin) {
            end = HE_MAX(end, high);
            continue;
        }
        int error = begin < end ? populate(begin, end, MADV_POPULATE_WRITE) : 0;
        if (error) return error;
        begin = low;
        end = high;
    }
    return begin < end ? populate(begin, end, MADV_POPULATE_WRITE) : 0;
}

int he_make_room(const he_table *t, const uint64_t *blocks, int64_t num_blocks) {
    const int64_t rows = (int64_t)t->num_rows, per_block = INT64_C(1) << t->block_shift;
    const int64_t state = t->optimizer == HE_ROWWISE_ADAGRAD ? 4 : t->dim * 4;
    int error = he_populate_blocks(t->weight, blocks, num_blocks, per_block * t->row_bytes, rows * t->row_bytes);
    for (int i = 0; i < 2 && t->state[i] && !error; i++)
        error = he_populate_blocks((char *)t->state[i], blocks, num_blocks, per_block * state, rows * state);
    if (t->paid && !error) error = he_populate_blocks((char *)t->paid, blocks, num_blocks, per_block * 8, rows * 8);
    if (!error) error = he_populate_blocks((char *)t->blocks, blocks, num_blocks, 4, ((rows - 1) / per_block + 1) * 4);
    return error;
}

/* ---- tmpfs ---- */

static int has_room(int fd, uint64_t num_pages) {
    struct statfs now;
    if (fstatfs(fd, &now) || now.f_blocks == 0) return 1; /* no size limit: running out of memory shows otherwise */
    return now.f_bavail >= num_pages + MARGIN_BYTES / (uint64_t)now.f_bsize;
}

/* `last` is the end of the previous call's range: neighbours in one page are populated once. */
static int make_readable(const void *data, int64_t num_bytes, uintptr_t page, uintptr_t *last) {
    const uintptr_t begin = (uintptr_t)data & ~(page - 1),
                    end = ((uintptr_t)data + (uintptr_t)num_bytes + page - 1) & ~(page - 1);
    if (end == *last) return 0;
    *last = end;
    return populate(begin, end, MADV_POPULATE_READ);
}

static int make_rows_readable(const he_table *t, uint64_t key, uintptr_t page, uintptr_t last[2]) {
    int error = 0;
    for (int h = 0; h < t->num_hashes && !error; h++) {
        const int64_t row = (int64_t)he_row(key, t->salts[h], t->num_rows);
        error = make_readable(t->weight + row * t->row_bytes, t->row_bytes, page, &last[0]);
        if (!error && t->paid) error = make_readable(&t->paid[row], sizeof(*t->paid), page, &last[1]);
    }
    return error;
}

static int make_marks_readable(const he_table *t, uint64_t key, uintptr_t page, uintptr_t last[2]) {
    int error = 0;
    for (int h = 0; h < t->num_hashes && !error; h++) {
        const uint64_t block = he_row(key, t->salts[h], t->num_rows) >> t->block_shift;
        error = make_readable(&t->blocks[block], sizeof(*t->blocks), page, last);
    }
    return error;
}

int he_secure_reads(const he_table *t, const he_batch *b, int of_rows) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uint64_t pages_per_row = of_rows ? (uint64_t)t->row_bytes / page + 2 + (t->paid != NULL) : 1;
    uintptr_t last[2] = {0, 0};
    if (has_room(t->tmpfs_fd, (uint64_t)(b->num_keys * t->num_hashes) * pages_per_row)) return 0;
    for (int64_t i = 0; i < b->num_keys; i++) {
        int error = (of_rows ? make_rows_readable : make_marks_readable)(t, b->keys[i], page, last);
        if (error) return error == EINVAL ? 0 : error; /* a kernel before 5.14 does not support it */
    }
    return 0;
}
