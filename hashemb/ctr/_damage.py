"""What libraries raise over the contents of a file -> one kind of error, which names the file and says what to do.

PyArrow reports damage in a dozen ways, by what it was doing when it met it: a key, an index, memory or a conversion
that is not there. The readers' own errors begin with the name of the file, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hashemb.ctr._extras import require
from hashemb.ctr._printable import printable

__all__ = ["naming_the_file"]

_FORMATS = {"csv": "CSV", "parquet": "Parquet", "criteo": "Criteo lines", "vw": "Vowpal Wabbit text"}
_COMPRESSED = ("gzip", "zstd", "bz2")


@contextmanager
def naming_the_file(name: str, format: str) -> Iterator[None]:
    """Raise what the contents of the file `name` bring about as a ValueError that begins with that name.

    Raises
    ------
    ValueError
        In the place of every exception of PyArrow's, and of those of Python's and NumPy's that wrong contents lead to.
    OSError
        From the operating system, with the name where it had none.
    """
    contents = (ValueError, LookupError, ArithmeticError, MemoryError, NotImplementedError)
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise _unreadable(name, format, error) from error
        if error.filename is None:
            raise OSError(error.errno, error.strerror, name) from error
        raise
    except (*contents, require("pyarrow").ArrowException) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{name}:"):
            raise
        raise _unreadable(name, format, error) from error


def _unreadable(name: str, format: str, error: BaseException) -> ValueError:
    text = printable(" ".join(str(error).split())) or type(error).__name__
    what = f"{format} data" if format in _COMPRESSED else _FORMATS.get(format, format)
    return ValueError(f"{name}: not readable as {what} ({_advice(format, text)}): {text}")


def _advice(format: str, text: str) -> str:
    if format in _COMPRESSED:
        return "damaged, or it ends early: copy it again"
    if "straddling" in text:
        return "a quote that is never closed?"
    if format == "parquet":
        return "damaged, or it ends early: copy or write it again"
    return "damaged, or in another format? format= says which"
