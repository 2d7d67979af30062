"""What all compiled modules share: threads, the instruction set, the check of a buffer, and scratch memory.

There is one pool of threads and one choice of instruction set in a process, whichever module uses them. A module whose
C files need them sets `he_linked` when it is loaded (csrc/runtime.h).
"""

import os

cimport numpy as cnp
from libc.stdlib cimport free, malloc

cdef extern from "runtime.h" nogil:
    he_runtime he_process
    int he_threads_get() noexcept
    void he_threads_set(int n) noexcept
    int he_isa_force(const char *name) noexcept
    const char *he_isa_name(int isa) noexcept
    const char *he_isa_available(int i) noexcept

cnp.import_array()


# ---- for the other compiled modules ----

cdef const he_runtime *process_runtime() noexcept:
    return &he_process


cdef void *data_of(array, int type_number, str name, int64_t size=-1) except? NULL:
    """Return the data of a C-contiguous array, which has `size` elements if that is not negative; NULL for None."""
    if array is None:
        return NULL
    cdef cnp.ndarray found = array
    if cnp.PyArray_TYPE(found) != type_number or not cnp.PyArray_IS_C_CONTIGUOUS(found):
        raise TypeError(f"{name}: expected a C-contiguous array of another dtype than {found.dtype}")
    if size >= 0 and cnp.PyArray_SIZE(found) != size:
        raise ValueError(f"{name}: expected {size} elements, got {found.size}")
    return cnp.PyArray_DATA(found)


cdef int reserve(char **memory, int64_t *memory_bytes, int64_t needed, str what) except -1:
    """Grow scratch memory to `needed` bytes, without keeping what it holds; if there is not so much, it is freed."""
    if needed <= memory_bytes[0]:
        return 0
    free(memory[0])
    memory_bytes[0] = 0
    memory[0] = <char *>malloc(needed)
    if memory[0] == NULL:
        raise MemoryError(f"{what} needs {needed} bytes of scratch memory")
    memory_bytes[0] = needed
    return 0


# ---- threads and instruction sets ----

def get_num_threads():
    """Return how many threads a call may use: HASHEMB_NUM_THREADS, else the CPUs of this process; 1 after a fork."""
    return he_threads_get()


def set_num_threads(n):
    """Set how many threads a call may use, 1 to 64. Results are bit-identical for any number."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"the number of threads must be an integer, got {type(n).__name__} {n!r}")
    n = n.__index__()
    if not 1 <= n <= HE_MAX_THREADS:
        raise ValueError(f"the number of threads must be between 1 and {HE_MAX_THREADS}, got {n}")
    he_threads_set(n)


def get_isa():
    """Return the instruction set whose kernels are in use: "baseline", "avx2" or "avx512"."""
    return he_isa_name(he_process.isa).decode()


def available_isas():
    """Return the instruction sets that this CPU supports, slowest first."""
    names = []
    while he_isa_available(len(names)) != NULL:
        names.append(he_isa_available(len(names)).decode())
    return names


def set_isa(name):
    """Select the kernels of one instruction set. Results are bit-identical for all of them."""
    if he_isa_force(name.encode()) != 0:
        raise ValueError(f"no kernels for the instruction set {name!r}: this CPU runs {', '.join(available_isas())}")


def _configure(environment):
    threads, isa = environment.get("HASHEMB_NUM_THREADS"), environment.get("HASHEMB_ISA")
    if threads:
        if not threads.strip().isdigit():
            raise ValueError(f"HASHEMB_NUM_THREADS must be an integer, got {threads!r}")
        set_num_threads(int(threads))
    if isa:
        set_isa(isa)


_configure(os.environ)
