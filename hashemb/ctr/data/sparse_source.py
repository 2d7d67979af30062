r"""Text formats with any number of features per line: libsvm, libffm and Vowpal Wabbit.

Their lines are ``y index:value``, ``y field:index:value`` and ``y importance 'tag|namespace:scale feature:value``.

A feature's key is the hash of its index (an integer; libsvm, libffm) or of the bytes of its name (Vowpal Wabbit),
salted by its field or namespace; libsvm has no fields, and no salt. Fields are numbered in order of appearance, and the
schema keeps them in that order. All parsing is done in C; this module adds new fields and describes parse errors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hashemb._text import shown
from hashemb.ctr.data import _tokens
from hashemb.ctr.data.batches import Batch
from hashemb.ctr.data.columns import Options
from hashemb.ctr.data.fields import Kind
from hashemb.ctr.data.labels import choose_label_values
from hashemb.ctr.data.source import Reject
from hashemb.ctr.data.streams import Stream, line_blocks

__all__ = ["ExampleFormat", "ExampleSource", "recognise"]

ExampleFormat = Literal["libsvm", "libffm", "vw"]

MAX_LINE_BYTES = 1 << 24
MAX_FIELDS = 1 << 16
_BLOCK_BYTES = 1 << 18
_HEAD_BYTES = 1 << 18
_HEAD_LINES = 1000
_LABEL = "label"
_KINDS: dict[ExampleFormat, Kind] = {"libsvm": "integer", "libffm": "integer", "vw": "string"}
_SNIFF_LINES = 100
# Each pattern matches a text in only one way: with two, a line that fails at its end would take 2^features attempts.
_NUMBER = re.compile(rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_WORD = _NUMBER.pattern
_LINES: dict[ExampleFormat, re.Pattern[bytes]] = {
    "libffm": re.compile(rb"%b(?:[ \t]+[^\s:]+:-?\d+:%b)+\s*(?:#.*)?$" % (_WORD, _WORD)),
    "libsvm": re.compile(rb"%b(?:[ \t]+-?\d+:%b)+\s*(?:#.*)?$" % (_WORD, _WORD)),
    "vw": re.compile(rb"%b(?:[ \t]+[^\s|]+)*[ \t]*\|[^\s|]*[ \t]+[^\s|]" % _WORD),
}
_MEANINGS = {-1.0: 0.0, 0.0: 0.0, 1.0: 1.0}

# Messages by the error codes of csrc/tokens.h; {} is replaced by the offending text.
_FAULTS = (
    "",
    "empty line",
    f"line is longer than {MAX_LINE_BYTES} bytes",
    "no '|' in the line",
    "no label",
    "label must be {label}, found {}",
    "importance must be a number >= 0, found {}",
    "expected a label and an importance before the first '|', found {}",
    "scale of a namespace must be a finite number, found {}",
    "a feature without a name: {}",
    "expected index:value, found {}",
    "expected field:index:value, found {}",
    "index must be an integer of at most 18 digits, found {}",
    "value must be a finite number, found {}",
    "not UTF-8 in the name of a field: {}",
)

Faults = npt.NDArray[np.int64]


class _Head(NamedTuple):
    """Statistics of the first lines of an input."""

    labelled: bool
    words: Counter[str]  # the first word of each labelled line


class ExampleSource:
    """A stream of lines in one of these formats; most of the first lines determine whether there are labels."""

    def __init__(self, stream: Stream, format: ExampleFormat, options: Options) -> None:
        if options.label not in (None, _LABEL) and options.schema is None:
            raise ValueError(f"{stream.name}: a {format} file has no column {options.label!r} for the label")
        named = [*options.numeric, *options.categorical]
        if named:
            raise ValueError(f"{stream.name}: a {format} file has no column {named[0]!r} to choose a kind for")
        self.name, self._format = stream.name, format
        self.format: str = format
        self._stream = stream
        text = _whole_lines(stream.peek(_HEAD_BYTES))
        head = _look_at(text, format)
        self.label = _LABEL if head.labelled else None
        self.label_values = options.label_values
        if head.labelled and options.schema is None and options.label_values is None:
            where = f"{self.name}: the label"
            self.label_values = choose_label_values(where, head.words, options.positive, ("-1", "0", "1"))
        self._meanings = self._label_meanings() if head.labelled else None
        fields = options.schema or ([""] if format == "libsvm" else [])
        self.schema: dict[str, Kind] = dict.fromkeys(fields, _KINDS[format])
        self._parse(text, 1, self.schema, _field_table(self.schema), lambda line, reason: None)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as stored, that have been read so far."""
        return self._stream.bytes_read

    def accepts(self, field: str, kind: Kind) -> bool:
        """Return whether the field can be read as `kind`."""
        return kind == _KINDS[self._format]

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def batches(self, schema: dict[str, Kind], reject: Reject) -> Iterator[Batch]:
        """Yield the good examples in order; pass other lines to `reject`, and append new fields to `schema`."""
        first_line = 1
        fields = _field_table(schema)
        for block in line_blocks(self._stream, block_bytes=_BLOCK_BYTES, max_line_bytes=MAX_LINE_BYTES):
            yield self._parse(block, first_line, schema, fields, reject)
            first_line += block.count(b"\n")

    def _label_meanings(self) -> dict[float, float]:
        if self.label_values is None:
            return _MEANINGS
        try:
            return {float(text): float(meaning) for meaning, text in enumerate(self.label_values)}
        except ValueError:
            found = " and ".join(shown(text) for text in self.label_values)
            raise ValueError(f"{self.name}: labels of a {self.format} file are numbers, not {found}") from None

    def _parse(
        self, block: bytes, first_line: int, schema: dict[str, Kind], fields: _tokens.FieldTable, reject: Reject
    ) -> Batch:
        """Parse the examples of a block; append new fields to `schema`."""
        arrays, faults, names = _tokens.tokenize_examples(block, self.format, fields, self._meanings, MAX_LINE_BYTES)
        self._reject(block, faults, first_line, reject)
        for line, name in names:
            if len(schema) >= MAX_FIELDS:
                found = shown(name)
                raise ValueError(f"{self.name}:{first_line + line}: more than {MAX_FIELDS} fields, {found} among them")
            schema[name.decode()] = _KINDS[self._format]
        return Batch(arrays[0], arrays[2], arrays[1], *arrays[3:])

    def _reject(self, block: bytes, faults: Faults, first_line: int, reject: Reject) -> None:
        label = "-1, 0 or 1" if self.label_values is None else " or ".join(self.label_values)
        for line, code, begin, length in faults.tolist():
            found = shown(block[begin : begin + length])
            reject(first_line + line, _FAULTS[code].format(found, label=label))


def _field_table(schema: Iterable[str]) -> _tokens.FieldTable:
    table = _tokens.FieldTable(MAX_FIELDS)
    for name in schema:
        table.append(name.encode())
    return table


def recognise(head: bytes) -> ExampleFormat | None:
    """Return the format that fits the first line and most of the first 100, with labels and features, or None."""
    lines = _whole_lines(head).split(b"\n")[:_SNIFF_LINES]
    lines = [line for line in lines if line.strip() and not line.startswith(b"#")]
    for format, pattern in _LINES.items():
        matches = [pattern.match(line) is not None for line in lines]
        if matches and matches[0] and 2 * sum(matches) > len(lines):
            return format
    return None


def _whole_lines(head: bytes) -> bytes:
    """Return the complete lines in `head`, or all of it if it has none."""
    text = head.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    return text[: text.rfind(b"\n") + 1] or text + b"\n"


def _look_at(text: bytes, format: ExampleFormat) -> _Head:
    lines = [line for line in text.split(b"\n")[:_HEAD_LINES] if line.strip() and not _is_comment(line, format)]
    labels = [_label_word(line, format) for line in lines]
    words = Counter(word.decode("ascii") for word in labels if word is not None and _NUMBER.fullmatch(word))
    return _Head(2 * labels.count(None) <= len(labels), words)


def _is_comment(line: bytes, format: ExampleFormat) -> bool:
    return format != "vw" and line.lstrip().startswith(b"#")


def _label_word(line: bytes, format: ExampleFormat) -> bytes | None:
    """Return the word at the label's position, by the rules of csrc/tokens_examples.c."""
    if format == "vw":
        head, _, _ = line.partition(b"|")
        words = head.split()
        if words and (not head[-1:].isspace() or words[-1].startswith(b"'")):
            words.pop()
    else:
        words = [word for word in line.split(None, 1)[:1] if b":" not in word]
    return words[0] if words else None
