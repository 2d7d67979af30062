"""Convert the errors that libraries raise for a damaged file to one kind, which names the file and suggests a remedy.

PyArrow reports damage with a dozen types of exceptions, depending on what it was doing: for example a missing key,
index or conversion, or a lack of memory. The readers' own errors begin with the name of the file and are not changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hashemb._packages import require
from hashemb._text import printable

__all__ = ["naming_the_file"]

_FORMATS = {"csv": "CSV", "parquet": "Parquet", "criteo": "Criteo lines", "vw": "Vowpal Wabbit text"}
_COMPRESSED = ("gzip", "zstd", "bz2")


@contextmanager
def naming_the_file(name: str, format: str) -> Iterator[None]:
    """Convert exceptions that the contents of the file `name` cause to a ValueError that begins with that name.

    Raises
    ------
    ValueError
        Replaces all exceptions of PyArrow, and those of Python and NumPy that invalid contents cause.
    OSError
        An error of the operating system; the file name is added if it is missing.
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
    return "damaged, or in another format: specify it with format="
