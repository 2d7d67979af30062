"""Deltas contain exactly the changes, and a table applies each once, in order, or reports why not."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_chains import EVERY_KEY, OPTIONS, assert_same, chain, contents, files_of, snapshot_files, train
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import OPTIMIZERS

import hashemb
from hashemb._points.half import convert_rows
from hashemb.errors import DeltaError, ReadOnlyTableError

DTYPES = ["float32", "float16", "bfloat16"]


def serving(source: hashemb.EmbeddingTable, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a replica without optimiser state."""
    optimizer = hashemb.SGD(lr=0.5, weight_decay=source.optimizer.weight_decay)
    return {**OPTIONS, "num_hashes": source.num_hashes, "dtype": source.dtype, "optimizer": optimizer, **changes}


# ---- the replica equals the source ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_a_replica_reads_as_its_source(tmp_path: Path, optimizer: Any, dtype: str) -> None:
    """With weights only, every look-up is equal through a chain of three, including the decay that rows owe."""
    with (
        hashemb.create(tmp_path / "s", **OPTIONS, optimizer=optimizer, dtype=dtype, num_hashes=2) as source,
        hashemb.create(tmp_path / "r", **serving(source)) as replica,
    ):
        infos = chain(source, tmp_path, 3)
        places = [(info.sequence, info.parent_sequence, info.step) for info in infos]
        assert places == [(0, -1, 3), (1, 0, 6), (2, 1, 9)]
        assert infos[2].parent == infos[1].id
        for file, info in zip(files_of(tmp_path, 3), infos, strict=True):
            assert hashemb.apply_delta(replica, file) == info == hashemb.delta_info(file)
        assert_same(contents(replica, state=False), contents(source, state=False))
        np.testing.assert_array_equal(replica.lookup(EVERY_KEY), source.lookup(EVERY_KEY))
        assert (replica.step, replica.lr) == (source.step, source.lr)
        assert replica.stats().rows_touched == source.stats().rows_touched > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_with_state_training_goes_on_alike(tmp_path: Path, optimizer: Any, dtype: str) -> None:
    options = {**OPTIONS, "optimizer": optimizer, "dtype": dtype}
    with hashemb.create(tmp_path / "s", **options) as source, hashemb.create(tmp_path / "r", **options) as replica:
        infos = chain(source, tmp_path, 2, state=True)
        assert all(info.state for info in infos)
        for file in files_of(tmp_path, 2):
            hashemb.apply_delta(replica, file)
        assert_same(contents(replica), contents(source))
        for table in (source, replica):
            train(table, seed=9)
        assert_same(contents(replica), contents(source))


@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 63, 64, 65, 1000, 5000]),
    dim=st.sampled_from([1, 3, 16, 17, 1500]),
    dtypes=st.tuples(*3 * [st.sampled_from(DTYPES)]),
    batches=st.lists(st.lists(st.integers(-3, 300), max_size=12), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.5]),
)
def test_any_shape_and_dtype(
    tmp_path_factory: Any, rows: int, dim: int, dtypes: tuple[str, str, str], batches: Any, decay: float
) -> None:
    """Source, delta and replica may each have a different dtype, and hence blocks of different sizes."""
    place = tmp_path_factory.mktemp("t")
    options = {"num_embeddings": rows, "embedding_dim": dim, "optimizer": hashemb.SGD(lr=0.5, weight_decay=decay)}
    with (
        hashemb.create(place / "s", dtype=dtypes[0], **options) as source,
        hashemb.create(place / "r", dtype=dtypes[2], **options) as replica,
    ):
        since = None
        for number, batch in enumerate(batches):
            train(source, number, steps=1, keys=np.array(batch, np.int64))
            since = source.export_delta(since, place / f"{number}.delta", dtype=dtypes[1])
            hashemb.apply_delta(replica, place / f"{number}.delta")
        between = convert_rows(source.weight, dtypes[0], dtypes[1])
        np.testing.assert_array_equal(replica.weight, convert_rows(between, dtypes[1], dtypes[2]))
        if decay:
            np.testing.assert_array_equal(replica.state["paid"], source.state["paid"])
        assert replica.stats(exact=True).rows_touched == source.stats(exact=True).rows_touched


def test_a_delta_holds_the_changed_blocks_only(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **{**OPTIONS, "num_embeddings": 2**20, "embedding_dim": 16}) as source:
        source.update(np.arange(20_000), np.ones((20_000, 16), np.float32))
        everything = source.export_delta(None, tmp_path / "0.delta")
        keys = [1, 2, 3]
        source.update(keys, np.ones((3, 16), np.float32))
        changed = source.export_delta(everything, tmp_path / "1.delta")
        assert changed.num_blocks == len(np.unique(source.rows(keys) // 64)) == 3
        assert (tmp_path / "1.delta").stat().st_size <= 3 * 4096 + 4 * 4096
        nothing = source.export_delta(changed, tmp_path / "2.delta")
        assert nothing.num_blocks == 0
        both = source.export_delta(everything, tmp_path / "3.delta")
        assert (both.num_blocks, both.parent, both.sequence) == (3, everything.id, 3)


def test_a_long_chain(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source, hashemb.create(tmp_path / "r", **OPTIONS) as replica:
        for file, info in zip(files_of(tmp_path, 40), chain(source, tmp_path, 40), strict=True):
            assert hashemb.apply_delta(replica, file).sequence == info.sequence
        assert_same(contents(replica, state=False), contents(source, state=False))


def test_from_a_snapshot_and_on_its_copy(tmp_path: Path) -> None:
    """`since` may be the path or the info of a snapshot or a delta; the base is a copy of the snapshot."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        train(source, 0)
        info = source.snapshot(tmp_path / "snapshot")
        shutil.copytree(tmp_path / "snapshot", tmp_path / "r")
        train(source, 1)
        first = source.export_delta(str(tmp_path / "snapshot"), tmp_path / "1.delta", state=True)
        assert (first.parent, first.parent_sequence) == (info.id, 0)
        train(source, 2)
        source.export_delta(tmp_path / "1.delta", tmp_path / "2.delta", state=True)
        train(source, 3)
        last = source.export_delta(info, tmp_path / "3.delta", state=True)
        with hashemb.open(tmp_path / "r", "r+") as replica:
            for number in (1, 2):
                hashemb.apply_delta(replica, tmp_path / f"{number}.delta")
            assert replica.step == 9
        hashemb.apply_delta(tmp_path / "snapshot", tmp_path / "3.delta")  # by path, and directly from the snapshot
        with hashemb.open(tmp_path / "snapshot") as replica:
            assert_same(contents(replica), contents(source))
        assert last.num_blocks >= first.num_blocks


def test_a_replica_hands_deltas_on(tmp_path: Path) -> None:
    """Source -> replica -> replica of the replica. Blocks that are newer than a point stay newer along the chain."""
    tables = [hashemb.create(tmp_path / name, **OPTIONS) for name in ("s", "r", "t")]
    source, middle, last = tables
    infos = chain(source, tmp_path, 2)
    for file in files_of(tmp_path, 2):
        hashemb.apply_delta(middle, file)
    handed = middle.export_delta(None, tmp_path / "base.delta")
    assert handed.table.id == infos[0].table.id
    hashemb.apply_delta(last, tmp_path / "base.delta")
    assert_same(contents(last, state=False), contents(source, state=False))
    changed = middle.export_delta(infos[0], tmp_path / "middle.delta")
    assert changed.num_blocks == infos[1].num_blocks
    for table in tables:
        table.close()


def test_half_precision_is_to_nearest_even() -> None:
    wide = np.array([[1.0 + 2**-11, 1.0 + 3 * 2**-11, -1e-30], [1.0 + 2**-8, 1.0 + 3 * 2**-8, np.nan]], np.float32)
    half = convert_rows(wide, "float32", "float16")
    np.testing.assert_array_equal(half[0], np.array([1.0, 1.0 + 2**-9, -0.0], np.float16))
    brain = convert_rows(wide, "float32", "bfloat16")
    assert brain[1, :2].tolist() == [0x3F80, 0x3F82]
    assert np.isnan(convert_rows(brain, "bfloat16", "float32")[1, 2])
    rng = np.random.default_rng(1)
    anything = rng.integers(0, 2**16, (1000, 4), np.uint16)
    for kind, array in (("bfloat16", anything), ("float16", anything.view(np.float16))):
        there = convert_rows(array, kind, "float32")
        assert np.isfinite(there).any()
        back = convert_rows(there, "float32", kind)
        numbers = ~np.isnan(there)
        np.testing.assert_array_equal(back.view(np.uint16)[numbers], array.view(np.uint16)[numbers])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_written_row_that_rounds_to_zero_stays_written(dtype: str) -> None:
    rows = np.zeros((3, 2), np.float32)
    rows[1] = 2.0**-140
    rows[2] = [0.0, 1.0]
    found = convert_rows(rows, "float32", dtype).view(np.uint16)
    assert found[:2].tolist() == [[0, 0], [0x8000, 0]]
    assert found[2, 0] == 0
    assert found[2, 1] != 0


def test_a_weight_too_large_for_half_precision(tmp_path: Path) -> None:
    options = {**OPTIONS, "optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
    with hashemb.create(tmp_path / "s", **options) as source:
        source.update([1], np.full((1, 5), 1e6, np.float32))
        with pytest.raises(ValueError, match=r"-1000000\.0 is too large for float16"):
            source.export_delta(None, tmp_path / "0.delta", dtype="float16")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["s"]
        source.export_delta(None, tmp_path / "0.delta")
    with hashemb.create(tmp_path / "r", **options, dtype="float16") as replica:
        before = dict(snapshot_files(tmp_path / "r"))
        with pytest.raises(ValueError, match="too large for float16"):
            hashemb.apply_delta(replica, tmp_path / "0.delta")
        assert dict(snapshot_files(tmp_path / "r")) == before


# ---- which deltas a table accepts ----


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    """Make a source with deltas 0 to 4, and an empty, open replica."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source, hashemb.create(tmp_path / "r", **OPTIONS) as replica:
        chain(source, tmp_path, 5)
        yield source, replica, files_of(tmp_path, 5)


def refused(replica: hashemb.EmbeddingTable, file: Path, reason: str, message: str) -> None:
    """Check that the delta is refused for this reason, and that no byte of the table has changed."""
    before = dict(snapshot_files(Path(replica.path)))
    with pytest.raises(DeltaError, match=message) as caught:
        hashemb.apply_delta(replica, file)
    assert caught.value.reason == reason
    assert dict(snapshot_files(Path(replica.path))) == before


def test_gaps_repeats_and_reorderings(stage: Any) -> None:
    source, replica, files = stage
    refused(replica, files[1], "gap", r"no deltas yet, delta number 1 .*up to 0 are missing")
    hashemb.apply_delta(replica, files[0])
    refused(replica, files[0], "applied", r"stands at number 0 and has delta number 0 .* already")
    refused(replica, files[2], "gap", r"stands at number 0, delta number 2 .*above 0 up to 1 are missing")
    hashemb.apply_delta(replica, files[1])
    hashemb.apply_delta(replica, files[2])
    refused(replica, files[1], "applied", "stands at number 2 and has delta number 1")
    base = source.export_delta(None, files[0].with_name("base.delta"))
    refused(replica, files[0].with_name("base.delta"), "base", rf"number {base.sequence} .*for a new table")
    late = hashemb.delta_info(files[0])
    source.export_delta(late, files[0].with_name("late.delta"))
    refused(replica, files[0].with_name("late.delta"), "older", "starts from number 0.* before that")
    for file in files[3:]:
        hashemb.apply_delta(replica, file)
    assert_same(contents(replica, state=False), contents(source, state=False))


def test_older_than_where_the_table_stands(stage: Any, tmp_path: Path) -> None:
    """A replica that began at a later base has not seen the earlier deltas."""
    source, replica, files = stage
    source.export_delta(None, tmp_path / "base.delta")
    hashemb.apply_delta(replica, tmp_path / "base.delta")
    refused(replica, files[4], "older", "stands at number 5, delta number 4")


def test_foreign_deltas(stage: Any, tmp_path: Path) -> None:
    _, replica, files = stage
    (tmp_path / "other").mkdir()
    with hashemb.create(tmp_path / "other" / "s", **OPTIONS) as other:
        infos = chain(other, tmp_path / "other", 2)
        with pytest.raises(ValueError, match=r"is not among the 2 in the table's history \(numbers 0 to 1\)"):
            other.export_delta(files[0], tmp_path / "x.delta")
    hashemb.apply_delta(replica, files[0])
    refused(replica, files_of(tmp_path / "other", 2)[1], "foreign", f"is of table {infos[0].table.id}")


def test_another_branch(stage: Any, tmp_path: Path) -> None:
    """A source that was restored from a snapshot and trained again is the same table with another history."""
    source, replica, files = stage
    source.snapshot(tmp_path / "copy")
    assert source.export_delta(tmp_path / "copy", tmp_path / "6.delta").sequence == 6
    with hashemb.open(tmp_path / "copy", "r+") as copy:
        branch = copy.export_delta(tmp_path / "copy", tmp_path / "branch.delta")
        copy.export_delta(branch, tmp_path / "branch7.delta")
    source.export_delta(None, tmp_path / "base.delta")  # number 7
    hashemb.apply_delta(replica, tmp_path / "base.delta")
    source.export_delta(tmp_path / "base.delta", tmp_path / "8.delta")
    refused(replica, tmp_path / "branch7.delta", "foreign", "of another branch")
    hashemb.apply_delta(replica, tmp_path / "8.delta")
    assert files


def test_a_replica_that_was_trained(stage: Any) -> None:
    _, replica, files = stage
    replica.update([1], np.ones((1, 5), np.float32))
    refused(replica, files[0], "trained", "expected step 0, found 1")


def test_a_replica_that_was_trained_later(stage: Any) -> None:
    _, replica, files = stage
    hashemb.apply_delta(replica, files[0])
    replica.update([1], np.ones((1, 5), np.float32))
    refused(replica, files[1], "trained", "expected step 3, found 4")


@pytest.mark.parametrize(
    "change",
    [
        {"num_embeddings": 4999},
        {"embedding_dim": 6},
        {"seed": 4},
        {"num_hashes": 2},
        {"init": hashemb.Uniform(0.25)},
        {"optimizer": hashemb.SGD(weight_decay=0.5)},
    ],
    ids=str,
)
def test_tables_that_differ(stage: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    _, _, files = stage
    name = next(iter(change)) if "optimizer" not in change else "weight_decay"
    with hashemb.create(tmp_path / "other", **{**OPTIONS, **change}) as other:
        refused(other, files[0], "incompatible", name)


def test_state_of_another_optimizer(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        train(source, 0)
        source.export_delta(None, tmp_path / "0.delta", state=True)
    with hashemb.create(tmp_path / "r", **OPTIONS, optimizer=hashemb.Adagrad(eps=0.5)) as replica:
        refused(replica, tmp_path / "0.delta", "incompatible", "optimizer")
    with hashemb.create(tmp_path / "t", **OPTIONS, optimizer=hashemb.Adagrad(lr=0.5)) as replica:
        hashemb.apply_delta(replica, tmp_path / "0.delta")
        assert replica.lr == 0.01
    with hashemb.create(tmp_path / "u", **OPTIONS, optimizer=hashemb.SGD()) as replica:
        hashemb.apply_delta(replica, tmp_path / "0.delta")


# ---- arguments ----


def test_bad_arguments(stage: Any, tmp_path: Path) -> None:
    source, _, files = stage
    for error, since, options, message in [
        (TypeError, 5, {}, "since must be None, a path"),
        (FileNotFoundError, tmp_path / "gone", {}, "gone"),
        (ValueError, tmp_path / "s", {}, "was not made by snapshot"),
        (hashemb.errors.FormatError, tmp_path / "s" / "meta.json", {}, "not a delta"),
        (ValueError, None, {"dtype": "float64"}, "dtype must be one of 'float32'"),
        (ValueError, None, {"dtype": "float16", "state": True}, "got dtype='float16'"),
    ]:
        with pytest.raises(error, match=message):
            source.export_delta(since, tmp_path / "new.delta", **options)
    for error, target, message in [
        (FileExistsError, files[0], "already something"),
        (FileNotFoundError, tmp_path / "gone" / "0.delta", "does not exist"),
        (TypeError, 7, "PathLike"),
    ]:
        with pytest.raises(error, match=message):
            source.export_delta(None, target)
    assert not (tmp_path / "new.delta").exists()
    assert source.snapshot(tmp_path / "count").sequence == 5, "a refused export left a mark in the history"


def test_read_only_tables(stage: Any, tmp_path: Path) -> None:
    _, _, files = stage
    with hashemb.open(tmp_path / "s") as reader:
        with pytest.raises(ReadOnlyTableError):
            reader.export_delta(None, tmp_path / "new.delta")
        with pytest.raises(ReadOnlyTableError):
            hashemb.apply_delta(reader, files[0])


def test_progress(stage: Any, tmp_path: Path) -> None:
    source, replica, _ = stage
    seen: list[tuple[int, int]] = []
    info = source.export_delta(None, tmp_path / "new.delta", progress=lambda *at: seen.append(at))
    assert seen[-1] == (info.num_blocks, info.num_blocks)
    seen.clear()
    hashemb.apply_delta(replica, tmp_path / "new.delta", progress=lambda *at: seen.append(at))
    assert seen[-1] == (info.num_blocks, info.num_blocks)


def test_values(stage: Any) -> None:
    _, _, files = stage
    info = hashemb.delta_info(files[2])
    assert pickle.loads(pickle.dumps(info)) == info
    assert replace(info, sequence=7) != info
    error = pickle.loads(pickle.dumps(DeltaError("why", "gap")))
    assert (str(error), error.reason) == ("why", "gap")
