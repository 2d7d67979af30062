"""Huge pages: what is requested from the kernel and when, what it returns, and that only speed changes."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker import mapped_bytes

import hashemb
from hashemb._files import huge_pages as _huge_pages
from hashemb._files.arrays import HUGE_PAGE_BYTES, map_file

PMD_KINDS = ("FilePmdMapped", "ShmemPmdMapped")
ROWS = 1 << 17  # of 16 floats: 8 MiB, four extents and a page


def create(path: Path, **changes: Any) -> hashemb.EmbeddingTable:
    options: dict[str, Any] = {"num_embeddings": ROWS, "embedding_dim": 16, "optimizer": hashemb.Adagrad(lr=0.1)}
    return hashemb.create(path, **options | changes)


def train(table: hashemb.EmbeddingTable, num_keys: int) -> None:
    grads = np.random.default_rng(num_keys).normal(size=(num_keys, table.embedding_dim)).astype(np.float32)
    table.update(np.arange(num_keys), grads)


def huge(table: hashemb.EmbeddingTable) -> int:
    """Return the bytes in huge pages according to `stats`, after checking them against the kernel."""
    found = table.stats().huge_page_bytes
    in_smaps = sum(mapped_bytes(f"{table.path}/", *PMD_KINDS).values())
    if found is None:
        pytest.skip("this kernel cannot tell how pages are mapped (Linux < 6.7)")
    assert found == in_smaps
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a directory on a file system that gives huge pages on request, as tested without this library."""
    with open(tmp_path / "probe", "w+b") as file:
        file.truncate(8 << 20)
        with mmap.mmap(file.fileno(), 8 << 20) as memory:
            memory.madvise(14)  # MADV_HUGEPAGE
            memory[5 << 20] = 1
            found = mapped_bytes(str(tmp_path / "probe"), *PMD_KINDS)
        if not found["FilePmdMapped"]:
            pytest.skip("files here get no huge pages (THP off, or a file system without large folios)")
    return tmp_path


@pytest.fixture
def shm() -> Iterator[Path]:
    """Yield a directory on a tmpfs that gives small pages until they are collapsed."""
    if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="hashemb-test-", dir="/dev/shm") as name:
        with open(f"{name}/probe", "w+b") as file:
            if not _huge_pages.is_tmpfs(file.fileno()):
                pytest.skip("/dev/shm is not a tmpfs")
            file.truncate(8 << 20)
            mapped, offset = map_file(file.fileno(), 8 << 20, True)
            mapped[offset] = 1
            if mapped_bytes(name, *PMD_KINDS)["ShmemPmdMapped"]:
                pytest.skip("this tmpfs gives huge pages by itself")
            mapped[offset : offset + HUGE_PAGE_BYTES] = bytes(HUGE_PAGE_BYTES)
            try:
                mapped.madvise(25, offset, HUGE_PAGE_BYTES)
            except OSError as error:
                pytest.skip(f"this kernel does not collapse tmpfs ({error.strerror})")
            assert mapped_bytes(name, *PMD_KINDS)["ShmemPmdMapped"] == HUGE_PAGE_BYTES
            mapped.close()
        yield Path(name)


# ---- the limit ----


def fake_proc(root: Path, *, pages: int, percent: int, cgroup: str, limits: dict[str, str]) -> tuple[str, str]:
    for name in ("proc/self", "proc/sys/vm", "cgroup"):
        (root / name).mkdir(parents=True)
    (root / "proc/vmstat").write_text(f"nr_dirty 5\nnr_dirty_threshold 9\nnr_dirty_background_threshold {pages}\n")
    (root / "proc/sys/vm/dirty_background_ratio").write_text(f"{percent}\n")
    (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{cgroup}\n")
    for group, limit in limits.items():
        (root / "cgroup" / group).mkdir(parents=True, exist_ok=True)
        (root / "cgroup" / group / "memory.max").write_text(f"{limit}\n")
    return str(root / "proc"), str(root / "cgroup")


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("/", {}, 4096_000),
        ("/a/b", {"a": "max", "a/b": "max"}, 4096_000),
        ("/a/b", {"a": "max", "a/b": "1000000"}, 100_000),
        ("/a/b", {"a": "500000", "a/b": "1000000"}, 50_000),
        ("/a/b", {".": "300000", "a": "500000"}, 30_000),
        ("/a/b", {"a/b": "100000000000"}, 4096_000),
        ("/../b", {"b": "1000000"}, 100_000),
        ("/a", {"a": "plenty"}, 0),
    ],
)
def test_write_back_limit(tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int) -> None:
    fake = fake_proc(tmp_path, pages=4096_000 // mmap.PAGESIZE, percent=10, cgroup=cgroup, limits=limits)
    assert _huge_pages.write_back_limit_bytes(*fake) == expected


@pytest.mark.parametrize("gone", ["vmstat", "sys/vm/dirty_background_ratio", "self/cgroup"])
def test_a_limit_that_cannot_be_read_is_0(tmp_path: Path, gone: str) -> None:
    proc, cgroups = fake_proc(tmp_path, pages=1000, percent=10, cgroup="/", limits={})
    assert _huge_pages.write_back_limit_bytes(proc, cgroups) == 1000 * mmap.PAGESIZE
    os.unlink(f"{proc}/{gone}")
    assert _huge_pages.write_back_limit_bytes(proc, cgroups) == 0


def test_write_back_limit_here() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 <= _huge_pages.write_back_limit_bytes() < total


# ---- on disk ----


@pytest.mark.parametrize("huge_pages", [None, True])
def test_small_tables_on_disk_get_huge_pages(disk: Path, huge_pages: bool | None) -> None:
    with create(disk / "t", huge_pages=huge_pages) as table:
        train(table, ROWS)
        assert huge(table) >= 2 * 3 * HUGE_PAGE_BYTES  # one page of each first extent was read as a header
        table.flush()
        assert huge(table) >= 2 * 3 * HUGE_PAGE_BYTES
    with hashemb.open(disk / "t", huge_pages=huge_pages) as table:
        table.lookup(np.arange(ROWS))
        assert huge(table) >= 3 * HUGE_PAGE_BYTES


def test_false_asks_for_none(disk: Path) -> None:
    with create(disk / "t", huge_pages=False) as table:
        train(table, 20)
        assert huge(table) == 0
        assert table.stats().disk_bytes < 20 * 3 * 4096 + (64 << 10)


@pytest.mark.parametrize("what", ["write_back_limit_bytes", "free_bytes"])
def test_a_table_above_the_limits_stays_sparse(disk: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    options = {"optimizer": hashemb.SGD(), "num_embeddings": 2**20}
    create(disk / "sparse", **options).close()
    limit = hashemb.info(disk / "sparse").logical_bytes - hashemb.info(disk / "sparse").disk_bytes
    for bytes_left, is_sparse in ((limit - 1, True), (1 << 40, False)):
        monkeypatch.setattr(_huge_pages, what, lambda *args, bytes_left=bytes_left: bytes_left)
        path = disk / f"{bytes_left}"
        with create(path, **options) as table:
            train(table, 20)
            assert (huge(table) == 0) == is_sparse
            assert (table.stats().disk_bytes < 20 * 2 * 4096 + (64 << 10)) == is_sparse


# ---- on tmpfs ----


def test_a_table_on_tmpfs_is_collapsed_as_it_fills(shm: Path) -> None:
    with create(shm / "t") as table:
        train(table, 500)  # a quarter of the blocks
        assert huge(table) == 0
        before = table.lookup(np.arange(500))
        train(table, ROWS)
        assert huge(table) == 2 * 4 * HUGE_PAGE_BYTES
        assert (table.lookup(np.arange(500)) != before).any(axis=1).all()
    with hashemb.open(shm / "t") as table:  # extents collapsed by one process are mapped by another
        table.lookup(np.arange(ROWS))
        assert huge(table) == 4 * HUGE_PAGE_BYTES


def test_false_on_tmpfs(shm: Path) -> None:
    with create(shm / "t", huge_pages=False) as table:
        train(table, ROWS)
        assert huge(table) == 0


def test_true_on_tmpfs_collapses_what_is_there(shm: Path) -> None:
    options = {"num_embeddings": 2**20, "optimizer": hashemb.SGD(lr=0.1)}
    with create(shm / "t", huge_pages=False, **options) as table:
        train(table, 4)
        extents = {0} | set(((4096 + 64 * table.rows(np.arange(4))) // HUGE_PAGE_BYTES).tolist())
        expected = table.lookup(np.arange(4))
    with hashemb.open(shm / "t", huge_pages=True) as table:
        np.testing.assert_array_equal(table.lookup(np.arange(4)), expected)
        assert {0} | set(((4096 + 64 * table.rows(np.arange(4))) // HUGE_PAGE_BYTES).tolist()) == extents
        assert 0 < huge(table) <= len(extents) * HUGE_PAGE_BYTES
    with hashemb.open(shm / "t", mode="r+", huge_pages=True) as table:
        train(table, 12)
        touched = set(((4096 + 64 * table.rows(np.arange(12))) // HUGE_PAGE_BYTES).tolist())
        assert len(touched - extents) > 2
        assert huge(table) == len(touched | {0}) * HUGE_PAGE_BYTES


def test_blocks_larger_than_a_huge_page(shm: Path) -> None:
    options = {"num_embeddings": 5, "embedding_dim": (5 << 20) // 4, "optimizer": hashemb.SGD(lr=0.1)}
    with create(shm / "t", **options) as table:
        key = int(np.flatnonzero(table.rows(np.arange(100)) == 2)[0])  # bytes 10 to 15 Mi: 5 extents of 2 Mi
        table.update([key], np.ones((1, options["embedding_dim"]), np.float32))
        assert huge(table) == 3 * HUGE_PAGE_BYTES  # the extents with a part of row 2


def test_space_is_kept_where_reading_a_hole_would_take_it(shm: Path) -> None:
    """Checking how full an extent is allocates no page of blocks.npy."""
    with create(shm / "t", num_embeddings=2**24, optimizer=hashemb.SGD()) as table:
        train(table, 20)
        assert (shm / "t" / "blocks.npy").stat().st_blocks * 512 <= 4096 + 20 * 4096
        assert huge(table) == 0


# ---- which extents, without a kernel ----


class FakeKernel:
    """Records what is collapsed, and returns an errno."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.asked = answer, []

    def collapse(self, begin: int, num_bytes: int) -> None:
        assert num_bytes == HUGE_PAGE_BYTES
        self.asked.append(begin // HUGE_PAGE_BYTES)
        if self.answer:
            raise OSError(self.answer, os.strerror(self.answer))


class Filling:
    """Extents of an imaginary file of 4096-byte blocks, with a real blocks.npy."""

    def __init__(self, directory: Path, num_extents: int, answer: int) -> None:
        self.kernel = FakeKernel(answer)
        self.epochs = np.memmap(directory / "blocks", np.uint32, "w+", 4096, num_extents * 512)
        self.fd = os.open(directory / "blocks", os.O_RDONLY)
        self.extents = _huge_pages.Extents(
            self.kernel.collapse, 4096 + num_extents * HUGE_PAGE_BYTES, 4096, self.fd, always=False
        )

    def write(self, *blocks: Any) -> list[int]:
        """Write blocks; return the extents that are then collapsed."""
        self.kernel.asked = []
        written = np.concatenate([np.asarray(b).ravel() for b in blocks]).astype(np.uint64)
        self.epochs[written] = 1
        self.extents.collapse_written(written)
        return self.kernel.asked


@pytest.fixture
def filling(tmp_path: Path) -> Iterator[Any]:
    made: list[Filling] = []

    def make(num_extents: int, answer: int = 0) -> Filling:
        made.append(Filling(tmp_path, num_extents, answer))
        return made[-1]

    yield make
    for each in made:
        os.close(each.fd)


def test_an_extent_is_collapsed_once_and_when_a_quarter_is_written(filling: Any) -> None:
    """Extent 0 has 511 blocks, after the header; extent 1 has those from 511 on."""
    f = filling(3)
    assert f.write(np.arange(511, 511 + 127)) == []
    assert f.write(np.arange(511 + 127, 511 + 127 + 32)) == [1]
    assert f.write(np.arange(511 + 127 + 32, 1023)) == []
    assert f.write(np.arange(511), np.arange(1023, 3 * 512)) == [0, 2]
    assert f.write(np.arange(3 * 512)) == []


def test_steps_too_small_to_look_add_up(filling: Any) -> None:
    f = filling(2)
    asked = [f.write([block]) for block in range(511)]
    assert [0] in asked
    assert 127 <= asked.index([0]) <= 127 + 32


def test_at_most_64_at_once_and_the_busiest_first(filling: Any) -> None:
    f = filling(100)
    first = 511 + 512 * np.arange(99)
    f.epochs[first[:, None] + np.arange(384, 512)] = 1  # by another process
    most, some = first[:30, None] + np.arange(90), first[30:, None] + np.arange(80)
    asked = f.write(most, some)
    assert len(asked) == 64
    assert set(range(1, 31)) <= set(asked)
    rest = f.write(first[30:, None] + np.arange(80, 160))
    assert sorted(asked + rest) == list(range(1, 100))


def test_a_call_may_collapse_as_much_as_it_writes(filling: Any) -> None:
    f = filling(100)
    assert len(f.write(np.arange(511, 100 * 512))) == 99


@pytest.mark.parametrize(("answer", "goes_on"), [(errno.EINVAL, False), (errno.ENOMEM, True), (errno.EAGAIN, True)])
def test_a_kernel_that_cannot_is_not_asked_again(filling: Any, answer: int, goes_on: bool) -> None:
    f = filling(4, answer)
    assert f.write(np.arange(511)) == [0]
    assert f.write(np.arange(511, 1023)) == ([1] if goes_on else [])


# ---- unchanged behaviour ----


@pytest.mark.parametrize("where", ["disk", "shm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_pages(request: pytest.FixtureRequest, where: str, dtype: str) -> None:
    directory = request.getfixturevalue(where)
    stored = []
    for huge_pages in (None, True, False):
        optimizer = hashemb.Adagrad(lr=0.1, weight_decay=0.01)
        with create(directory / f"{huge_pages}", dtype=dtype, optimizer=optimizer, huge_pages=huge_pages) as table:
            for num_keys in (10, ROWS, 1000):
                train(table, num_keys)
            assert (huge(table) > 0) == (huge_pages is not False)
            stored.append([table.weight.tobytes(), *(array.tobytes() for array in table.state.values())])
    assert len(stored[0]) == 3
    assert stored[0] == stored[1] == stored[2]


@pytest.mark.parametrize("where", ["disk", "shm"])
def test_views_outlive_the_table(request: pytest.FixtureRequest, where: str) -> None:
    table = create(request.getfixturevalue(where) / "t", huge_pages=True)
    train(table, ROWS)
    view = table.weight
    expected = view[5].copy()
    table.close()
    np.testing.assert_array_equal(view[5], expected)
    assert not view.flags.writeable


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_stored_arrays_of_readers_cannot_be_written(tmp_path: Path, mode: Any) -> None:
    create(tmp_path / "t").close()
    with hashemb.open(tmp_path / "t", mode) as table:
        with pytest.raises(ValueError, match="read-only"):
            table.weight[0] = 1
        base = table._open_files().arrays["weight"]
        assert base.flags.writeable is (mode == "r+")
        assert base.ctypes.data % HUGE_PAGE_BYTES == 4096


@pytest.mark.parametrize("where", ["disk", "shm"])
def test_a_forked_child_shares_the_pages(request: pytest.FixtureRequest, where: str) -> None:
    with create(request.getfixturevalue(where) / "t", optimizer=hashemb.SGD(lr=1.0), init=hashemb.Zeros()) as table:
        table.update(np.arange(ROWS), np.ones((ROWS, 16), np.float32))
        child = os.fork()
        if child == 0:  # pragma: no cover
            status = 1
            try:
                table.update([7], np.ones((1, 16), np.float32))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        row = int(table.rows([7])[0])
        others = np.bincount(table.rows(np.arange(ROWS)), minlength=ROWS)[row]
        np.testing.assert_array_equal(table.lookup([7]), np.full((1, 16), -1.0 - others, np.float32))


@pytest.mark.parametrize("value", [1, 0, "yes", "auto", []])
def test_huge_pages_is_a_flag_or_none(tmp_path: Path, value: Any) -> None:
    message = f"huge_pages must be True, False or None, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        create(tmp_path / "t", huge_pages=value)
    assert os.listdir(tmp_path) == []
    create(tmp_path / "t", huge_pages=np.True_).close()
    with pytest.raises(TypeError, match=message):
        hashemb.open(tmp_path / "t", huge_pages=value)


def test_a_kernel_that_cannot_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    with create(tmp_path / "t", num_embeddings=12345, embedding_dim=3) as table:
        monkeypatch.setattr(_huge_pages.fcntl, "ioctl", refuse)
        assert table.stats().huge_page_bytes is None
