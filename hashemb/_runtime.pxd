"""What the other compiled modules take from _runtime: a C interface of the project's own, not shipped."""

from libc.stdint cimport int32_t, int64_t


cdef extern from "runtime.h" nogil:
    enum: HE_MAX_THREADS

    ctypedef struct he_runtime:
        int32_t isa

    const he_runtime *he_linked  # defined in each extension with C files that use threads or the instruction set


cdef const he_runtime *process_runtime() noexcept
cdef void *data_of(array, int type_number, str name, int64_t size=*) except? NULL
cdef int reserve(char **memory, int64_t *memory_bytes, int64_t needed, str what) except -1
