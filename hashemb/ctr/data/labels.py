"""Labels: find their column, choose the values that mean 0 and 1, and convert columns of values to float32 labels.

By default, 0 and 1 (as numbers, booleans or text) mean themselves, and of any other two values the one that sorts
second means 1, as in scikit-learn: numbers are sorted by size, text by its characters. The value that means 1 is, for
example, 1 for -1 and 1, 2 for 1 and 2, "yes" for "no" and "yes", and ">50K" for "<=50K" and ">50K".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._text import shown
from hashemb.ctr.data.columns import Fault, LabelValues, Options

__all__ = [
    "choose_label_values",
    "find_label",
    "first_label_values",
    "is_missing",
    "parse_labels",
]

_LABEL_NAMES = ("label", "click")
_STANDARD = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
_MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}
_RARE = 100  # with two other values, a value this rare (or that occurs once) is malformed
_SHOWN_VALUES = 10


def is_missing(text: str) -> bool:
    """Return whether `text` denotes a missing value: empty, ?, NA, N/A, NaN, null or None."""
    return text.strip().lower() in _MISSING


def find_label(
    name: str, columns: Sequence[str], first_values: Callable[[str], Any], wanted: str | None, fields: Collection[str]
) -> str | None:
    """Find the label column, by the rule of `open_reader`; `fields` are those of a given schema, if any.

    `first_values` returns the first values of a column.
    """
    if wanted is not None:
        if wanted in fields:
            raise ValueError(f"{name}: {wanted!r} is named as the label and as a field of the schema")
        if wanted not in columns and not fields:
            raise ValueError(f"{name}: no column {wanted!r} for the label; it has {', '.join(columns)}")
        return wanted if wanted in columns else None
    for usual in _LABEL_NAMES:
        for column in columns:
            if column.lower() == usual and column not in fields:
                return column
    if fields or not columns:
        return None
    labels, faults = parse_labels(first_values(columns[0]), None)
    return columns[0] if len(labels) and not faults else None


def choose_label_values(
    where: str, counts: Mapping[Any, int], positive: str | None, standard: Iterable[str] = _STANDARD
) -> LabelValues | None:
    """Choose which two of the first values of a label column mean 0 and 1; None for `standard` values like 0 and 1.

    Parameters
    ----------
    where : str
        File and column, for messages.
    counts : mapping of value to int
        Values, of any type, and the number of occurrences of each.
    positive : str, optional
        The value that means 1.

    Raises
    ------
    ValueError
        There are more than two values, only one that has no standard meaning, or none of them is `positive`.
    """
    own_meaning = {_identity(text) for text in standard}
    pair = _two_values(where, counts, own_meaning)
    if positive is not None:
        others = [text for text in pair if _identity(text) != _identity(positive)]
        if len(pair) != 2 or len(others) != 1:
            raise ValueError(f"{where} holds {_listed(pair)}, so {positive!r} can't be its positive value of two")
        return others[0], positive
    if all(_identity(text) in own_meaning for text in pair):
        return None
    if len(pair) != 2:
        raise ValueError(f"{where} holds only {_listed(pair)} so far; two values are needed to learn from")
    pair.sort(key=lambda text: (number, "") if (number := _number(text)) is not None else (math.inf, text))
    return pair[0], pair[1]


def first_label_values(name: str, label: str | None, column: Any, options: Options) -> LabelValues | None:
    """Apply `choose_label_values` to the first values of an Arrow column, unless there is nothing to infer."""
    if label is None or options.label_values is not None or options.schema is not None:
        return options.label_values
    counted = column.value_counts()
    values = counted.field("values").to_pylist()
    counts = Counter(dict(zip(values, counted.field("counts").to_pylist(), strict=True)))
    return choose_label_values(f"{name}: the label column {label!r}", counts, options.positive)


def _two_values(where: str, counts: Mapping[Any, int], own_meaning: set[object]) -> list[str]:
    """Return the frequent values as text, two at most; if there are two others, a rare value is not a label."""
    seen: Counter[object] = Counter()
    texts: dict[object, str] = {}
    for value, count in counts.items():
        text = _text(value)
        if text is not None and not is_missing(text):
            seen[_identity(text)] += count
            texts.setdefault(_identity(text), text)
    ranked = sorted(seen, key=lambda value: (-seen[value], value not in own_meaning))
    rare = max(1, sum(seen.values()) // _RARE)
    is_clear = len(ranked) < 3 or seen[ranked[1]] > seen[ranked[2]] or own_meaning.issuperset(ranked[:2])
    if len(ranked) > 2 and (seen[ranked[2]] > rare or not is_clear):
        raise ValueError(f"{where} has more than two values: {_listed([texts[value] for value in ranked])}")
    return [texts[value] for value in ranked[:2]]


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN_VALUES} more" if len(texts) > _SHOWN_VALUES else ""
    return (", ".join(shown(text) for text in texts[:_SHOWN_VALUES]) or "no value") + more


def _text(value: object) -> str | None:
    """Convert a label to text; equal numbers have equal text, whatever their type."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if "_" in text or not math.isfinite(number) else number


def _identity(text: str) -> object:
    """Return a value that is equal for texts with the same meaning: 1 and 1.0, in either case, padded or not."""
    number = _number(text)
    return text.strip().lower() if number is None else number


def parse_labels(column: Any, values: LabelValues | None) -> tuple[npt.NDArray[np.float32], list[Fault]]:
    """Convert an Arrow column of any type to float32 labels 0/1; return them and the faults of the other rows.

    Without `values`, 0 and 1 may be integers, floats, booleans or text (``0``, ``1.0``, ``true`` …).
    """
    codes = column.dictionary_encode()
    texts = [*codes.dictionary.to_pylist(), None]
    meaning = np.array([_label_of(_text(value), values) for value in texts], np.float32)
    indices = codes.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)
    labels = meaning[indices]
    bad = np.flatnonzero(np.isnan(labels))
    expected = "0 or 1" if values is None else f"{values[0]!r} or {values[1]!r}"
    return labels, [(int(row), f"label must be {expected}, found {shown(texts[indices[row]])}") for row in bad]


def _label_of(text: str | None, values: LabelValues | None) -> float:
    if text is None:
        return math.nan
    if values is None:
        return _STANDARD.get(text.lower(), math.nan)
    meanings = {_identity(value): float(label) for label, value in enumerate(values)}
    return meanings.get(_identity(text), math.nan)
