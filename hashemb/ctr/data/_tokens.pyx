"""Parse text in the formats of Criteo, libsvm, libffm and Vowpal Wabbit: wrappers over csrc/tokens.h.

The module converts blocks of whole lines to labels, keys and values; it knows no files and no schema. Every call
allocates its results, releases the GIL for one pass over the text, and trims the results.
"""

import os

import mmh3
import numpy as np

cimport numpy as cnp
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from hashemb._runtime cimport data_of, he_linked, process_runtime

cdef extern from "murmur.h" nogil:
    uint64_t murmur_hash(const uint8_t *data, size_t size_bytes, uint32_t seed) noexcept
    uint64_t murmur_hash_null(uint32_t seed) noexcept

cdef extern from "tokens.h" nogil:
    enum: TOK_INTEGERS
    enum: TOK_COLUMNS
    enum: TOK_MAX_LINE_BYTES
    enum: TOK_SMALL
    enum: TOK_OCTAVES
    enum: TOK_NEW_FIELD

    int64_t tok_count_lines(const uint8_t *text, int64_t size) noexcept

    ctypedef struct tok_column:
        uint64_t null_key
        int32_t out
        uint32_t seed
        int32_t is_count

    ctypedef struct tok_buckets:
        const int16_t *small
        const int64_t *first
        int32_t octave[TOK_OCTAVES]

    ctypedef struct tok_odd:
        int64_t line, begin, row

    int64_t tok_criteo(const uint8_t *text, int64_t size, int labelled, const tok_column *columns,
                       const tok_buckets *buckets, int64_t row_keys, float *labels, uint64_t *keys, tok_odd *odd,
                       int64_t *num_odd) noexcept
    int64_t tok_criteo_max_rows(int64_t size) noexcept

    ctypedef int tok_format
    ctypedef struct tok_name:
        int64_t line, begin, length

    ctypedef struct tok_fields:
        uint64_t *hashes
        int32_t *numbers
        uint32_t *seeds
        tok_name *names
        uint64_t secret
        int shift
        int64_t count, num_new, room

    void tok_add_field(tok_fields *fields, uint64_t hash, uint32_t seed) noexcept

    ctypedef struct tok_rules:
        tok_format format
        int labelled
        int64_t max_line_bytes
        int num_labels
        double label_values[4]
        double label_meanings[4]

    ctypedef struct tok_fault:
        int64_t line, code, begin, length

    ctypedef struct tok_examples:
        float *labels
        float *weights
        int64_t *offsets
        uint64_t *keys
        float *values
        int32_t *fields
        tok_fault *faults
        int64_t rows, num_faults, line, begin
        tok_fault stopped

    void tok_examples_parse(const uint8_t *text, int64_t size, const tok_rules *rules, tok_fields *fields,
                            tok_examples *examples) noexcept
    int64_t tok_max_features(int64_t size) noexcept
    int tok_init() noexcept

cnp.import_array()
he_linked = process_runtime()
if not tok_init():
    raise MemoryError("no room for the C locale")

MAX_CRITEO_LINE_BYTES = TOK_MAX_LINE_BYTES
FORMATS = ("libsvm", "libffm", "vw")  # in the order of tok_format


cdef int _check_lines(bytes text) except -1:
    if len(text) > 0 and text[len(text) - 1] != 10:
        raise ValueError(f"the last of {len(text)} bytes must end a line, found 0x{text[len(text) - 1]:02x}")
    return 0


cdef class CriteoTokenizer:
    """Converts Criteo lines to labels and the keys of selected columns.

    Parameters
    ----------
    columns : list of (int, int, bool)
        For each of the 39 columns: its position in a row of keys (-1: not selected), the seed of its field, and whether
        it is a count.
    num_keys : int
        Number of keys in a row.
    small, first, octave : ndarray of int16, int64, int32
        Buckets of counts: those of 0 .. 4095; the first count of each bucket; the bucket of each power of two.
    """

    cdef tok_column columns[TOK_COLUMNS]
    cdef tok_buckets buckets
    cdef object _arrays
    cdef int64_t num_keys

    def __cinit__(self, list columns, int64_t num_keys, const int16_t[::1] small, const int64_t[::1] first,
                  const int32_t[::1] octave):
        cdef int j
        if len(columns) != TOK_COLUMNS or small.shape[0] != TOK_SMALL or octave.shape[0] != TOK_OCTAVES:
            raise ValueError(f"{len(columns)} columns, {small.shape[0]} and {octave.shape[0]} buckets: expected "
                             f"{TOK_COLUMNS}, {TOK_SMALL} and {TOK_OCTAVES}")
        if max(octave) >= first.shape[0] or any(out >= num_keys for out, _, _ in columns):
            raise ValueError(f"a bucket past {first.shape[0]}, or a place past {num_keys}")
        for j, (out, seed, is_count) in enumerate(columns):
            self.columns[j] = tok_column(murmur_hash_null(seed), out, seed, is_count)
        for j in range(TOK_OCTAVES):
            self.buckets.octave[j] = octave[j]
        self.buckets.small, self.buckets.first = &small[0], &first[0]
        self._arrays = (small, first)
        self.num_keys = num_keys

    def tokenize(self, bytes text, bint labelled):
        """Parse a block of whole lines.

        Returns
        -------
        labels : ndarray of float32, shape (n,)
            Labels; an empty array if not `labelled`.
        keys : ndarray of uint64, shape (n, num_keys)
            Keys of the rows.
        odd : ndarray of int64, shape (m, 3)
            Unusual lines: the line's number in the block, counted from 0, its offset, and the row that is reserved for
            it, or -1.
        num_lines : int
            Number of lines in the block.
        """
        _check_lines(text)
        cdef const uint8_t *data = text
        cdef int64_t size = len(text), rows, num_odd, num_lines = tok_count_lines(data, size)
        cdef int64_t most = min(num_lines, tok_criteo_max_rows(size))
        cdef cnp.ndarray labels = np.empty(most if labelled else 0, np.float32)
        cdef cnp.ndarray keys = np.empty((most, self.num_keys), np.uint64)
        cdef cnp.ndarray odd = np.empty((num_lines, 3), np.int64)
        cdef float *to_labels = <float *>cnp.PyArray_DATA(labels)
        cdef uint64_t *to_keys = <uint64_t *>cnp.PyArray_DATA(keys)
        cdef tok_odd *to_odd = <tok_odd *>cnp.PyArray_DATA(odd)
        with nogil:
            rows = tok_criteo(data, size, labelled, self.columns, &self.buckets, self.num_keys, to_labels, to_keys,
                              to_odd, &num_odd)
        return labels[:rows], keys[:rows], odd[:num_odd], num_lines


cdef class FieldTable:
    """A hash table of fields by name, which holds their seeds and numbers them in the order in which they are added.

    Parameters
    ----------
    limit : int
        Maximum number of fields; `tokenize_examples` adds no more.
    """

    cdef object _arrays
    cdef tok_fields c
    cdef int64_t limit

    def __cinit__(self, int64_t limit):
        self.limit = limit
        self.c.secret = int.from_bytes(os.urandom(8), "little") | 1
        self._make_room(4)

    def __len__(self):
        return self.c.count

    cdef _make_room(self, int bits):
        """Move the fields to 2^bits slots."""
        cdef int64_t slot, old_slots = 0 if self._arrays is None else len(self._arrays[0])
        cdef tok_fields old = self.c
        cdef object _kept = self._arrays  # keeps the memory that `old` points to
        cdef int64_t slots = 1 << bits
        self._arrays = (np.zeros(slots, np.uint64), np.full(slots, -1, np.int32), np.zeros(slots, np.uint32),
                        np.empty((slots, 3), np.int64))
        self.c.hashes = <uint64_t *>data_of(self._arrays[0], cnp.NPY_UINT64, "hashes")
        self.c.numbers = <int32_t *>data_of(self._arrays[1], cnp.NPY_INT32, "numbers")
        self.c.seeds = <uint32_t *>data_of(self._arrays[2], cnp.NPY_UINT32, "seeds")
        self.c.names = <tok_name *>data_of(self._arrays[3], cnp.NPY_INT64, "names")
        self.c.shift, self.c.room = 64 - bits, min(slots // 2, self.limit)
        self.c.count = 0
        hashes = np.zeros(old.count, np.uint64)
        for slot in range(old_slots):
            if old.numbers[slot] >= 0:
                hashes[old.numbers[slot]] = old.hashes[slot]
        for slot in range(old.count):
            tok_add_field(&self.c, hashes[slot], old.seeds[slot])

    cdef bint _grow(self) except -1:
        """Grow the table if it is full; return whether there is room for more fields."""
        if self.c.count >= self.c.room and self.c.room < self.limit:
            self._make_room(65 - self.c.shift)
        return self.c.count < self.c.room

    def append(self, bytes name):
        """Add `name`, with the next number."""
        if 2 * self.c.count + 2 > len(self._arrays[0]):
            self._make_room(65 - self.c.shift)
        tok_add_field(&self.c, murmur_hash(name, len(name), 0), mmh3.hash(name, 0, signed=False))

    cdef list _take_new(self, bytes text):
        """Set the seeds of the fields that the parser has added, and return their (line, name)."""
        cdef int64_t i, first = self.c.count - self.c.num_new
        cdef list found = []
        for i in range(self.c.num_new):
            name = text[self.c.names[i].begin : self.c.names[i].begin + self.c.names[i].length]
            self.c.seeds[first + i] = mmh3.hash(name, 0, signed=False)
            found.append((self.c.names[i].line, name))
        return found


def tokenize_examples(bytes text, str format, FieldTable fields, object labels, int64_t max_line_bytes):
    """Parse the examples of a block of whole lines. New fields are added to `fields`.

    Parameters
    ----------
    labels : dict of float to float, or None
        At most four values that a label may have, and their meanings. None: labels are skipped.

    Returns
    -------
    arrays : tuple of ndarray
        Labels (None if `labels` is None), offsets, keys, values, fields (None for libsvm) and weights (None unless the
        format is vw).
    faults : ndarray of int64, shape (m, 4)
        Line, code, and the beginning and length of the offending text.
    names : list of (int, bytes)
        Lines and names of the new fields, in the order of their numbers. If there is one more than `fields` has room
        for, the text was parsed only up to that line.
    """
    cdef tok_rules rules
    cdef tok_examples c
    _check_lines(text)
    if format == "libsvm" and len(fields) == 0:
        raise ValueError("libsvm needs one field")
    if labels is not None and len(labels) > 4:
        raise ValueError(f"at most 4 values of the label, got {len(labels)}")
    rules.format, rules.labelled = FORMATS.index(format), labels is not None
    rules.max_line_bytes, rules.num_labels = max_line_bytes, 0
    for value, meaning in (labels or {}).items():
        rules.label_values[rules.num_labels], rules.label_meanings[rules.num_labels] = value, meaning
        rules.num_labels += 1
    cdef const uint8_t *data = text
    cdef int64_t size = len(text), most_rows = tok_count_lines(data, size)
    arrays = _example_arrays(format, most_rows, tok_max_features(size), labels is not None)
    faults = np.empty((most_rows, 4), np.int64)
    _point_to(&c, arrays)
    c.faults = <tok_fault *>data_of(faults, cnp.NPY_INT64, "faults")
    c.rows = c.num_faults = c.line = c.begin = c.offsets[0] = 0
    cdef list names = []
    while c.begin < size:
        with nogil:
            tok_examples_parse(data, size, &rules, &fields.c, &c)
        names += fields._take_new(text)
        if c.stopped.code == TOK_NEW_FIELD and not fields._grow():
            names.append((c.stopped.line, text[c.stopped.begin : c.stopped.begin + c.stopped.length]))
            break
    return _trimmed(arrays, c.rows, c.offsets[c.rows]), faults[:c.num_faults], names


cdef tuple _example_arrays(str format, int64_t rows, int64_t features, bint labelled):
    return (np.empty(rows, np.float32) if labelled else None, np.empty(rows + 1, np.int64),
            np.empty(features, np.uint64), np.empty(features, np.float32),
            np.empty(features, np.int32) if format != "libsvm" else None,
            np.empty(rows, np.float32) if format == "vw" else None)


cdef int _point_to(tok_examples *c, tuple arrays) except -1:
    c.labels = <float *>data_of(arrays[0], cnp.NPY_FLOAT32, "labels")
    c.offsets = <int64_t *>data_of(arrays[1], cnp.NPY_INT64, "offsets")
    c.keys = <uint64_t *>data_of(arrays[2], cnp.NPY_UINT64, "keys")
    c.values = <float *>data_of(arrays[3], cnp.NPY_FLOAT32, "values")
    c.fields = <int32_t *>data_of(arrays[4], cnp.NPY_INT32, "fields")
    c.weights = <float *>data_of(arrays[5], cnp.NPY_FLOAT32, "weights")
    return 0


cdef tuple _trimmed(tuple arrays, int64_t rows, int64_t features):
    """Copy the filled parts of the arrays: otherwise the unused memory would be held as long as the batches."""
    labels, offsets, keys, values, fields, weights = arrays
    return (None if labels is None else labels[:rows].copy(), offsets[:rows + 1].copy(), keys[:features].copy(),
            values[:features].copy(), None if fields is None else fields[:features].copy(),
            None if weights is None else weights[:rows].copy())
