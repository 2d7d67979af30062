"""Source tables that are trained a little between deltas, and comparisons of replicas with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb

OPTIONS: dict[str, Any] = {"num_embeddings": 5000, "embedding_dim": 5, "init": hashemb.Uniform(0.5), "seed": 3}
EVERY_KEY = np.arange(-50, 3000)


def train(table: hashemb.EmbeddingTable, seed: int, *, steps: int = 3, keys: Any = None) -> None:
    """Take some steps on random keys from `EVERY_KEY`, or on `keys`."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        batch = rng.choice(EVERY_KEY, 40) if keys is None else keys
        table.update(batch, rng.normal(size=(len(batch), table.embedding_dim)).astype(np.float32))


def chain(source: hashemb.EmbeddingTable, directory: Path, count: int, **export: Any) -> list[hashemb.DeltaInfo]:
    """Export deltas 0.delta, 1.delta … of a source that is trained before each; the first contains everything."""
    infos: list[hashemb.DeltaInfo] = []
    for number in range(count):
        train(source, seed=number)
        since = infos[-1] if infos else None
        infos.append(source.export_delta(since, directory / f"{number}.delta", **export))
    return infos


def files_of(directory: Path, count: int) -> list[Path]:
    return [directory / f"{number}.delta" for number in range(count)]


def contents(table: hashemb.EmbeddingTable, *, state: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Return copies of the arrays of a table by name; without `state`, only those that look-ups need."""
    arrays = {"weight": table.weight, **table.state}
    return {name: array.copy() for name, array in arrays.items() if state or name in ("weight", "paid")}


def assert_same(left: dict[str, npt.NDArray[Any]], right: dict[str, npt.NDArray[Any]]) -> None:
    """Assert that both are equal, bit for bit."""
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array.view(np.uint8), right[name].view(np.uint8), err_msg=name)


def snapshot_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file of a table, without the parts that opening it for writing changes: boot id and checksum."""
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        yield file.name, data[:48] + data[56:128] if file.name == "control" else data
