"""Damaged files: `verify` finds each, restoring from them is refused, and opening them never kills the process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pytest
from damage import Damage

import hashemb
from hashemb import errors

ARRAYS = ["weight.npy", "accumulator.npy", "paid.npy", "blocks.npy", "checksums.npy"]
SMALL = ["meta.json", "control", "lock", "history.json", "snapshot.json"]
DOCUMENTED = {"opened", "FormatError", "CorruptTableError", "FileNotFoundError", "HashembError"}
OPTIONS = {"num_embeddings": 1500, "embedding_dim": 16, "optimizer": hashemb.Adagrad(lr=0.1, weight_decay=0.01)}


def train(table: hashemb.EmbeddingTable, seed: int) -> None:
    """Train some rows of some blocks; the others stay unwritten."""
    rng = np.random.default_rng(seed)
    table.update(np.arange(12), rng.normal(size=(12, 16)).astype(np.float32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a table, closed after its last update, two snapshots of it, and one of another table of the same shape."""
    place = tmp_path_factory.mktemp("damage")
    for name, seed in (("table", 0), ("foreign", 9)):
        with hashemb.create(place / name, **OPTIONS, seed=seed) as table:
            for step in range(2):
                train(table, seed + step)
                table.snapshot(place / f"{name}.{step}", extra={"position": 12})
            train(table, seed + 5)
    return place


@pytest.fixture
def copied(made: Path, tmp_path: Path):
    """Return a function that makes a fresh copy of one of the directories."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(made / name, tmp_path / "copy")

    return copy


def files_of(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def snapshot_damages(made: Path) -> list[Damage]:
    """Return damages of every file of a snapshot: at least 500, each of which must be found."""
    snapshot, found = made / "table.1", []
    for file in files_of(snapshot):
        found += damage.drawn(snapshot, file, 1, flips=36)
        found += [Damage("replace", file, other=str(made / other / file)) for other in ("table.0", "foreign.1")]
    for i, one in enumerate(ARRAYS + SMALL):
        found += [Damage("swap", one, other=other) for other in (ARRAYS + SMALL)[i + 1 :]]
    for file in ARRAYS[:3]:
        found += [Damage("exchange", file, 4096 * (1 + a), 4096 * (2 + a)) for a in range(2)]
    return found


def table_damages(made: Path) -> list[Damage]:
    """Return damages of a closed table, in places that are covered by a checksum or a size."""
    table, found = made / "table", []
    for file in files_of(table):
        if file.endswith(".npy"):
            drawn = damage.drawn(table, file, 2, flips=60)
            found += [d for d in drawn if d.kind not in ("flip", "fill") or d.a + d.b // 512 < 3500]
        else:
            found += damage.drawn(table, file, 2, flips=36)
        if file not in ("weight.npy", "accumulator.npy", "paid.npy", "blocks.npy"):
            found.append(Damage("replace", file, other=str(made / "foreign" / file)))
    return [d for d in found if (d.kind, d.file) != ("remove", "history.json")]


def missed(directory: Path, damages: list[Damage], copied) -> list[Damage]:
    """Return the damages after which no problem is found."""
    missing, changed = [], 0
    for one in damages:
        copy = copied(directory.name)
        if one.apply(copy):
            changed += 1
            problems = hashemb.verify(copy)
            if not problems or not all(str(problem) for problem in problems):
                missing.append(one)
    assert changed > 0.9 * len(damages), f"only {changed} of {len(damages)} changed anything"
    return missing


def test_what_is_undamaged_is_in_order(made: Path) -> None:
    for name in ("table", "table.0", "table.1", "foreign.1"):
        assert hashemb.verify(made / name) == []


def test_every_damage_of_a_snapshot_is_found(made: Path, copied) -> None:
    damages = snapshot_damages(made)
    assert len(damages) >= 500
    assert missed(made / "table.1", damages, copied) == []


def test_every_damage_of_what_has_check_sums_in_a_table_is_found(made: Path, copied) -> None:
    damages = table_damages(made)
    assert len(damages) >= 200
    assert missed(made / "table", damages, copied) == []


def test_rows_never_written_are_guarded_by_being_zero(made: Path, copied) -> None:
    blocks = np.load(made / "table" / "blocks.npy")
    (idle,) = np.flatnonzero(blocks == 0)[:1]
    for file, block_bytes in (("weight.npy", 4096), ("accumulator.npy", 4096), ("paid.npy", 512)):
        copy = copied("table")
        Damage("flip", file, 4096 + int(idle) * block_bytes + 77, 3).apply(copy)
        (problem,) = hashemb.verify(copy)
        assert problem.file == str(copy / file)
        assert f"1 other bytes in block {idle} " in problem.found


@pytest.mark.slow
def test_every_single_bit_of_a_snapshot(tmp_path: Path) -> None:
    """Flip all bits in all files of a table of one row: about 140,000 of them."""
    with hashemb.create(tmp_path / "t", num_embeddings=1, embedding_dim=2, optimizer=hashemb.SGD()) as table:
        table.update([1], np.ones((1, 2), np.float32))
        table.snapshot(tmp_path / "s")
    assert hashemb.verify(tmp_path / "s") == []
    for path in (tmp_path / "s").iterdir():
        original = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for bit in range(8 * len(original)):
                file.seek(bit // 8)
                file.write(bytes([original[bit // 8] ^ 1 << bit % 8]))
                assert hashemb.verify(tmp_path / "s"), f"bit {bit} of {path.name}"
                file.seek(bit // 8)
                file.write(original[bit // 8 : bit // 8 + 1])
        assert path.read_bytes() == original
    assert hashemb.verify(tmp_path / "s") == []


@pytest.mark.parametrize("name", ["table.1", "table"])
def test_opening_what_is_damaged_never_ends_the_process(made: Path, name: str) -> None:
    """A table opens or reports why not, in both modes. A child process opens it, so that a crash is noticed."""
    damages = (snapshot_damages if name == "table.1" else table_damages)(made)
    child = subprocess.run(
        [sys.executable, damage.__file__, str(made / name)],
        input=damage.encode(damages), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"after {damages[len(results)]}: {child.returncode} {child.stderr[-2000:]}"
    assert len(results) == len(damages)
    assert {result for pair in results for result in pair} == DOCUMENTED - {"FileNotFoundError", "HashembError"}


@pytest.mark.parametrize("file", ARRAYS + SMALL)
def test_restoring_from_a_damaged_snapshot_is_refused(made: Path, copied, tmp_path: Path, file: str) -> None:
    """The error names the problem, and nothing is left behind."""
    size = (made / "table.1" / file).stat().st_size
    damages = [Damage("extend", file, 1, 32)]
    damages += [Damage("flip", file, at, 5) for at in (100, size - 3) if size]
    for one in damages:
        copy = copied("table.1")
        assert one.apply(copy)
        with pytest.raises((errors.CorruptTableError, errors.FormatError), match=f"{file}|check sum"):
            hashemb.restore(copy, tmp_path / "restored")
        assert not list(tmp_path.glob("*restored*"))
