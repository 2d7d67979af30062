"""The caller's options for the columns of a table, and the terms of their labels."""

from __future__ import annotations

from dataclasses import dataclass

from hashemb.ctr.data.fields import Schema

__all__ = ["Fault", "LabelValues", "Options"]

Fault = tuple[int, str]  # (row or line, reason)
LabelValues = tuple[str, str]  # the values that mean 0 and 1


@dataclass(frozen=True)
class Options:
    """The caller's options for the columns: arguments of `open_reader`."""

    label: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    schema: Schema | None = None
    label_values: LabelValues | None = None
    positive: str | None = None
