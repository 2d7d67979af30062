"""Declarations of the core's C API, csrc/table.h. All functions are `noexcept nogil`."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t


cdef extern from "table.h" nogil:
    enum: HE_MAX_HASHES
    enum: HE_SUM
    enum: HE_MAX_FILES
    enum: HE_STRIPE_BLOCKS
    enum: HE_ROWS_PER_LOG
    int64_t HE_LOCK_WRITERS, HE_LOCK_GATE, HE_LOCK_SNAPSHOT, HE_LOCK_SEATS

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

    ctypedef struct he_control:
        uint64_t step, epoch

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

    ctypedef struct he_saving:
        int32_t num_files, lock_fd, target_blocks_fd, bits_fd, log_fd, block_shift
        int32_t target_fds[4]
        const char *data[4]
        int64_t row_bytes[4]
        int64_t data_offset
        const uint32_t *blocks
        int64_t num_blocks, num_rows
        he_control *control
        uint32_t since, until
        uint64_t *bits
        char *buffer

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
    int he_read_units(int fd, const int64_t *units, int64_t n, int64_t size, int64_t offset, int64_t file_bytes,
                      char *out) noexcept
    int he_prefetch_keys(const he_table *t, const uint64_t *keys, int64_t n, int with_state) noexcept
    int he_secure_reads(const he_table *t, const he_batch *b, int of_rows) noexcept
    double he_decay_total(const he_control *c) noexcept
    uint64_t he_epoch(const he_control *c) noexcept
    int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end) noexcept
    int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait) noexcept
    int he_gate_look(int fd) noexcept
    int he_gate_close(he_control *c, int fd) noexcept
    void he_gate_open(he_control *c, int fd) noexcept
    int he_begin_point(he_control *c, int fd, char *page, int64_t page_bytes) noexcept

    enum: HE_AGAIN
    enum: HE_CLOSED
    enum: HE_GATE_CLOSED
    enum: HE_NEEDS_JOIN
    enum: HE_NEEDS_ROOM
    enum: HE_NEEDS_SAVING
    enum: HE_ROWS_REFUSED

    ctypedef struct he_batches:
        int32_t closed

    ctypedef struct he_commit_options:
        int32_t lock_fd, exact, waited, has_room, asks_for_room
        const he_saving *saving

    void he_batches_init(he_batches *b) noexcept
    void he_batches_after_fork(he_batches *b) noexcept
    int he_batches_enter(he_batches *b) noexcept
    void he_batches_leave(he_batches *b) noexcept
    int he_batches_dirty(const he_batches *b) noexcept
    void he_batches_set_dirty(he_batches *b, int value) noexcept
    int he_commit(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o) noexcept
