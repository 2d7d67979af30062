"""`hashemb verify` and `hashemb repair`: their output and exit codes, and a model that works again afterwards."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from criteo_lines import criteo_rows, tsv

import hashemb
from hashemb import cli

SMALL = ["--rows", "2^14", "--rank", "3", "--batch-size", "128"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, and next to it a snapshot of its table before the last update."""
    place = tmp_path_factory.mktemp("model")
    (place / "clicks.tsv").write_bytes(tsv(criteo_rows(500)))
    assert cli.main(["train", str(place / "clicks.tsv"), "-t", str(place / "T"), *SMALL]) == 0
    with hashemb.open(place / "T", "r+") as table:
        table.snapshot(place / "S")
        table.update([1], np.ones((1, 4), np.float32))
    return place


@pytest.fixture
def model(trained: Path, tmp_path: Path, capsys: Any) -> Path:
    for name in ("T", "S"):
        shutil.copytree(trained / name, tmp_path / name)
    capsys.readouterr()
    return tmp_path / "T"


def damage(table: Path) -> None:
    os.truncate(table / "weight.npy", 10_000)


def test_in_order(model: Path, capsys: Any) -> None:
    assert cli.main(["verify", str(model)]) == 0
    assert cli.main(["verify", str(model.parent / "S")]) == 0
    assert cli.main(["repair", str(model), "--from", str(model.parent / "S")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{model}: nothing is wrong",
        f"{model.parent / 'S'}: nothing is wrong",
        f"{model}: nothing is wrong, nothing to repair",
    ]
    assert err == ""
    assert sorted(path.name for path in model.parent.iterdir()) == ["S", "T"]


def test_problems_are_lines_and_a_status(model: Path, capsys: Any) -> None:
    damage(model)
    (model / "lock").write_text("x")
    size = 4096 + 2**14 * 16
    assert cli.main(["verify", str(model)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{model}/lock: expected 0 bytes, found 1",
        f"{model}/weight.npy: expected {size} bytes, found 10000 bytes",
    ]


def test_repaired(trained: Path, model: Path, capsys: Any) -> None:
    """The model predicts again, and the damaged table is at the path that the command prints."""
    step = hashemb.info(model).step
    damage(model)
    assert cli.main(["predict", str(trained / "clicks.tsv"), "-t", str(model)]) == 1
    assert cli.main(["repair", str(model), "--from", str(model.parent / "S"), "--yes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"{model} is restored. The snapshot is of step {step - 1:,}, the table of step {step:,}: "
        "what lies between is lost.",
        f"The damaged table: {model}.damaged-1",
    ]
    assert cli.main(["verify", str(model)]) == 0
    assert cli.main(["verify", f"{model}.damaged-1"]) == 1
    assert cli.main(["predict", str(trained / "clicks.tsv"), "-t", str(model)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 500 + 2


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 130), ("", 130)])
def test_asks_first(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, answer: str, status: int) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    (model / "meta.json").unlink()
    assert cli.main(["repair", str(model), "--from", str(model.parent / "S")]) == status
    assert f"in the place of {model}? The snapshot is of step 4; what was learned after it is lost." in (
        capsys.readouterr().out
    )
    assert Path(f"{model}.damaged-1").exists() == (status == 0)
    assert (model / "meta.json").exists() == (status == 0)


def test_of_another_table(model: Path, capsys: Any) -> None:
    with hashemb.create(model.parent / "other", num_embeddings=8, embedding_dim=4) as table:
        table.snapshot(model.parent / "S2")
    damage(model)
    assert cli.main(["repair", str(model), "--from", str(model.parent / "S2"), "--yes"]) == 1
    ids = [hashemb.info(model.parent / name).id for name in ("S2", "T")]
    assert capsys.readouterr().err == (
        f"hashemb: {model.parent / 'S2'} is of table {ids[0]}, {model} is table {ids[1]}\n"
    )
    assert cli.main(["verify", str(model.parent / "nowhere")]) == 1
    assert capsys.readouterr().err == f"hashemb: {model.parent / 'nowhere'}: nothing is at this path\n"
