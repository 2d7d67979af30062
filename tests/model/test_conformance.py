"""Run the conformance kit on tables in files of each storage type, on the slow twin, and on the model itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conformance
import numpy as np
import pytest

import hashemb
from hashemb.reference import ReferenceTable


class FileTables(conformance.Conformance):
    """The kit with tables in files, which it creates and closes."""

    @pytest.fixture(autouse=True)
    def close_tables(self) -> Iterator[None]:
        self.tables: list[hashemb.EmbeddingTable] = []
        yield
        for table in self.tables:
            table.close()

    def make(self, tmp_path: Path, **options: Any) -> hashemb.EmbeddingTable:
        self.tables.append(hashemb.create(tmp_path / f"{len(self.tables)}.emb", **options))
        return self.tables[-1]


class TestFloat32(FileTables):
    pass


class TestFloat16(FileTables):
    options = {"dtype": "float16"}  # noqa: RUF012


class TestBfloat16(FileTables):
    options = {"dtype": "bfloat16"}  # noqa: RUF012


class TestReopened(FileTables):
    """The kit with a table that is closed and reopened before every call."""

    def make(self, tmp_path: Path, **options: Any) -> Any:
        table = super().make(tmp_path, **options)
        table.close()
        return Reopening(table.path)


class TestReference(conformance.Conformance):
    def make(self, tmp_path: Path, **options: Any) -> ReferenceTable:
        return ReferenceTable(**options)


class Reopening:
    """Forwards each call to a table that is opened for this call only."""

    def __init__(self, path: str) -> None:
        self.__dict__["path"] = path

    def __getattr__(self, name: str) -> Any:
        with hashemb.open(self.path, mode="r+") as table:
            value = getattr(table, name)
        return value if not callable(value) else lambda *args, **kwargs: self._call(name, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        with hashemb.open(self.path, mode="r+") as table:
            setattr(table, name, value)

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        with hashemb.open(self.path, mode="r+") as table:
            return getattr(table, name)(*args, **kwargs)


class Forgetful(ReferenceTable):
    """Applies the occurrences of a row one after another, as approximate optimisers do."""

    def update(self, keys: Any, grads: Any, **call: Any) -> None:
        for key, grad in zip(np.asarray(keys).reshape(-1), np.asarray(grads).reshape(-1, 5), strict=True):
            super().update(np.array([key]), grad[None, :], **call)


class Eager(ReferenceTable):
    """Writes the initial value of every row it reads."""

    def lookup(self, keys: Any, **call: Any) -> Any:
        result = super().lookup(keys, **call)
        self.weight[self.rows(keys)] = result
        return result


@pytest.mark.parametrize(
    ("broken", "name", "arguments"),
    [
        (Forgetful, "test_repeated_and_colliding_keys_are_summed_first", []),
        (Eager, "test_untouched_rows_read_as_their_initial_value", [hashemb.Uniform(0.5)]),
    ],
)
def test_canary(broken: type[ReferenceTable], name: str, arguments: list[Any], tmp_path: Path) -> None:
    """The kit detects tables with defects that tables have had."""

    class Kit(conformance.Conformance):
        def __init__(self, table: type[ReferenceTable]) -> None:
            self.table = table

        def make(self, tmp_path: Path, **options: Any) -> ReferenceTable:
            return self.table(**options)

    for table in (ReferenceTable, broken):
        kit = Kit(table)
        both = functools.partial(kit.make_both, tmp_path)
        with pytest.raises(AssertionError) if table is broken else contextlib.nullcontext():
            getattr(kit, name)(both, *arguments)
