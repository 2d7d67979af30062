"""A table in files against a dict of rows, with any sequence of calls, closes, other handles and other processes.

hypothesis chooses the calls and, on a failure, finds the shortest failing sequence. The machine keeps a read-write
handle, sometimes an additional read-only one, and one other process for the whole module.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dict_table import DictTable
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from strategies import EXTREME_KEYS, Batch, batches, key_arrays, table_options
from worker import Worker

import hashemb

RTOL, ATOL = 2e-4, 2e-5

rates = st.sampled_from([0.5, 0.25, 0.01, 0.125])


class TableMachine(RuleBasedStateMachine):
    """Each rule does the same to the table and to its model; what they return must agree at every step."""

    worker: Worker

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hashemb-stateful-"))
        self.path = self.folder / "t.emb"
        self.reader: hashemb.EmbeddingTable | None = None

    @initialize(options=table_options())
    def create(self, options: dict[str, Any]) -> None:
        self.table = hashemb.create(self.path, **options)
        self.model = DictTable(**options)

    def draw_batch(self, data: st.DataObject, *, pooled: bool) -> Batch:
        return data.draw(batches(self.model.embedding_dim, pooled=pooled), label="batch")

    def assert_same(self, found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL)

    # -- reading --

    @rule(keys=key_arrays())
    def lookup(self, keys: Any) -> None:
        self.assert_same(self.table.lookup(keys), self.model.lookup(keys))

    @rule(data=st.data())
    def lookup_bags(self, data: st.DataObject) -> None:
        batch = self.draw_batch(data, pooled=True)
        self.assert_same(self.table.lookup(batch.keys, **batch.call), self.model.lookup(batch.keys, **batch.call))

    @rule(keys=key_arrays())
    def rows(self, keys: Any) -> None:
        expected = [row for key in keys for row in self.model.rows(int(key))]
        assert self.table.rows(keys).reshape(-1).tolist() == expected

    @precondition(lambda self: self.reader is not None)
    @rule(keys=key_arrays())
    def lookup_through_the_reader(self, keys: Any) -> None:
        assert self.reader is not None
        np.testing.assert_array_equal(self.reader.lookup(keys), self.table.lookup(keys))
        self.assert_same(self.reader.lookup(keys), self.model.lookup(keys))

    @rule(keys=key_arrays())
    def lookup_in_the_other_process(self, keys: Any) -> None:
        self.assert_same(self.worker.call(self.path, "r", "lookup", keys), self.model.lookup(keys))

    # -- writing --

    @rule(data=st.data(), pooled=st.booleans())
    def update(self, data: st.DataObject, pooled: bool) -> None:
        batch = self.draw_batch(data, pooled=pooled)
        self.table.update(batch.keys, batch.grads, **batch.call)
        self.model.update(batch.keys, batch.grads, **batch.call)

    @rule(data=st.data(), pooled=st.booleans())
    def update_in_the_other_process(self, data: st.DataObject, pooled: bool) -> None:
        batch = self.draw_batch(data, pooled=pooled)
        self.worker.call(self.path, "r+", "update", batch.keys, batch.grads, **batch.call)
        self.model.update(batch.keys, batch.grads, **batch.call)

    @rule(keys=key_arrays().filter(len), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
    def update_with_a_bad_gradient(self, keys: Any, bad: float) -> None:
        grads = np.ones((len(keys), self.model.embedding_dim), np.float32)
        grads[-1, -1] = bad
        with pytest.raises(ValueError, match="finite"):
            self.table.update(keys, grads)

    @rule(lr=rates)
    def set_rate(self, lr: float) -> None:
        self.table.lr = self.model.lr = lr

    @rule(lr=rates)
    def set_rate_in_the_other_process(self, lr: float) -> None:
        self.worker.call(self.path, "r+", "lr=", lr)
        self.model.lr = lr

    # -- opening and closing --

    @rule()
    def flush(self) -> None:
        self.table.flush()

    @rule()
    def reopen(self) -> None:
        self.table.close()
        self.table = hashemb.open(self.path, mode="r+")

    @precondition(lambda self: self.reader is None)
    @rule()
    def open_reader(self) -> None:
        self.reader = hashemb.open(self.path)

    @precondition(lambda self: self.reader is not None)
    @rule()
    def close_reader(self) -> None:
        assert self.reader is not None
        self.reader.close()
        self.reader = None

    # -- invariants --

    @invariant()
    def the_step_counts_the_updates(self) -> None:
        if hasattr(self, "table"):
            assert self.table.step == self.model.step
            assert self.table.lr == self.model.lr

    @invariant()
    def rows_touched_are_counted(self) -> None:
        if hasattr(self, "table"):
            stats = self.table.stats(exact=True)
            assert stats.rows_touched == len(self.model.vectors)
            assert self.table.stats().rows_touched == len(self.model.vectors)

    def teardown(self) -> None:
        try:
            if hasattr(self, "table"):
                self.assert_same(self.table.lookup(EXTREME_KEYS), self.model.lookup(EXTREME_KEYS))
                self.table.close()
                weight = np.load(self.path / "weight.npy", mmap_mode="r")
                assert np.flatnonzero(weight.view(np.uint32).any(axis=1)).tolist() == sorted(self.model.vectors)
        finally:
            for table in (self.reader, getattr(self, "table", None)):
                if table is not None:
                    table.close()
            shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def machine() -> Iterator[type[TableMachine]]:
    with Worker() as worker:
        TableMachine.worker = worker
        yield TableMachine


def test_table_against_a_dict_of_rows(machine: type[TableMachine]) -> None:
    run(machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))


@pytest.mark.slow
def test_table_against_a_dict_of_rows_at_length(machine: type[TableMachine]) -> None:
    run(machine, settings=settings(max_examples=300, stateful_step_count=60, deadline=None))


def test_canary(machine: type[TableMachine]) -> None:
    """The machine detects a table whose only fault is that it occasionally loses a gradient."""

    class Lossy(machine):  # type: ignore[misc, valid-type]
        @rule(data=st.data())
        def update_that_may_be_lost(self, data: st.DataObject) -> None:
            batch = self.draw_batch(data, pooled=False)
            self.table.update(batch.keys, batch.grads * (len(batch.keys) % 7 > 0))
            self.model.update(batch.keys, batch.grads)

    generate_only = settings(max_examples=40, stateful_step_count=25, deadline=None, phases=[Phase.generate])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run(Lossy, settings=generate_only)
