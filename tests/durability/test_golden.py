"""Tables written by earlier versions read the same, and further training gives the same bits."""

from __future__ import annotations

import base64
import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import hashemb

GOLDEN = Path(__file__).parents[1] / "golden"
FORMAT1 = json.loads((GOLDEN / "format1.json").read_text())

spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture(params=FORMAT1)
def golden(request, tmp_path):
    content = FORMAT1[request.param]
    directory = tmp_path / request.param
    directory.mkdir()
    for name, packed in content["files"].items():
        (directory / name).write_bytes(zlib.decompress(base64.b64decode(packed)))
    return directory, content, request.param


def test_reads_as_written(golden):
    directory, content, _ = golden
    with hashemb.open(directory) as table:
        assert table.rows(make.KEYS).tolist() == content["rows"]
        assert table.lookup(make.KEYS).view(np.uint32).tolist() == content["lookup_bits"]
        assert table.step == 6


def test_learns_on_to_the_same_bits(golden):
    directory, content, _ = golden
    with hashemb.open(directory, "r+") as table:
        make.train(table, range(3, 4))
        assert make.weight_sha256(table) == content["sha256_after"]


def test_todays_tables_are_the_golden_ones(golden, tmp_path):
    """The files written now equal those of the golden table byte for byte, except for id, version and boot."""
    directory, _, name = golden
    with hashemb.create(tmp_path / "new", **make.TABLES[name]) as table:
        make.train(table, range(3))
    for file in directory.glob("*.npy"):
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {f.name for f in (tmp_path / "new").iterdir()} == {f.name for f in directory.iterdir()}
