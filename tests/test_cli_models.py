"""The choice of models on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hashemb import cli


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("lr", "logistic regression"),
        ("fm", "factorization machine of rank 15"),
        ("fwfm", "field-weighted factorization machine of rank 15 over 3 fields"),
        ("ffm", "field-aware factorization machine of rank 4 over 3 fields"),
    ],
)
def test_models_by_name(tmp_path: Path, capsys: Any, name: str, description: str) -> None:
    data, table = tmp_path / "clicks.csv", str(tmp_path / "T")
    lines = [f"{i % 3 % 2},{i % 3},s{i % 5},{i % 7}" for i in range(600)]
    data.write_text("\n".join(["label,user,site,ad", *lines]) + "\n")
    assert cli.main(["train", str(data), "-t", table, "--model", name, "--rows", "2^14"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Fields: 2 integer, 1 string")
    assert any(f"{description}, 16,384 rows" in line for line in out[1:4])
    assert out[-2].startswith("600 examples, 200 positive")
    assert cli.main(["inspect", table]) == 0
    assert description in capsys.readouterr().out
    assert cli.main(["predict", str(data), "-t", table]) == 0
    scores = [float(line) for line in capsys.readouterr().out.split()]
    assert len(scores) == 600
    assert min(scores[1::3]) > max(scores[0::3] + scores[2::3]), "the label is a function of the first field"


def test_fields_from_standard_input_have_to_be_said(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["train", "-", "-t", str(tmp_path / "T"), "--model", "ffm"]) == 1
    assert "number of fields of a new ffm is not known" in capsys.readouterr().err
    assert not (tmp_path / "T").exists()
