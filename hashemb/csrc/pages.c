/* Making sure, before anything is written, that the pages about to be written can be.
 *
 * A store to a hole of a file on a full disk is a SIGBUS. MADV_POPULATE_WRITE (Linux 5.14) takes the same fault on
 * request and reports it; it also saves the store the fault. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "portability.h"
#include "table.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int populate(uintptr_t begin, uintptr_t end) {
    while (madvise((void *)begin, end - begin, MADV_POPULATE_WRITE))
        if (errno != EINTR && errno != EAGAIN) return errno;
    return 0;
}

/* Blocks are ascending; those whose pages adjoin are asked for together. */
int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes, int64_t total_bytes) {
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
