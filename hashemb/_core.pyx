"""The compiled core: five-step wrappers (buffers, checks, one nogil call, exception, result) over csrc/.

It handles arrays and numbers, never paths; sharing between processes is in _sharing. `table.py` converts every argument
to the dtype, shape and order named here; only what could cause access outside an array is checked again.
"""

import mmap

from hashemb.errors import NoSpaceError

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EFAULT, EINTR
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport usleep

from hashemb._runtime cimport HE_MAX_THREADS, data_of, he_linked, process_runtime, reserve
from hashemb._sharing cimport (
    HE_AGAIN, HE_CLOSED, HE_GATE_CLOSED, HE_LOCK_GATE, HE_NEEDS_JOIN, HE_NEEDS_ROOM, HE_NEEDS_SAVING, HE_ROWS_REFUSED,
    WAIT_US, Calls, Saving, he_control, he_epoch, he_shared, process_sharing, raise_errno,
)

cnp.import_array()
he_linked, he_shared = process_runtime(), process_sharing()

cdef object PAGE_BYTES = mmap.PAGESIZE

NEEDS_JOIN, NEEDS_ROOM, NEEDS_SAVING = HE_NEEDS_JOIN, HE_NEEDS_ROOM, HE_NEEDS_SAVING


# ---- the table kernels ----

cdef int64_t *checked_offsets(he_batch *b, void *room) except NULL:
    """Copy and check the batch's offsets; the batch uses the copy, as another thread may change the caller's."""
    cdef int64_t *copy = <int64_t *>room
    cdef int64_t bad = he_offsets_copy(b.offsets, b.num_bags, b.num_keys, copy)
    b.offsets = copy
    if bad >= 0:
        raise_offsets(copy, bad, b.num_bags, b.num_keys)
    return copy


cdef int raise_offsets(const int64_t *offsets, int64_t bad, int64_t num_bags, int64_t num_keys) except -1:
    if bad == 0:
        raise ValueError(f"offsets must start at 0, got {offsets[0]}")
    if bad > num_bags:
        raise ValueError(f"offsets must end at the number of keys, {num_keys}, got {offsets[num_bags]}")
    raise ValueError(
        f"offsets must not fall: offsets[{bad - 1}] is {offsets[bad - 1]}, offsets[{bad}] is {offsets[bad]}")


@cython.no_gc_clear  # the core must get the memory back even if the plan was part of a cycle
cdef class Plan:
    """A batch that has been checked and ordered: `Core.plan` creates it, and `Core.apply` applies it once.

    It owns its memory, keeps the gradients that it refers to alive, and holds no lock: it may be dropped at any time.
    """

    cdef he_plan *plan
    cdef char *memory
    cdef int64_t memory_bytes
    cdef Core core
    cdef object grads

    def __dealloc__(self):
        if self.core is not None:
            self.core.take_back(self.memory, self.memory_bytes)

    @property
    def num_fresh(self):
        return self.plan.num_fresh

    @property
    def step(self):
        """The table's step number of this update, once applied."""
        return self.plan.step

    @property
    def fresh_blocks(self):
        """Blocks of the batch that had never been written when `apply` last checked, ascending uint64."""
        cdef cnp.npy_intp n = self.plan.num_fresh
        cdef cnp.ndarray out = cnp.PyArray_EMPTY(1, &n, cnp.NPY_UINT64, 0)
        if n:
            memcpy(cnp.PyArray_DATA(out), self.plan.fresh, n * sizeof(uint64_t))
        return out


cdef class Core:
    """The kernels bound to the arrays of one table.

    Parameters
    ----------
    arrays : dict
        "weight" (num_embeddings, embedding_dim), "blocks" (num_blocks,), "control" (4096 bytes), "states": list
        of float32 arrays, "paid" or None. All methods except `apply` accept read-only arrays.
    scalars : dict
        The fields of he_table by name (see csrc/table.h).
    calls : Calls
        The calls in progress on the table.

    It is thread-safe: look-ups and plans run in parallel, and batches are applied one after another.
    """

    cdef he_table table
    cdef he_ahead ahead
    cdef he_control *control
    cdef object arrays
    cdef readonly object in_flight
    cdef Calls calls
    cdef int lock_fd
    cdef public bint asks_for_room  # for tests: never reserves space itself, as on kernels that cannot
    cdef object __weakref__
    cdef char *memory  # memory of a released plan, reused by the next one
    cdef int64_t memory_bytes

    def __cinit__(self, dict arrays, dict scalars, Calls calls not None):
        cdef he_table *t = &self.table
        cdef int i
        self.arrays, self.calls, self.lock_fd = arrays, calls, -1
        memset(t, 0, sizeof(he_table))
        memset(&self.ahead, 0, sizeof(he_ahead))
        t.ahead = &self.ahead
        t.weight = <char *>cnp.PyArray_DATA(arrays["weight"])
        t.blocks = <uint32_t *>data_of(arrays["blocks"], cnp.NPY_UINT32, "blocks")
        self.control = <he_control *>data_of(arrays["control"], cnp.NPY_UINT8, "control")
        for i, state in enumerate(arrays["states"]):
            t.state[i] = <float *>data_of(state, cnp.NPY_FLOAT32, "state")
        if arrays["paid"] is not None:
            t.paid = <double *>data_of(arrays["paid"], cnp.NPY_FLOAT64, "paid")
        t.num_rows, t.dim = arrays["weight"].shape
        t.row_bytes = t.dim * arrays["weight"].itemsize
        t.dtype, t.optimizer, t.init = scalars["dtype"], scalars["optimizer"], scalars["init"]
        t.block_shift = scalars["block_shift"]
        t.init_scale = t.init_std = scalars["init_scale"]
        t.init_key, t.rounding_key = scalars["init_key"], scalars["rounding_key"]
        t.num_hashes = len(scalars["salts"])
        if not 1 <= t.num_hashes <= HE_MAX_HASHES:
            raise ValueError(f"num_hashes must be between 1 and {HE_MAX_HASHES}, got {t.num_hashes}")
        for i in range(t.num_hashes):
            t.salts[i] = scalars["salts"][i]
        t.eps, t.initial_accumulator = scalars["eps"], scalars["initial_accumulator"]
        t.beta, t.l1, t.l2 = scalars["beta"], scalars["l1"], scalars["l2"]
        t.weight_decay = scalars["weight_decay"]
        t.tmpfs_fd = scalars["tmpfs_fd"]

    def __dealloc__(self):
        free(self.memory)

    def join(self, int lock_fd, cnp.ndarray in_flight=None):
        """Set this process's lock of the table, before the first `apply` and again in a forked child.

        Threads note the rows that they write in `in_flight`, uint64 (64, 8): see csrc/update.c.
        """
        if in_flight is not None and in_flight.size != HE_MAX_THREADS * 8:
            raise ValueError(f"{HE_MAX_THREADS} lines of 8 words expected, got {in_flight.size} words")
        self.table.in_flight = <uint64_t *>data_of(in_flight, cnp.NPY_UINT64, "in_flight")
        self.in_flight, self.lock_fd = in_flight, lock_fd

    def after_fork(self):
        """Drop the parent's lock in a forked child."""
        self.table.in_flight = NULL
        self.in_flight, self.lock_fd = None, -1

    cdef int fill_batch(self, he_batch *b, cnp.ndarray keys, offsets, weights, int pooling) except -1:
        b.keys = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, "keys")
        b.num_keys = b.num_bags = cnp.PyArray_SIZE(keys)
        b.offsets = NULL
        b.weights = NULL
        b.pooling = pooling
        if offsets is not None:
            b.offsets = <const int64_t *>data_of(offsets, cnp.NPY_INT64, "offsets")
            b.num_bags = cnp.PyArray_SIZE(offsets) - 1
        if weights is not None:
            b.weights = <const float *>data_of(weights, cnp.NPY_FLOAT32, "per_sample_weights")
        return 0

    cdef int secure_reads(self, const he_batch *b, bint of_rows) except -1:
        """Raise an error on a full tmpfs now, instead of a SIGBUS when the batch reads a hole."""
        cdef int error
        if self.table.tmpfs_fd < 0:
            return 0
        with nogil:
            error = he_secure_reads(&self.table, b, of_rows)
        if error == EFAULT:
            raise NoSpaceError(
                f"no space left on the tmpfs, on which reading a row never written takes {PAGE_BYTES} bytes")
        return raise_errno(error)

    def lookup(self, cnp.ndarray keys not None, cnp.ndarray out not None, offsets=None, weights=None, int pooling=0):
        """Write the vector of each key (or bag) to `out`, float32 (num_bags, embedding_dim)."""
        cdef he_batch b
        cdef float *target = <float *>data_of(out, cnp.NPY_FLOAT32, "out")
        self.fill_batch(&b, keys, offsets, weights, pooling)
        if cnp.PyArray_SIZE(out) != b.num_bags * self.table.dim:
            raise ValueError(f"out holds {out.size} values, {b.num_bags * self.table.dim} expected")
        if b.num_bags == 0 and b.num_keys == 0:
            return
        self.secure_reads(&b, True)
        cdef int num_threads = he_lookup_threads(&self.table, &b)
        cdef int64_t scratch_bytes = num_threads * he_lookup_scratch(&self.table) * sizeof(float)
        cdef int64_t offset_bytes = 0 if b.offsets == NULL else (b.num_bags + 1) * sizeof(int64_t)
        cdef char *memory = <char *>malloc(scratch_bytes + offset_bytes)
        if memory == NULL:
            raise MemoryError()
        try:
            if offset_bytes:
                checked_offsets(&b, memory + scratch_bytes)
            with nogil:
                he_lookup(&self.table, &b, he_decay_total(self.control), num_threads, <float *>memory, target)
        finally:
            free(memory)

    def rows(self, cnp.ndarray keys not None, cnp.ndarray out not None):
        """Write each key's rows to `out`, int64 (num_keys, num_hashes)."""
        cdef const uint64_t *source = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, "keys")
        cdef int64_t *target = <int64_t *>data_of(out, cnp.NPY_INT64, "out")
        cdef int64_t n = cnp.PyArray_SIZE(keys)
        if cnp.PyArray_SIZE(out) != n * self.table.num_hashes:
            raise ValueError(f"out holds {out.size} values, {n * self.table.num_hashes} expected")
        with nogil:
            he_rows(&self.table, source, n, target)

    def plan(self, cnp.ndarray keys not None, cnp.ndarray grads not None, offsets=None, weights=None, int pooling=0):
        """Check and order an update, without taking a lock or writing to the table."""
        cdef Plan plan = self.new_plan()
        cdef he_plan *p = plan.plan
        cdef int64_t bad, num_grads = cnp.PyArray_SIZE(grads), dim = self.table.dim
        cdef uint32_t epoch = <uint32_t>he_epoch(self.control)
        plan.grads = grads
        p.grads = <const float *>data_of(grads, cnp.NPY_FLOAT32, "grads")
        self.fill_batch(&p.batch, keys, offsets, weights, pooling)
        if num_grads != p.batch.num_bags * dim:
            raise ValueError(f"grads holds {num_grads} values, {p.batch.num_bags * dim} expected")
        self.make_room(plan)
        p = plan.plan
        self.secure_reads(&p.batch, False)
        with nogil:
            bad = he_plan_layout(&self.table, p, plan.memory + sizeof(he_plan))
        if bad >= 0:
            raise_offsets(p.offsets, bad, p.batch.num_bags, p.batch.num_keys)
        with nogil:
            bad = he_update_plan(&self.table, p, epoch)
        if bad >= 0:
            raise ValueError(f"gradients must be finite: grads[{bad // dim}, {bad % dim}] is {p.grads[bad]} in float32")
        self.check_products(p)
        return plan

    cdef int check_products(self, const he_plan *p) except -1:
        """Check that weights of finite gradients, weighted gradients, and sums by row are finite."""
        cdef int64_t bad = -1 if p.scales == NULL else he_first_not_finite(p.scales, p.batch.num_keys)
        cdef int i
        if bad >= 0:
            raise ValueError(f"the weight of key {bad} in its bag must be finite, got {p.scales[bad]} in float32")
        bad = -1 if p.scales == NULL else he_first_overflow(&self.table, p)
        if bad >= 0:
            raise ValueError(f"the gradient of key {bad}, times its weight {p.scales[bad]}, is too large for float32")
        for i in range(p.num_threads):
            if p.shares[i].bad_row >= 0:
                raise ValueError(f"the gradients of row {p.shares[i].bad_row} add up to more than float32 can hold")
        return 0

    cdef Plan new_plan(self):
        """Return an empty plan, which reuses the memory of the last one if that is free."""
        cdef Plan plan = Plan.__new__(Plan)
        plan.memory, plan.memory_bytes = self.memory, self.memory_bytes
        self.memory, self.memory_bytes = NULL, 0
        plan.core = self
        reserve(&plan.memory, &plan.memory_bytes, sizeof(he_plan), "a plan")
        plan.plan = <he_plan *>plan.memory
        plan.plan.num_fresh = plan.plan.step = 0
        return plan

    cdef int take_back(self, char *memory, int64_t memory_bytes) noexcept:
        if memory_bytes <= self.memory_bytes:
            free(memory)
            return 0
        free(self.memory)
        self.memory, self.memory_bytes = memory, memory_bytes
        return 0

    cdef int make_room(self, Plan plan) except -1:
        cdef he_plan *p = plan.plan
        if he_plan_init(&self.table, p):
            raise ValueError(
                f"an update of {p.num_occurrences} rows (keys * num_hashes) of a table of {self.table.num_rows} rows "
                "is too large for one call: divide the batch"
            )
        cdef int64_t needed = sizeof(he_plan) + he_plan_bytes(&self.table, p)
        if needed <= plan.memory_bytes:
            return 0
        cdef he_plan kept = p[0]
        reserve(&plan.memory, &plan.memory_bytes, needed, f"an update of {p.batch.num_keys} keys")
        plan.plan = <he_plan *>plan.memory
        plan.plan[0] = kept
        return 0

    def apply(self, Plan plan not None, bint exact, Saving saving=None, bint has_room=False):
        """Write a planned update, count it as one step of the table, and return 0.

        Otherwise do nothing and return what is needed first: `NEEDS_JOIN` for `join`, `NEEDS_ROOM` for space for
        `plan.fresh_blocks` (then pass `has_room`), `NEEDS_SAVING` for `saving` of the snapshot in progress. With
        `exact` the batches of all processes that use it have the result of applying them one by one, in step order.
        """
        cdef he_commit_options o
        cdef int status
        o.exact, o.waited, o.has_room, o.asks_for_room = exact, 0, has_room, self.asks_for_room
        o.saving = NULL if saving is None else &saving.saving
        while True:
            o.lock_fd = self.lock_fd
            with nogil:
                status = he_commit(&self.table, self.control, &self.calls.batches, plan.plan, &o)
            if status == 0 or status == HE_NEEDS_ROOM or status == HE_NEEDS_SAVING or status == HE_NEEDS_JOIN:
                return status
            if status == HE_CLOSED:
                raise self.calls.closed_error()
            if status == HE_ROWS_REFUSED:
                self.raise_refused(plan.plan)
            if status == HE_AGAIN:
                PyErr_CheckSignals()
            elif status == HE_GATE_CLOSED:
                self.wait_at_gate()
                o.waited = 1
            else:
                raise_errno(status)

    cdef int wait_at_gate(self) except -1:
        """As a call in progress: `close` in another thread waits until the lock file is no longer used here."""
        cdef int fd, error = 0
        with self.calls:
            self.calls.check_wait(HE_LOCK_GATE, "update")
            fd = self.lock_fd
            with nogil:
                error = he_shared.gate_look(fd)
            while error == EAGAIN or error == EINTR:
                with nogil:
                    usleep(WAIT_US)
                PyErr_CheckSignals()
                self.calls.check()
                error = he_shared.gate_look(fd)
        return raise_errno(error)

    cdef int raise_refused(self, const he_plan *p) except -1:
        cdef int i
        refused = sum([p.shares[i].rows_refused for i in range(p.num_threads)])
        raise ValueError(
            f"gradients were changed while they were being applied: {refused} rows whose gradients had become NaN or "
            "infinite were left as they were, the others have been updated")

    def prefetch(self, cnp.ndarray keys not None, bint with_state):
        """Start to read the pages of the keys' rows, and optionally of their state, from disk; do not wait for them."""
        cdef const uint64_t *source = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, "keys")
        cdef int64_t n = cnp.PyArray_SIZE(keys)
        cdef int error = 0
        if n:
            with nogil:
                error = he_prefetch_keys(&self.table, source, n, with_state)
        raise_errno(error)

    @property
    def fault_ahead(self):
        """Whether look-ups and updates may request pages that are not in memory before touching them."""
        return not self.ahead.off

    @fault_ahead.setter
    def fault_ahead(self, bint wanted):
        self.ahead.off = not wanted

    @property
    def is_asking(self):
        """True while fault-ahead is active, i.e. rows were recently read from disk."""
        return self.ahead.asking != 0


def populate_blocks(cnp.ndarray array not None, cnp.ndarray blocks not None, int64_t block_bytes):
    """Make the pages of `blocks` (ascending, of `block_bytes` each) of a mapped array writable without a fault.

    Return 0 or an errno: EFAULT if a store would raise SIGBUS, EINVAL if the kernel does not support this.
    """
    cdef char *base = <char *>cnp.PyArray_DATA(array)
    cdef const uint64_t *source = <const uint64_t *>data_of(blocks, cnp.NPY_UINT64, "blocks")
    cdef int64_t n = cnp.PyArray_SIZE(blocks), total_bytes = array.nbytes
    cdef int error
    if n and <int64_t>source[n - 1] * block_bytes >= total_bytes:
        raise ValueError(f"block {source[n - 1]} of {block_bytes} bytes is outside the array's {total_bytes} bytes")
    with nogil:
        error = he_populate_blocks(base, source, n, block_bytes, total_bytes)
    return error
