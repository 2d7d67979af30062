"""Read the bytes of one input: open, decompress and count them, and cut them into blocks of whole lines.

Compression is recognised by the first bytes of the data, so it works for standard input and for misnamed files.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from hashemb._packages import require
from hashemb.ctr.data.damage import naming_the_file

__all__ = ["STDIN", "Stream", "file_size", "is_stream", "line_blocks", "without_compression_suffix"]

STDIN = "-"
_MAGIC_BYTES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_READ_BYTES = 1 << 18


def file_size(path: str) -> int | None:
    """Return the size of a regular file; None for standard input and pipes, whose size is unknown until their end."""
    if path == STDIN:
        return None
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is standard input or a pipe, which can be read only once and has no position to resume."""
    return os.fspath(path) == STDIN or stat.S_ISFIFO(os.stat(path).st_mode)


def without_compression_suffix(name: str) -> str:
    """Return `name` without the suffix of a compression format.

    >>> without_compression_suffix("clicks.csv.gz"), without_compression_suffix("clicks.csv")
    ('clicks.csv', 'clicks.csv')
    """
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _SUFFIXES else name


class _Peekable:
    """A source of bytes whose next ones can be seen before they are read."""

    _ahead = b""

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes (fewer at the end) without consuming them."""
        while len(self._ahead) < size and (more := self._fetch(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def _take(self, size: int) -> bytes:
        """Consume at most `size` of the bytes that have been seen; b"" if there are none."""
        taken, self._ahead = self._ahead[:size], self._ahead[size:]
        return taken

    def _fetch(self, size: int) -> bytes:
        """Read about `size` more bytes; b"" at the end."""
        raise NotImplementedError


class _CountedFile(_Peekable):
    """A binary file that counts the bytes read from it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.bytes_read = 0
        self.closed = False

    def read(self, size: int = _READ_BYTES) -> bytes:
        """Return at most `size` bytes; b"" at the end."""
        data = self._take(size) or self._fetch(size)
        self.bytes_read += len(data)
        return data

    def _fetch(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        return data

    def readable(self) -> bool:
        """Return True, as PyArrow requires."""
        return True

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        if not self.closed:  # PyArrow closes the file again on release, maybe as Python exits
            self.closed = True
            if self._file is not sys.stdin.buffer:
                self._file.close()


class Stream(_Peekable):
    """The decompressed bytes of a file, or of standard input if `path` is ``-``.

    It is a file-like object (`read`, `readable`, `closed`, `close`), as PyArrow's CSV reader requires.

    Raises
    ------
    ValueError
        The file is named .gz, .zst or .bz2 but has another format; or, from `read`, the compressed data is damaged or
        truncated. The message names the file.
    """

    def __init__(self, path: str) -> None:
        self.name = "<stdin>" if path == STDIN else path
        self._stored = _CountedFile(sys.stdin.buffer if path == STDIN else io.FileIO(path))
        self.size_bytes = file_size(path)
        try:
            self.codec = self._recognise(path)
        except BaseException:
            self._stored.close()
            raise
        self._plain: Any = None
        if self.codec is not None:
            pa = require("pyarrow")
            self._plain = pa.CompressedInputStream(pa.PythonFile(self._stored, mode="r"), self.codec)

    def _recognise(self, path: str) -> str | None:
        start = self._stored.peek(4)
        codec = next((codec for magic, codec in _MAGIC_BYTES.items() if start.startswith(magic)), None)
        named = _SUFFIXES.get(os.path.splitext(path)[1].lower())
        if named is not None and start and codec != named:
            raise ValueError(f"{path}: named as {named} data, but it starts with the bytes {start!r}")
        return codec

    @property
    def bytes_read(self) -> int:
        """Bytes read from the file as stored, that is, before decompression."""
        return self._stored.bytes_read

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._stored.closed

    def readable(self) -> bool:
        """Return True, as PyArrow requires."""
        return True

    def read(self, size: int = _READ_BYTES) -> bytes:
        """Return `size` bytes, fewer only at the end: a parser of blocks must not take part of a line for a line."""
        parts = [self._take(size)]
        missing = size - len(parts[0])
        while missing > 0 and (part := self._read_plain(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _fetch(self, size: int) -> bytes:
        return self._read_plain(max(size, _READ_BYTES))

    def _read_plain(self, size: int) -> bytes:
        if self.codec is None:
            return self._stored.read(size)
        with naming_the_file(self.name, self.codec):
            data: bytes = self._plain.read(size)
        return data

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        self._stored.close()


def line_blocks(stream: Stream, *, block_bytes: int, max_line_bytes: int) -> Iterator[bytes]:
    r"""Cut `stream` into blocks of whole lines, each block ending in ``\n``.

    A byte-order mark at the very start is dropped and ``\r\n`` becomes ``\n``. The part of a line beyond
    `max_line_bytes` may be dropped, but enough is kept to detect that the line is too long: memory is bounded by
    ``block_bytes + max_line_bytes`` for any input.
    """
    if stream.peek(3) == b"\xef\xbb\xbf":
        stream.read(3)
    rest = b""
    while data := stream.read(block_bytes):
        cut = data.rfind(b"\n") + 1
        if cut:
            yield _unix(b"".join((rest, memoryview(data)[:cut])))
            rest = b""
        rest = (rest + data[cut:])[: max_line_bytes + 2]  # room for one \r and one byte too many
    if rest:
        yield _unix(rest + b"\n")


def _unix(block: bytes) -> bytes:
    return block.replace(b"\r\n", b"\n") if b"\r" in block else block
