"""Write the golden tables of the current format. Run this by hand, once per format version, never in a test.

    python tests/golden/make.py

A golden file is JSON text: the bytes of every file of a few small trained tables (zlib, base64), the vectors that
look-ups must return, and the SHA-256 of the weights after one more update. The program refuses to replace a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

import hashemb

KEYS = [0, 1, -1, 7, 2**24 - 1, 2**24 + 1, 2**31, 2**63 - 1, -(2**63), 12345678901234567, 40, 41]
TABLES = {
    "adagrad_decay": {
        "num_embeddings": 61,
        "embedding_dim": 5,
        "optimizer": hashemb.Adagrad(lr=0.1, initial_accumulator_value=0.25, weight_decay=0.01),
        "init": hashemb.Uniform(0.5),
        "seed": 3,
    },
    "rowwise_bfloat16": {
        "num_embeddings": 100,
        "embedding_dim": 16,
        "dtype": "bfloat16",
        "optimizer": hashemb.RowWiseAdagrad(lr=0.2),
        "init": hashemb.Normal(0.3),
        "num_hashes": 2,
        "seed": 2**64 - 1,
    },
    "ftrl_float16": {
        "num_embeddings": 257,
        "embedding_dim": 3,
        "dtype": "float16",
        "optimizer": hashemb.FTRL(alpha=0.3, beta=1.0, l1=0.01, l2=0.1),
        "init": hashemb.Zeros(),
    },
    "sgd": {"num_embeddings": 33, "embedding_dim": 1, "optimizer": hashemb.SGD(lr=0.5), "init": hashemb.Normal(1.0)},
}


def gradient(dim: int, step: int) -> np.ndarray:
    """Return values that are exact in float32 and need no random generator and no library function."""
    i = np.arange(len(KEYS) * dim).reshape(len(KEYS), dim)
    return (((i * 37 + step * 11) % 64) / 32.0 - 1.0).astype(np.float32)


def train(table: hashemb.EmbeddingTable, steps: range) -> None:
    """Take some steps, half of them pooled, on the first half of the keys."""
    for step in steps:
        table.update(KEYS[:6], gradient(table.embedding_dim, step)[:6])
        table.update(
            KEYS[:6], gradient(table.embedding_dim, step + 50)[:2], offsets=[0, 4, 6], pooling="sqrtn"
        )


def weight_sha256(table: hashemb.EmbeddingTable) -> str:
    return hashlib.sha256(table.weight.tobytes()).hexdigest()


def describe(directory: Path, options: dict[str, object]) -> dict[str, object]:
    with hashemb.create(directory, **options) as table:  # type: ignore[arg-type]
        train(table, range(3))
    packed = {
        file.name: base64.b64encode(zlib.compress(file.read_bytes(), 9)).decode()
        for file in sorted(directory.iterdir())
    }
    with hashemb.open(directory, "r+") as table:
        vectors = table.lookup(KEYS).view(np.uint32).tolist()
        rows = table.rows(KEYS).tolist()
        train(table, range(3, 4))
        return {"files": packed, "rows": rows, "lookup_bits": vectors, "sha256_after": weight_sha256(table)}


def main() -> None:
    target = Path(__file__).parent / "format1.json"
    if target.exists():
        sys.exit(f"{target} exists: a golden file is written once")
    with tempfile.TemporaryDirectory() as directory:
        content = {name: describe(Path(directory) / name, options) for name, options in TABLES.items()}
    target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
