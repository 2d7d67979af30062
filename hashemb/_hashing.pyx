"""Hash columns of values to uint64 keys: wrappers over csrc/murmur.h, hash_columns.h and hash_arrow.h.

Each function fills `out`, with any stride, and returns nothing.
"""

import numpy as np

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_AsUnsignedLongLong, PyLong_Check
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.unicode cimport PyUnicode_Check
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size_bytes) except NULL

cdef extern from "murmur.h":
    uint64_t murmur_hash_word(uint64_t word, uint32_t seed) noexcept nogil
    uint64_t murmur_hash_null(uint32_t seed) noexcept nogil
    uint64_t murmur_hash(const uint8_t *data, size_t size_bytes, uint32_t seed) noexcept nogil

cdef extern from "hash_columns.h":
    const int64_t HASH_OK
    void c_hash_integers "hash_integers"(
        const uint8_t *raw, int width, bint is_signed, int64_t n, uint32_t seed, uint64_t *out,
        Py_ssize_t stride) noexcept nogil
    void c_hash_fixed_bytes "hash_fixed_bytes"(
        const uint8_t *raw, size_t width, int64_t n, uint32_t seed, uint64_t *out,
        Py_ssize_t stride) noexcept nogil
    int64_t c_hash_fixed_ucs4 "hash_fixed_ucs4"(
        const uint8_t *raw, size_t width, int64_t n, uint32_t seed, uint8_t *scratch, uint64_t *out,
        Py_ssize_t stride) noexcept nogil

cdef extern from "hash_arrow.h":
    struct ArrowSchema:
        void (*release)(ArrowSchema *) noexcept
    struct ArrowArray:
        int64_t length
        void (*release)(ArrowArray *) noexcept
    struct ArrowArrayStream:
        int (*get_schema)(ArrowArrayStream *, ArrowSchema *) noexcept
        int (*get_next)(ArrowArrayStream *, ArrowArray *) noexcept
        const char *(*get_last_error)(ArrowArrayStream *) noexcept
    bint arrow_is_supported(const ArrowSchema *schema) noexcept nogil
    int64_t arrow_num_distinct(const ArrowArray *array) noexcept nogil
    int64_t arrow_hash(const ArrowSchema *schema, const ArrowArray *array, uint64_t *distinct, uint32_t seed,
                       uint64_t *out, Py_ssize_t stride) noexcept nogil


cdef inline Py_ssize_t _stride(uint64_t[:] out) noexcept:
    return out.strides[0] // <Py_ssize_t>sizeof(uint64_t)


cdef int _check_size(const uint8_t[::1] raw, Py_ssize_t width_bytes, uint64_t[:] out) except -1:
    if width_bytes <= 0 or raw.shape[0] != width_bytes * out.shape[0]:
        raise ValueError(f"{raw.shape[0]} bytes are not {out.shape[0]} values of {width_bytes} bytes")
    return 0


cdef int _raise_not_unicode(Py_ssize_t position) except -1:
    raise ValueError(f"the string at position {position} is not valid Unicode: it has a lone surrogate or a"
                     " code point past U+10FFFF, so it has no UTF-8 bytes to hash")


def hash_integers(const uint8_t[::1] raw, Py_ssize_t width_bytes, bint is_signed, uint32_t seed,
                  uint64_t[:] out):
    """Hash native-order integers of 1, 2, 4 or 8 bytes, given as raw bytes."""
    _check_size(raw, width_bytes, out)
    if width_bytes not in (1, 2, 4, 8):
        raise ValueError(f"integers have 1, 2, 4 or 8 bytes, got {width_bytes}")
    if out.shape[0] == 0:
        return
    cdef Py_ssize_t stride = _stride(out)
    with nogil:
        c_hash_integers(&raw[0], <int>width_bytes, is_signed, out.shape[0], seed, &out[0], stride)


def hash_fixed_bytes(const uint8_t[::1] raw, Py_ssize_t width_bytes, uint32_t seed, uint64_t[:] out):
    """Hash byte strings of a fixed width without their trailing NULs: NumPy's dtype `S`."""
    _check_size(raw, width_bytes, out)
    if out.shape[0] == 0:
        return
    cdef Py_ssize_t stride = _stride(out)
    with nogil:
        c_hash_fixed_bytes(&raw[0], width_bytes, out.shape[0], seed, &out[0], stride)


def hash_fixed_ucs4(const uint8_t[::1] raw, Py_ssize_t width_chars, uint32_t seed, uint64_t[:] out):
    """Hash the UTF-8 of native-order UCS-4 strings of a fixed width: NumPy's dtype `U`."""
    _check_size(raw, 4 * width_chars, out)
    if out.shape[0] == 0:
        return
    cdef uint8_t[::1] scratch = np.zeros(4 * width_chars + 16, np.uint8)
    cdef Py_ssize_t stride = _stride(out)
    cdef int64_t status
    with nogil:
        status = c_hash_fixed_ucs4(&raw[0], width_chars, out.shape[0], seed, &scratch[0], &out[0], stride)
    if status != HASH_OK:
        _raise_not_unicode(status)


cdef uint64_t _hash_text(object text, Py_ssize_t position, uint32_t seed) except? 1:
    cdef Py_ssize_t size_bytes = 0
    cdef const char *data = NULL
    try:
        data = PyUnicode_AsUTF8AndSize(text, &size_bytes)
    except UnicodeEncodeError:
        _raise_not_unicode(position)
    return murmur_hash(<const uint8_t *>data, size_bytes, seed)


cdef int _raise_too_large(object value, Py_ssize_t position) except -1:
    # Python raises an error when it has to print integers of thousands of digits.
    shown = value if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"
    raise OverflowError(f"{shown} at position {position} does not fit in 64 bits: integers must be in"
                        " [-2**63, 2**64)")


cdef uint64_t _hash_integer(object value, Py_ssize_t position, uint32_t seed) except? 1:
    cdef int overflow
    cdef long long word = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow == 0:
        return murmur_hash_word(<uint64_t>word, seed)
    if overflow < 0 or value.bit_length() > 64:
        _raise_too_large(value, position)
    return murmur_hash_word(PyLong_AsUnsignedLongLong(value), seed)


cdef bint _is_missing(object value):
    if isinstance(value, (float, np.floating)):
        return value != value
    kind = type(value)
    return kind.__name__ in ("NAType", "NaTType") and kind.__module__.startswith("pandas.")


cdef uint64_t _hash_other(object value, Py_ssize_t position, uint32_t seed) except? 1:
    if isinstance(value, np.bool_):
        return murmur_hash_word(<uint64_t>bool(value), seed)
    if hasattr(type(value), "__index__") and not (isinstance(value, np.ndarray) and value.ndim > 0):
        return _hash_integer(value.__index__(), position, seed)
    if _is_missing(value):
        return murmur_hash_null(seed)
    raise TypeError(f"cannot hash the {type(value).__name__} at position {position}: values are integers,"
                    " strings, bytes or missing; bin floats (numpy.digitize) or cast other types to integers"
                    " or strings")


cdef inline uint64_t _hash_object(object value, Py_ssize_t position, uint32_t seed) except? 1:
    if PyUnicode_Check(value):
        return _hash_text(value, position, seed)
    if PyLong_Check(value):
        return _hash_integer(value, position, seed)
    if PyBytes_Check(value):
        return murmur_hash(<const uint8_t *>PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), seed)
    if value is None:
        return murmur_hash_null(seed)
    return _hash_other(value, position, seed)


@cython.boundscheck(True)
def hash_objects(object values not None, uint32_t seed, uint64_t[:] out):
    """Hash Python objects in a list or a tuple: str, bytes, integers, None, and NaN, NA and NaT as missing.

    The bounds of `values` are checked at every element, because an object's `__index__` may shorten the list.
    """
    cdef Py_ssize_t i
    if len(values) != out.shape[0]:
        raise ValueError(f"{len(values)} values do not fill {out.shape[0]} keys")
    for i in range(out.shape[0]):
        out[i] = _hash_object(values[i], i, seed)


cdef int _check_arrow_type(const ArrowSchema *schema, str unsupported) except -1:
    if not arrow_is_supported(schema):
        raise TypeError(unsupported)
    return 0


cdef int _hash_arrow_chunk(const ArrowSchema *schema, const ArrowArray *array, uint32_t seed, uint64_t[:] out,
                           Py_ssize_t start) except -1:
    if array.length > out.shape[0] - start:
        raise ValueError(f"{start + array.length} values or more do not fit {out.shape[0]} keys")
    if array.length == 0:
        return 0
    cdef uint64_t[::1] distinct = np.empty(arrow_num_distinct(array) + 1, np.uint64)
    cdef Py_ssize_t stride = _stride(out)
    cdef int64_t status
    with nogil:
        status = arrow_hash(schema, array, &distinct[0], seed, &out[start], stride)
    if status != HASH_OK:
        raise ValueError(f"not a valid Arrow array: the offsets or the dictionary code at position"
                         f" {start + status} point outside its buffers")
    return 0


def hash_arrow_array(object schema_capsule, object array_capsule, uint32_t seed, uint64_t[:] out,
                     str unsupported):
    """Hash one array of the Arrow C data interface (as returned by `__arrow_c_array__`).

    `unsupported` is the message of the TypeError for types that cannot be hashed.
    """
    cdef ArrowSchema *schema = <ArrowSchema *>PyCapsule_GetPointer(schema_capsule, "arrow_schema")
    cdef ArrowArray *array = <ArrowArray *>PyCapsule_GetPointer(array_capsule, "arrow_array")
    _check_arrow_type(schema, unsupported)
    _hash_arrow_chunk(schema, array, seed, out, 0)
    if array.length != out.shape[0]:
        raise ValueError(f"an Arrow array of {array.length} values does not fill {out.shape[0]} keys")


cdef int _raise_stream_error(ArrowArrayStream *stream, int code) except -1:
    cdef const char *reason = stream.get_last_error(stream)
    raise OSError(code, "the Arrow stream failed" if reason == NULL else reason.decode("utf-8", "replace"))


cdef Py_ssize_t _hash_arrow_chunks(ArrowArrayStream *stream, const ArrowSchema *schema, uint32_t seed,
                                   uint64_t[:] out) except -1:
    cdef ArrowArray chunk
    cdef Py_ssize_t done = 0
    cdef int code
    while True:
        code = stream.get_next(stream, &chunk)
        if code != 0:
            _raise_stream_error(stream, code)
        if chunk.release == NULL:  # the stream has ended
            return done
        try:
            _hash_arrow_chunk(schema, &chunk, seed, out, done)
            done += chunk.length
        finally:
            chunk.release(&chunk)


def hash_arrow_stream(object stream_capsule, uint32_t seed, uint64_t[:] out, str unsupported):
    """Hash the chunks of an Arrow C stream (as returned by `__arrow_c_stream__`), one after the other."""
    cdef void *pointer = PyCapsule_GetPointer(stream_capsule, "arrow_array_stream")
    cdef ArrowArrayStream *stream = <ArrowArrayStream *>pointer
    cdef ArrowSchema schema
    cdef int code = stream.get_schema(stream, &schema)
    cdef Py_ssize_t done
    if code != 0:
        _raise_stream_error(stream, code)
    try:
        _check_arrow_type(&schema, unsupported)
        done = _hash_arrow_chunks(stream, &schema, seed, out)
    finally:
        schema.release(&schema)
    if done != out.shape[0]:
        raise ValueError(f"an Arrow stream of {done} values does not fill {out.shape[0]} keys")
