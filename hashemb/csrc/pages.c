/* Making sure, before anything is written, that the pages about to be written can be.
 *
 * A store to a hole of a file on a full disk is a SIGBUS. MADV_POPULATE_WRITE (Linux 5.14) takes the same fault on
 * request and reports it; it also saves the store the fault. It waits for one page after another, though: where blocks
 * have to be read from disk, the next ones are asked for before (as in ahead.c). */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "portability.h"
#include "table.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { FIRST_WINDOW_BYTES = 1 << 18, WINDOW_BYTES = 1 << 23 };

static int populate(uintptr_t begin, uintptr_t end) {
    while (madvise((void *)begin, end - begin, MADV_POPULATE_WRITE))
        if (errno != EINTR && errno != EAGAIN) return errno;
    return 0;
}

/* Blocks are ascending; those whose pages adjoin are asked for together. */
static int populate_window(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes, int64_t total_bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = 0, end = 0;
    for (int64_t i = 0; i < num_blocks; i++) {
        int64_t first = (int64_t)blocks[i] * block_bytes;
        uintptr_t low = ((uintptr_t)base + (uintptr_t)first) & ~(page - 1);
        uintptr_t high = ((uintptr_t)base + (uintptr_t)HE_MIN(first + block_bytes, total_bytes) + page - 1) & ~(page - 1);
        if (low <= end && low >= begin) {
            end = HE_MAX(end, high);
            continue;
        }
        int error = begin < end ? populate(begin, end) : 0;
        if (error) return error;
        begin = low;
        end = high;
    }
    return begin < end ? populate(begin, end) : 0;
}

static void ask_for_blocks(const char *base, const uint64_t *blocks, int64_t n, int64_t block_bytes, int64_t total_bytes) {
    for (int64_t i = 0, end; i < n; i = end) {
        const int64_t first = (int64_t)blocks[i] * block_bytes;
        for (end = i + 1; end < n && blocks[end] - blocks[i] == (uint64_t)(end - i);) end++;
        he_ask_range(base + first, HE_MIN(((int64_t)blocks[end - 1] + 1) * block_bytes, total_bytes) - first);
    }
}

/* In windows, asked for one ahead once something had to be read. */
int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes, int64_t total_bytes) {
    const int64_t usual = HE_MAX(WINDOW_BYTES / block_bytes, 1);
    int64_t from = 0, asked = 0, window = HE_MAX(FIRST_WINDOW_BYTES / block_bytes, 1), read = he_blocks_read();
    int asking = 0, error = 0;
    while (from < num_blocks && !error) {
        const int64_t end = HE_MIN(from + window, num_blocks);
        const int64_t ahead = HE_MIN(end + usual, num_blocks);
        if (asking) {
            asked = HE_MAX(asked, from);
            ask_for_blocks(base, blocks + asked, ahead - asked, block_bytes, total_bytes);
            asked = ahead;
        }
        error = populate_window(base, blocks + from, end - from, block_bytes, total_bytes);
        asking = he_blocks_read() != read;
        read = he_blocks_read();
        from = end;
        window = usual;
    }
    return error;
}
