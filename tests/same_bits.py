"""Print digests of what the compiled code computes, so that two builds of the package can be compared bit for bit.

    $ PYTHONPATH=/path/to/one/build python tests/same_bits.py >one.txt
    $ PYTHONPATH=/path/to/another python tests/same_bits.py >another.txt
    $ diff one.txt another.txt                                             # equal files: equal bits

Each line is a case and the SHA-256 of its results: hashed keys of many dtypes; rows, states and look-ups of tables of
every dtype, optimiser and usual dimension after updates with repeated keys, bags and weights; text read by the readers;
and the tables of models trained on a synthetic stream. Each part runs with every instruction set of this CPU and with
one and several threads, and has the same digests in all of these cases, so one line stands for all; otherwise the line
ends with the names of the cases that differ. Builds of before the package had rooms are supported.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ISAS = ("baseline", "avx2", "avx512")
THREADS = (1, 3)
DIMS = (1, 4, 8, 16, 17, 32, 48, 64, 128)


def digest(*arrays: Any) -> str:
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        found.update(repr((array.dtype.str, array.shape)).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def first_module(*names: str) -> Any:
    """Import the first of these modules that exists."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"none of {names}")


# ---- hashing ----


def columns() -> Iterator[tuple[str, Any]]:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**63, 3000, dtype=np.uint64) >> rng.integers(0, 63, 3000, dtype=np.uint64)
    texts = [hex(word)[2 : 2 + int(word) % 17] + "é" * (int(word) % 3) for word in words]
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", "?"):
        yield dtype, words.astype(dtype)
    yield "U", np.array(texts)
    yield "S", np.array([text.encode() for text in texts])
    yield "objects", [None if i % 7 == 0 else i if i % 3 else text for i, text in enumerate(texts)]
    pyarrow = importlib.import_module("pyarrow")
    with_missing = [None if i % 5 == 0 else text for i, text in enumerate(texts)]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary()):
        yield str(kind), pyarrow.array(with_missing).cast(kind)
    yield "dictionary", pyarrow.array(with_missing).dictionary_encode()
    yield "chunks", pyarrow.chunked_array([pyarrow.array(words[:1000]), pyarrow.array(words[1000:])])


def hashing() -> Iterator[tuple[str, str]]:
    import hashemb

    for name, values in columns():
        yield f"hash_keys {name}", digest(hashemb.hash_keys(values, field="f"), hashemb.hash_keys(values))
    fields = {name: values for name, values in columns() if name in {"i4", "U", "string", "objects"}}
    yield "hash_fields", digest(hashemb.hash_fields(fields))


# ---- tables ----


def tables(place: str) -> Iterator[tuple[str, str]]:
    import hashemb

    optimizers = {
        "adagrad": hashemb.Adagrad(lr=0.1, weight_decay=0.01),
        "adagrad_plain": hashemb.Adagrad(lr=0.1),
        "rowwise": hashemb.RowWiseAdagrad(lr=0.1),
        "sgd": hashemb.SGD(lr=0.1, weight_decay=0.001),
        "ftrl": hashemb.FTRL(alpha=0.1, l1=0.01, l2=0.1),
    }
    inits = (hashemb.Uniform(0.1), hashemb.Normal(0.1), hashemb.Zeros())
    cases = itertools.product(("float32", "float16", "bfloat16"), optimizers, DIMS)
    for number, (dtype, name, dim) in enumerate(cases):
        path = os.path.join(place, f"{dtype}-{name}-{dim}")
        options = {"init": inits[number % 3], "num_hashes": 1 + number % 2, "seed": number}
        with hashemb.create(
            path, num_embeddings=5003, embedding_dim=dim, dtype=dtype, optimizer=optimizers[name], **options
        ) as table:
            results = train_table(table, dim)
        files = [np.fromfile(file, np.uint8) for file in sorted(Path(path).glob("*.npy"))]
        yield f"table {dtype} {name} {dim}", digest(*results, *files)


def train_table(table: Any, dim: int) -> list[Any]:
    rng = np.random.default_rng(dim)
    results = []
    for step, pooling in enumerate(("sum", "mean", "sqrtn")):
        keys = np.minimum(rng.zipf(1.3, 20_000), 2**40).astype(np.int64)
        keys[::9] *= -1
        weights = rng.random(len(keys), dtype=np.float32) if step else None
        offsets = np.sort(np.r_[0, rng.integers(0, len(keys), 4_999), len(keys)])
        table.update(keys, rng.standard_normal((len(keys), dim), dtype=np.float32))
        bags = {"offsets": offsets, "pooling": pooling, "per_sample_weights": weights}
        table.update(keys, rng.standard_normal((len(offsets) - 1, dim), dtype=np.float32), **bags)
        results += [table.lookup(keys), table.lookup(keys, **bags), table.rows(keys)]
    return results


# ---- readers and models ----


def text(place: str) -> Iterator[tuple[str, str]]:
    synthetic = first_module("hashemb.ctr.synthetic")
    readers = first_module("hashemb.ctr.data", "hashemb.ctr.readers")
    stream = synthetic.ImpressionStream(seed=3, max_vocabulary=100_000)
    stream.write(os.path.join(place, "stream.tsv"), 0, 5_000)
    rng = np.random.default_rng(4)
    lines = [" ".join(f"{j + 1}:{rng.random():.9g}" for j in range(i % 9)) for i in range(2_000)]
    Path(place, "lines.svm").write_text("".join(f"{i % 2} {line}\n" for i, line in enumerate(lines)))
    for file, form in (("stream.tsv", "criteo"), ("lines.svm", "libsvm")):
        arrays = []
        for batch in readers.open_reader(os.path.join(place, file), format=form):
            extra = [batch.offsets, batch.values] if getattr(batch, "offsets", None) is not None else []
            arrays += [batch.labels, batch.keys, *extra]
        yield f"text {form}", digest(*arrays)


def models(place: str) -> Iterator[tuple[str, str]]:
    import hashemb

    shallow = first_module("hashemb.ctr.models")
    synthetic = first_module("hashemb.ctr.synthetic")
    stream = synthetic.ImpressionStream(seed=5, max_vocabulary=100_000)
    parts = [stream.generate(start, 4_000) for start in range(0, 16_000, 4_000)]
    batches = [(part.keys(), part.labels) for part in parts]
    kinds = {
        "lr": (1, lambda table: shallow.FactorizationMachine(table)),
        "fm": (17, lambda table: shallow.FactorizationMachine(table)),
        "fm16": (16, lambda table: shallow.FactorizationMachine(table)),
        "fwfm": (9, lambda table: shallow.FieldWeightedFM(table, num_fields=39)),
        "ffm": (1 + 39 * 4, lambda table: shallow.FieldAwareFM(table, num_fields=39)),
    }
    for name, (dim, model_of) in kinds.items():
        path = os.path.join(place, name)
        optimizer = hashemb.Adagrad(lr=0.05, initial_accumulator_value=1.0)
        with hashemb.create(path, num_embeddings=20_000, embedding_dim=dim, optimizer=optimizer) as table:
            model = model_of(table)
            results = [model.learn(keys, labels) for keys, labels in batches]
            results += [learn_ragged(model, *batches[0])]
            results += [model.predict_logits(batches[0][0])]
        files = [np.fromfile(file, np.uint8) for file in sorted(Path(path).glob("*.npy"))]
        yield f"model {name}", digest(*results, *files)


def learn_ragged(model: Any, keys: Any, labels: Any) -> Any:
    """Learn examples of 0 to 38 of the keys each, with values and weights."""
    rng = np.random.default_rng(6)
    counts = rng.integers(0, 39, len(keys))
    taken = np.arange(keys.shape[1]) < counts[:, None]
    offsets = np.r_[0, np.cumsum(counts)]
    fields = np.broadcast_to(np.arange(keys.shape[1], dtype=np.int32), keys.shape)[taken]
    values = rng.random(offsets[-1], dtype=np.float32)
    weights = rng.random(len(keys), dtype=np.float32)
    return model.learn(keys[taken], labels, offsets=offsets, values=values, fields=fields, weights=weights)


# ---- processes ----


def run_part(part: str, threads: int) -> None:
    import hashemb

    hashemb.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        found = {"hashing": hashing, "tables": tables, "text": text, "models": models}[part]
        for name, value in found() if part == "hashing" else found(place):  # type: ignore[operator]
            print(f"{name}\t{value}", flush=True)


def digests(part: str, isa: str, threads: int) -> dict[str, str]:
    """Run one part in a process with one instruction set; none if this CPU lacks it."""
    command = [sys.executable, __file__, part, str(threads)]
    done = subprocess.run(command, env={**os.environ, "HASHEMB_ISA": isa}, capture_output=True, text=True)
    if done.returncode and "no kernels for the instruction set" in done.stderr:
        return {}
    if done.returncode:
        raise RuntimeError(f"{part} with {isa} failed:\n{done.stderr}")
    return dict(line.rsplit("\t", 1) for line in done.stdout.splitlines())


def main() -> None:
    for part in ("hashing", "text", "models", "tables"):
        found = {(isa, n): digests(part, isa, n) for isa in ISAS for n in THREADS}
        usual = found["baseline", 1]
        for name, value in usual.items():
            odd = [f"{isa}/{n}" for (isa, n), values in found.items() if values and values[name] != value]
            print(f"{name}\t{value}", *odd, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_part(sys.argv[1], int(sys.argv[2]))
    else:
        main()
