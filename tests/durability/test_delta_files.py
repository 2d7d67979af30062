"""Every byte of a delta file is covered by a check, and a damaged one is refused before anything is written."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_chains import OPTIONS, chain, files_of, snapshot_files, train
from disks import fill, mounted

import hashemb
from hashemb._files.sealed import checksum_of
from hashemb.errors import CorruptTableError, FormatError, NoSpaceError

DECAY = hashemb.Adagrad(lr=0.1, weight_decay=0.5)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Make a file with all kinds of sections: weights, state and the decay that rows have paid."""
    place = tmp_path_factory.mktemp("delta")
    with hashemb.create(place / "s", **OPTIONS, optimizer=DECAY) as source:
        train(source, 0, keys=np.arange(60))
        source.export_delta(None, place / "0.delta", state=True)
    return (place / "0.delta").read_bytes()


@pytest.fixture
def replica(tmp_path: Path) -> Any:
    with hashemb.create(tmp_path / "r", **OPTIONS, optimizer=DECAY) as table:
        yield table


def refused(replica: hashemb.EmbeddingTable, file: Path, data: bytes, message: str | None = None) -> None:
    file.write_bytes(data)
    before = dict(snapshot_files(Path(replica.path)))
    assert hashemb.check_delta(file), "the damage was not found"
    with pytest.raises(FormatError, match=message):
        hashemb.apply_delta(replica, file)
    assert dict(snapshot_files(Path(replica.path))) == before


def test_the_whole_file_is_accepted(replica: hashemb.EmbeddingTable, delta: bytes, tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    (tmp_path / "0.delta").write_bytes(delta)
    assert hashemb.check_delta(tmp_path / "0.delta") == []
    hashemb.apply_delta(replica, tmp_path / "0.delta")


def test_every_region_flipped(replica: hashemb.EmbeddingTable, delta: bytes, tmp_path: Path) -> None:
    """Flip a bit in each page of the file: header, numbers, hashes, each array, and padding; 500 in all."""
    rng = random.Random(1)
    pages = len(delta) // 4096
    places = [page * 4096 + rng.randrange(4096) for page in range(pages)] + [*range(32), 4095, len(delta) - 1]
    places += [rng.randrange(len(delta)) for _ in range(500 - len(places))]
    assert len(places) >= 500
    for number, at in enumerate(places):
        damaged = bytearray(delta)
        damaged[at] ^= 1 << rng.randrange(8)
        (tmp_path / "0.delta").write_bytes(damaged)
        assert hashemb.check_delta(tmp_path / "0.delta"), f"byte {at} of {len(delta)}"
        if number % 25 == 0:
            refused(replica, tmp_path / "0.delta", bytes(damaged))


def test_cut_and_extended(replica: hashemb.EmbeddingTable, delta: bytes, tmp_path: Path) -> None:
    for size in (0, 1, 8, 15, 16, 100, 4095, 4096, 4097, 8192, len(delta) // 2, len(delta) - 4096, len(delta) - 1):
        refused(replica, tmp_path / "0.delta", delta[:size], "expected")
    refused(replica, tmp_path / "0.delta", delta + b"\0", f"expected {len(delta)} bytes, found {len(delta) + 1}")
    refused(replica, tmp_path / "0.delta", delta + bytes(4096))


def test_swapped_pages(replica: hashemb.EmbeddingTable, delta: bytes, tmp_path: Path) -> None:
    """Exchange blocks, or replace a page by zeros: each is well-formed by itself."""
    pages = [delta[at : at + 4096] for at in range(0, len(delta), 4096)]
    data = [number for number, page in enumerate(pages) if any(page)][3:]
    assert pages[data[0]] != pages[data[1]]
    swapped = pages.copy()
    swapped[data[0]], swapped[data[1]] = pages[data[1]], pages[data[0]]
    refused(replica, tmp_path / "0.delta", b"".join(swapped), "expected hash")
    cleared = pages.copy()
    cleared[data[-1]] = bytes(4096)
    refused(replica, tmp_path / "0.delta", b"".join(cleared), "expected hash")


def header_of(delta: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(delta[16 : 16 + struct.unpack_from("<Q", delta, 8)[0]])
    return content


def with_header(delta: bytes, **changes: Any) -> bytes:
    """Return the file with another header that has a correct checksum."""
    content = header_of(delta) | changes
    del content["checksum"]
    text = json.dumps({**content, "checksum": checksum_of(content)}).encode()
    return (delta[:8] + struct.pack("<Q", len(text)) + text).ljust(4096, b"\0") + delta[4096:]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": 2}, "format 2, this version reads up to 1"),
        ({"num_blocks": 10**9}, "num_blocks up to the table's 40, found 1000000000"),
        ({"num_blocks": -1}, "num_blocks to be .*, found -1"),
        ({"num_blocks": "7"}, "num_blocks to be an integer"),
        ({"num_blocks": 1}, "expected .* bytes"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "float16"}, "float16"),
        ({"lr": -1.0}, "lr to be .* found -1.0"),
        ({"decay_total": 1.0}, "decay_total to be .* found 1.0"),
        ({"sequence": -1}, "sequence to be .* found -1"),
        ({"table": {}}, "cannot read it: expected a field table.format"),
        ({"surprise": 1}, "expected no other fields, found 'surprise'"),
        ({"index_hash": "0" * 64}, "expected SHA-256 0000"),
    ],
    ids=str,
)
def test_headers_that_lie(
    replica: hashemb.EmbeddingTable, delta: bytes, tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    assert with_header(delta) == delta
    refused(replica, tmp_path / "0.delta", with_header(delta, **changes), error)


def test_what_is_no_delta(replica: hashemb.EmbeddingTable, tmp_path: Path) -> None:
    refused(replica, tmp_path / "0.delta", b"PK\x03\x04" + bytes(9000), "not a delta")
    with pytest.raises(FileNotFoundError):
        hashemb.check_delta(tmp_path / "gone.delta")
    (tmp_path / "1.delta").write_bytes(b"hashembD" + struct.pack("<Q", 2**40))
    with pytest.raises(CorruptTableError, match="header of at most"):
        hashemb.delta_info(tmp_path / "1.delta")


def test_the_layout_in_the_documentation(delta: bytes) -> None:
    """Parse a file by hand as specified in docs/reference/format.md, without the reader of the package."""
    content = header_of(delta)
    n, arrays = content["num_blocks"], content["arrays"]
    assert delta[:8] == b"hashembD"
    assert list(arrays) == ["weight", "accumulator", "paid"]

    def up(size: int) -> int:
        return -(-size // 4096) * 4096

    at = up(16 + struct.unpack_from("<Q", delta, 8)[0])
    assert len(delta) == at + content["data_bytes"]
    numbers = np.frombuffer(delta, "<u8", n, at)
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    at += up(8 * n) + up(8 * n * len(arrays))
    for spec in arrays.values():
        rows = np.frombuffer(delta, spec["dtype"], n * int(np.prod(spec["shape"])), at)
        assert rows.any()
        at += up(rows.nbytes)
    assert at == len(delta)


# ---- a full disk ----


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    yield from mounted(request.param, 16, tmp_path)


def test_export_to_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """The export is refused, nothing is left there, and the history of the source does not contain it."""
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        chain(source, tmp_path, 1)
        train(source, 1)
        fill(small_disk)
        before = sorted(os.listdir(small_disk))
        with pytest.raises(NoSpaceError):
            source.export_delta(tmp_path / "0.delta", small_disk / "1.delta")
        assert sorted(os.listdir(small_disk)) == before
        assert source.export_delta(tmp_path / "0.delta", tmp_path / "1.delta").sequence == 1


def test_apply_to_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """The delta is refused before a row is written; after space is freed, the same call succeeds."""
    options = {**OPTIONS, "num_embeddings": 2**20, "embedding_dim": 16}
    with hashemb.create(tmp_path / "s", **options) as source:
        first = source.export_delta(None, tmp_path / "0.delta")
        source.update(np.arange(1000), np.ones((1000, 16), np.float32))
        source.export_delta(first, tmp_path / "1.delta")
        expected = source.lookup(np.arange(1000))
    with hashemb.create(small_disk / "r", **options, optimizer=hashemb.SGD()) as replica:
        hashemb.apply_delta(replica, tmp_path / "0.delta")
        replica.stats(exact=True)  # on tmpfs, this allocates the pages of blocks.npy
        vectors = replica.lookup(np.arange(1000))
        ballast = fill(small_disk)
        with pytest.raises(NoSpaceError, match="no space left"):
            hashemb.apply_delta(replica, tmp_path / "1.delta")
        assert replica.step == 0
        np.testing.assert_array_equal(replica.lookup(np.arange(1000)), vectors)
        ballast.unlink()
        hashemb.open(small_disk / "r").close()  # it would warn of a partly applied delta
        hashemb.apply_delta(replica, tmp_path / "1.delta")
        np.testing.assert_array_equal(replica.lookup(np.arange(1000)), expected)


def test_files_are_where_the_chain_says(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "s", **OPTIONS) as source:
        infos = chain(source, tmp_path, 2, dtype="bfloat16")
    assert [hashemb.delta_info(file) for file in files_of(tmp_path, 2)] == infos
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.delta", "1.delta", "s"]
