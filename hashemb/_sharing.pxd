"""What the core takes from _sharing: a C interface of the project's own, not shipped. See csrc/sharing.h."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t


cdef extern from "sharing.h" nogil:
    enum: HE_AGAIN
    enum: HE_CLOSED
    enum: HE_GATE_CLOSED
    enum: HE_NEEDS_JOIN
    enum: HE_NEEDS_ROOM
    enum: HE_NEEDS_SAVING
    enum: HE_ROWS_REFUSED
    int64_t HE_LOCK_GATE

    ctypedef struct he_control:
        uint64_t step, epoch

    ctypedef struct he_batches:
        int32_t closed

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

    ctypedef struct he_sharing:
        int (*gate_look)(int fd) noexcept nogil

    const he_sharing *he_shared  # defined in the core
    uint64_t he_epoch(const he_control *c) noexcept


cdef enum:
    WAIT_US = 1000  # between two attempts to get what another thread or process holds


cdef const he_sharing *process_sharing() noexcept
cdef int raise_errno(int error) except -1


cdef class Calls:
    cdef he_batches batches
    cdef list threads
    cdef bint closing
    cdef unsigned long closer  # the thread inside `Closing`, or 0
    cdef readonly str path
    cdef readonly tuple identity
    cdef object __weakref__

    cdef closed_error(self)
    cdef int check_wait(self, place, str call) except -1
    cdef int end(self) except -1


cdef class Saving:
    cdef he_saving saving
    cdef object kept
