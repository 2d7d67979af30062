"""Hostile files of every format that `open_reader` takes; see hostile_files.py."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from criteo_lines import criteo_rows, tsv
from hostile_files import Case, WrongError, changed, overwritten, packed

from hashemb import cli
from hashemb.ctr.data import open_reader

_CSV = (
    b'click,site,age,"odd, name",price\n1,a.com,7,"x\ny",0.5\n0,"b,c",8,"say ""hi""",1e3\n1,,9,z,\n'
    + b"0,d.com,10,w,-2.25\n1,caf\xc3\xa9,11,v,inf\n" * 8
)
_FFM = b"1 0:3:0.5 2:7:1\n-1 2:1:1 # c\n-1 site:5:1e-3\n" * 9
_SVM = b"1 3:0.5 7:1\n-1 2:1 # a comment\n-1 1:-2e-3\n" * 9
_VW = b"1 2.5 'tag|user ann age:0.5 |ad:2 shoes\n-1 |ad hats\n-1 tag| plain:3\n" * 9
_WORDS = [
    b"\n", b"\r\n", b"\r", b",", b"\t", b"|", b":", b'"', b'""', b"#", b"'", b" ", b"\0", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\xc3", b"\xed\xa0\x80", b"nan", b"inf", b"-1", b"1e999", b"9" * 25, b"0" * 5000 + b"1", b"-", b"0x10",
    b"label", b"click", b"\xff" * 8, b"\x7f\xff\xff\xff", b"PAR1", b"a" * 300, b"\xf0\x9f\x98\x80", b",,,,,\n",
]  # fmt: skip


def _parquet(**options: object) -> bytes:
    n = 60
    table = pa.table(
        {
            "label": pa.array([0, 1] * (n // 2)),
            "site": pa.array([None if i % 7 == 3 else f"s{i % 5}" for i in range(n)]),
            "codes": pa.array([f"c{i % 3}" for i in range(n)]).dictionary_encode(),
            "user": pa.array(np.arange(n) ** 5),
            "big": pa.array(np.arange(n, dtype=np.uint64) + 2**63),
            "price": pa.array(np.linspace(-1, 1e9, n)),
            "flag": pa.array([True, False, None] * (n // 3)),
            "raw": pa.array([bytes([i]) * (i % 4) for i in range(n)]),
        }
    )
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=25, **options)
    return file.getvalue()


_SOURCES: dict[str, bytes] = {
    "a.csv": _CSV,
    "a.csv.gz": _CSV,
    "a.tsv": tsv(criteo_rows(12)),
    "a.ffm": _FFM,
    "a.svm": _SVM,
    "a.vw": _VW,
    "a.txt": _FFM,
    "a.parquet": _parquet(),
    "plain.parquet": _parquet(compression="none", use_dictionary=False),
    "a.pq": _parquet(compression="gzip", data_page_version="2.0", store_schema=False),
}


def cases(directory: Path) -> Case:
    """Return a case that reads a mutated file of some format to its end; one in forty also trains the command line."""
    return _case


def _case(place: Path, rng: random.Random) -> str:
    name = rng.choice(list(_SOURCES))
    data = changed(_SOURCES[name], rng, _WORDS)
    if name.endswith((".parquet", ".pq")) and rng.random() < 0.7:
        data = overwritten(_SOURCES[name], rng)
    if name.endswith(".gz"):
        data = packed(data) if rng.random() < 0.5 else changed(packed(_SOURCES[name]), rng, _WORDS)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / name
    path.write_bytes(data)
    if rng.random() < 0.025:
        return _learned(path)
    return _read(path, rng)


def _read(path: Path, rng: random.Random) -> str:
    try:
        with open_reader(path, batch_size=rng.choice([1, 7, 1000]), strict=rng.random() < 0.1) as reader:
            rows = sum(batch.num_examples for batch in reader)
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise WrongError(f"{type(error).__name__} does not name the file: {error}") from error
        return f"{path.suffix} {type(error).__name__}"
    return f"{path.suffix} read" if rows else f"{path.suffix} no rows"


def _learned(path: Path) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main(["train", str(path), "-t", str(path.parent / "T"), "--rows", "1000", "--rank", "2"])
    if status not in (0, 1) or (status and not errors.getvalue().startswith("hashemb: ")):
        raise WrongError(f"status {status}: {errors.getvalue()}")
    return f"status {status}"
