"""Tables that are not in memory: `prefetch` loads rows, calls read ahead by themselves, and neither changes a bit."""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import resource
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hashemb
from hashemb.errors import ClosedTableError

ROWS, DIM = 1 << 18, 16
OPTIMIZERS = {
    "sgd": hashemb.SGD(lr=0.1),
    "adagrad with decay": hashemb.Adagrad(lr=0.1, weight_decay=0.01),
    "rowwise_adagrad": hashemb.RowWiseAdagrad(lr=0.1),
    "ftrl": hashemb.FTRL(alpha=0.1),
}
KEYS = np.random.default_rng(1).integers(0, 1 << 64, 3000, np.uint64)
FILLED = np.arange(20_000, dtype=np.uint64)  # these fill every block

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def resident(path: pathlib.Path) -> npt.NDArray[np.bool_]:
    """Return, for each page of the file, whether it is in the page cache."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        assert _libc.mincore(address, len(mapped), pages.ctypes.data) == 0
    return pages & 1 == 1


def row_pages(rows: Any, row_bytes: int) -> npt.NDArray[np.int64]:
    first = 4096 + rows.ravel() * row_bytes
    return np.unique(np.concatenate([first, first + row_bytes - 1]) // mmap.PAGESIZE)


def evict(path: pathlib.Path) -> None:
    for file in path.glob("*.npy"):
        fd = os.open(file, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def make(path: pathlib.Path, optimizer: Any = OPTIMIZERS["rowwise_adagrad"], **options: Any) -> pathlib.Path:
    """Make a written table that is closed and not in memory."""
    settings = {"num_embeddings": ROWS, "embedding_dim": DIM, "optimizer": optimizer, "huge_pages": False, **options}
    with hashemb.create(path, **settings) as table:
        grads = np.random.default_rng(2).standard_normal((FILLED.size, settings["embedding_dim"]))
        table.update(FILLED, grads.astype(np.float32))
        table.update(KEYS, np.ones((KEYS.size, settings["embedding_dim"]), np.float32))
    evict(path)
    return path


@pytest.fixture
def cold(tmp_path: pathlib.Path) -> pathlib.Path:
    path = make(tmp_path / "t.emb")
    if resident(path / "weight.npy")[1:].any():
        pytest.skip(f"{tmp_path} is on a file system that keeps its files in memory")
    return path


@pytest.fixture
def counted(cold: pathlib.Path) -> pathlib.Path:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    with hashemb.open(cold, huge_pages=False) as table:
        table._core.fault_ahead = False  # type: ignore[union-attr]
        table.lookup(KEYS)
    evict(cold)
    if resource.getrusage(resource.RUSAGE_SELF).ru_inblock == before:
        pytest.skip("the kernel does not count what a process reads from this file system")
    return cold


def wait_until_resident(path: pathlib.Path, pages: npt.NDArray[np.int64]) -> None:
    for _ in range(500):
        if resident(path)[pages].all():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path}: {np.count_nonzero(~resident(path)[pages])} of {pages.size} pages did not come")


# ---- prefetch ----


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_prefetch_brings_rows_and_for_writers_their_state(cold: pathlib.Path, mode: Any) -> None:
    with hashemb.open(cold, mode, huge_pages=False) as table:
        rows = table.rows(KEYS[:200])
        table.prefetch(KEYS[:200])
        wanted = row_pages(rows, DIM * 4)
        wait_until_resident(cold / "weight.npy", wanted)
        if mode == "r+":
            wait_until_resident(cold / "accumulator.npy", row_pages(rows, 4))
        else:
            assert not resident(cold / "accumulator.npy")[64:].any()
    found = resident(cold / "weight.npy")
    assert found[64:].sum() <= wanted.size, "neighbours were read too"  # except for the header, which open reads


LONG_ROWS = {"embedding_dim": 1500, "num_embeddings": 1 << 12}


@pytest.mark.parametrize("options", [{"num_hashes": 3}, LONG_ROWS, {"dtype": "bfloat16"}])
def test_prefetch_brings_all_pages_of_a_row(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    path = make(tmp_path / "t.emb", OPTIMIZERS["adagrad with decay"], **options)
    with hashemb.open(path, "r+", huge_pages=False) as table:
        table.prefetch(KEYS[:100])
        for name, array in {"weight": table.weight, **table.state}.items():
            row_bytes = array.nbytes // table.num_embeddings
            wait_until_resident(path / f"{name}.npy", row_pages(table.rows(KEYS[:100]), row_bytes))


def test_prefetch_takes_keys_as_lookup_does(cold: pathlib.Path) -> None:
    kinds: list[Any] = [7, [1, 2], np.int8(-3), np.zeros((2, 0, 3), np.int64), KEYS.reshape(30, 100), [], -(2**63)]
    with hashemb.open(cold) as table:
        for keys in kinds:
            assert table.prefetch(keys) is None  # type: ignore[func-returns-value]
        for bad in (1.5, "a", [True], None, np.zeros(3, np.float32)):
            with pytest.raises(TypeError):
                table.prefetch(bad)


def test_prefetch_of_a_closed_table(cold: pathlib.Path) -> None:
    table = hashemb.open(cold)
    table.prefetch(KEYS)
    table.close()  # while pages are being read
    with pytest.raises(ClosedTableError, match="closed"):
        table.prefetch(KEYS)


def test_many_calls_wait_for_nothing(cold: pathlib.Path) -> None:
    with hashemb.open(cold, huge_pages=False) as table:
        for part in np.array_split(KEYS, 500):
            table.prefetch(part)
        wait_until_resident(cold / "weight.npy", row_pages(table.rows(KEYS[:6]), DIM * 4))


def test_prefetch_in_a_forked_child(cold: pathlib.Path) -> None:
    with hashemb.open(cold, huge_pages=False) as table:
        table.prefetch(KEYS[:1000])
        expected = table.lookup(KEYS)
        evict(cold)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                table.prefetch(KEYS)
                wait_until_resident(cold / "weight.npy", row_pages(table.rows(KEYS[:100]), DIM * 4))
                status = 0 if np.array_equal(table.lookup(KEYS), expected) else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


def test_reading_ahead_writes_nothing(tmp_path: pathlib.Path) -> None:
    """The holes of a sparse table stay holes, and its pages stay clean."""
    path = tmp_path / "t.emb"
    with hashemb.create(path, num_embeddings=ROWS, embedding_dim=DIM, huge_pages=False) as table:
        table.flush()
        before = {file.name: file.stat().st_blocks for file in path.iterdir()}
        written = resource.getrusage(resource.RUSAGE_SELF).ru_oublock
        table.prefetch(KEYS)
        table.lookup(KEYS)
        table.flush()
        written = resource.getrusage(resource.RUSAGE_SELF).ru_oublock - written
        assert written * 512 <= 2 * mmap.PAGESIZE  # the control page
        assert {file.name: file.stat().st_blocks for file in path.iterdir()} == before
        assert not any(array.any() for array in (table.weight, *table.state.values()))


# ---- automatic read-ahead ----


def test_a_cold_lookup_asks_ahead_and_a_warm_one_stops(counted: pathlib.Path) -> None:
    with hashemb.open(counted, huge_pages=False) as table:
        core: Any = table._core
        assert not core.is_asking
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        first = table.lookup(KEYS)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
        assert core.is_asking
        assert faults < KEYS.size // 2, "most pages should have been asked for"
        for _ in range(20):
            assert np.array_equal(table.lookup(KEYS), first)
        assert not core.is_asking


def test_a_table_with_huge_pages_does_not_ask(counted: pathlib.Path) -> None:
    with hashemb.open(counted, huge_pages=True) as table:
        core: Any = table._core
        assert core.fault_ahead is False or not table._files.asks_for_huge_pages  # type: ignore[union-attr]
        table.lookup(KEYS)
        assert not core.is_asking or core.fault_ahead


@pytest.mark.parametrize("isolation", ["hogwild", "exact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_do_not_depend_on_it(tmp_path: pathlib.Path, name: str, isolation: Any) -> None:
    found = {}
    offsets = np.concatenate([[0, 0, 1], np.arange(2000, KEYS.size, 7), [KEYS.size]])
    grads = np.random.default_rng(3).standard_normal((offsets.size - 1, DIM)).astype(np.float32)
    for ahead in (False, True):
        path = make(tmp_path / f"{ahead}.emb", OPTIMIZERS[name])
        with hashemb.open(path, "r+", isolation=isolation, huge_pages=False) as table:
            core: Any = table._core
            core.fault_ahead = ahead
            pooled = [table.lookup(KEYS, offsets=offsets, pooling="mean")]
            evict(path)
            for _ in range(3):
                table.update(KEYS, grads, offsets=offsets, pooling="mean")
                pooled.append(table.lookup(KEYS, offsets=offsets, pooling="mean"))
            arrays = {"weight": table.weight, **table.state}
            found[ahead] = [*pooled, *(np.array(array) for array in arrays.values())]
    assert all(np.array_equal(a, b) for a, b in zip(found[False], found[True], strict=True))


def test_the_first_update_after_a_snapshot_asks_ahead_too(counted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with hashemb.open(counted, "r+", huge_pages=False) as table:
        table.snapshot(tmp_path / "point.emb")
    evict(counted)
    with hashemb.open(counted, "r+", huge_pages=False) as table:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        table.update(KEYS, np.ones((KEYS.size, DIM), np.float32))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
        pages = row_pages(table.rows(KEYS), DIM * 4).size
        assert faults < pages // 2, f"{faults} faults waited for the disk, for {pages} pages of weights"
