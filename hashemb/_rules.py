"""Rules for the values of file fields and hyper-parameters, each with a description for messages.

A checksum does not make content trustworthy, as an edited file can get a matching one. Every decoder therefore has a
table, field -> rule, and checks everything that it has read before using any of it. Rules accept any value whatsoever
and never raise. True is not an integer here; NaN, infinities and integers beyond the range of floats are not numbers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashemb.errors import CorruptTableError, FormatError

MAX_BYTES = (1 << 63) - 1  # largest file size
MAX_EPOCH = (1 << 32) - 1
LARGEST, SMALLEST = 1e30, 1e-30  # of factors and divisors in the kernels, in float32, which ends at 3.4e38


def shown(value: Any, limit: int = 80) -> str:
    """Return a value for a message: printable ASCII of bounded length, however large the value is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return f"{value[: limit // 2]!a} and {len(value) - limit // 2} more"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    text = repr(float(value)).replace("e+", "e") if isinstance(value, float) else ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


@dataclass(frozen=True)
class Rule:
    """A condition on a value: its description, to follow "expected", and a predicate."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Whole:
    """The rule for an integer from `low` to `high`."""

    low: int
    high: int

    @property
    def words(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def holds(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


def number(low: float, high: float) -> Rule:
    """Return the rule for a finite number from `low` to `high`."""
    words = f"a number from {low:g} to {high:g}".replace("e+", "e")
    return Rule(words, lambda value: type(value) in (int, float) and low <= value <= high)


def one_of(*texts: str) -> Rule:
    return Rule(" or ".join(map(repr, texts)), lambda value: type(value) is str and value in texts)


def hexadecimal(digits: int) -> Rule:
    pattern = re.compile(rf"[0-9a-f]{{{digits}}}")
    return Rule(f"{digits} hexadecimal digits", lambda v: type(v) is str and pattern.fullmatch(v) is not None)


def optional(rule: Rule, nothing: Any = None) -> Rule:
    """Return a rule that accepts what `rule` accepts, or `nothing`."""
    return Rule(f"{rule.words}, or {nothing!r}", lambda v: (type(v) is type(nothing) and v == nothing) or rule.holds(v))


def list_of(most: int, what: str) -> Rule:
    return Rule(f"a list of up to {most} {what}", lambda value: type(value) is list and len(value) <= most)


FLAG = Whole(0, 1)
EPOCH = Whole(1, MAX_EPOCH)
EPOCH_OR_NONE = Whole(0, MAX_EPOCH)
SEQUENCE = Whole(0, MAX_EPOCH)  # a point in time takes an epoch
COUNTER = Whole(0, (1 << 63) - 1)
RATE = number(0.0, LARGEST)  # for any optimiser; `optim.with_rate` checks the limits of each
DECAY_TOTAL = Rule("a finite number, 0 or less", number(-sys.float_info.max, 0.0).holds)
TIME = number(-62135596800, 253402300799)  # the years 1 to 9999, in seconds since 1970
ID = hexadecimal(32)
SHA256 = hexadecimal(64)
LINE = Rule("a printable text of up to 256 characters", lambda v: type(v) is str and len(v) <= 256 and v.isprintable())
BOOL = Rule("true or false", lambda value: type(value) is bool)
OBJECT = Rule("an object", lambda value: type(value) is dict)


def check_fields(content: Mapping[str, Any], rules: Mapping[str, Rule | Whole], filename: str, where: str = "") -> None:
    """Raise `FormatError` unless the fields are exactly these, `CorruptTableError` unless each satisfies its rule."""
    for name, rule in rules.items():
        if name not in content:
            raise FormatError(f"{filename}: this version cannot read it: expected a field {where}{name}, found none")
        expect(rule.holds(content[name]), filename, f"{where}{name} to be {rule.words}", content[name])
    unknown = [name for name in content if name not in rules]
    if unknown:
        extra = f"{where}{shown(unknown[0])}"
        raise FormatError(f"{filename}: this version cannot read it: expected no other fields, found {extra}")


def expect(is_so: bool, filename: str, expected: str, found: Any) -> None:
    """Raise `CorruptTableError` with `expected` and `found` unless `is_so`."""
    if not is_so:
        raise CorruptTableError(f"{filename}: expected {expected}, found {shown(found)}")


# ---- hyper-parameters ----


def hyper_parameter(owner: str, name: str, value: Any, low: float, *, zero: bool = True) -> float:
    """Return a number from `low` to `LARGEST`, or 0 if `zero`, as a Python number; else raise a type or value error."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{owner}: {name} must be a float, got {type(value).__name__} {shown(value)}")
    number = value if type(value) is int or type(value) is float else float(value)
    if not (low <= number <= LARGEST or (zero and number == 0)):
        least = "0 and" if low == 0 else f"{shown(low)} and"
        span = f"{'0 or ' if zero and low else ''}between {least} {shown(LARGEST)}"
        reason = "the kernels compute in float32, which ends at 3.4e38"
        raise ValueError(f"{owner}: {name} must be {span} ({reason}), got {shown(number)}")
    return number
