"""Declarations of csrc/table.h for _core.pyx, not shipped. All functions are `noexcept nogil`."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from hashemb._sharing cimport he_batches, he_control, he_saving


cdef extern from "table.h" nogil:
    enum: HE_MAX_HASHES
    enum: HE_SUM

    ctypedef struct he_ahead:
        int32_t off, asking, wait, backoff

    ctypedef struct he_table:
        char *weight
        float *state[2]
        double *paid
        uint32_t *blocks
        uint64_t num_rows
        int64_t dim, row_bytes
        int32_t dtype, optimizer, init, num_hashes, block_shift
        float init_scale
        double init_std
        uint64_t init_key, rounding_key
        uint64_t salts[16]
        float eps, initial_accumulator, beta, l1, l2
        double weight_decay
        he_ahead *ahead
        int32_t tmpfs_fd
        uint64_t *in_flight

    ctypedef struct he_batch:
        const uint64_t *keys
        const int64_t *offsets
        const float *weights
        int64_t num_keys, num_bags
        int32_t pooling

    ctypedef struct he_share:
        int64_t bad_row
        uint64_t rows_refused

    ctypedef struct he_plan:
        he_batch batch
        const float *grads
        int64_t *offsets
        float *scales
        int64_t num_occurrences, num_fresh
        uint64_t *fresh
        uint64_t step
        int32_t num_threads
        he_share shares[64]

    int he_lookup_threads(const he_table *t, const he_batch *b) noexcept
    int64_t he_lookup_scratch(const he_table *t) noexcept
    void he_lookup(const he_table *t, const he_batch *b, double decay_total, int num_threads, float *scratch,
                   float *out) noexcept
    void he_rows(const he_table *t, const uint64_t *keys, int64_t n, int64_t *out) noexcept
    int64_t he_first_not_finite(const float *values, int64_t n) noexcept
    int he_plan_init(const he_table *t, he_plan *p) noexcept
    int64_t he_plan_bytes(const he_table *t, const he_plan *p) noexcept
    int64_t he_plan_layout(const he_table *t, he_plan *p, char *memory) noexcept
    int64_t he_update_plan(const he_table *t, he_plan *p, uint32_t epoch) noexcept
    int64_t he_offsets_copy(const int64_t *offsets, int64_t num_bags, int64_t num_keys, int64_t *out) noexcept
    int64_t he_first_overflow(const he_table *t, const he_plan *p) noexcept
    int he_populate_blocks(char *base, const uint64_t *blocks, int64_t num_blocks, int64_t block_bytes,
                           int64_t total_bytes) noexcept
    int he_prefetch_keys(const he_table *t, const uint64_t *keys, int64_t n, int with_state) noexcept
    int he_secure_reads(const he_table *t, const he_batch *b, int of_rows) noexcept
    double he_decay_total(const he_control *c) noexcept
    ctypedef struct he_commit_options:
        int32_t lock_fd, exact, waited, has_room, asks_for_room
        const he_saving *saving

    int he_commit(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o) noexcept
