"""The demonstration, at a size and with a table that are small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashemb import cli
from hashemb.cli.demo import comparison
from hashemb.ctr.training import ModelOptions

ROWS = ("best constant", "model  ", "true probabilities")


def test_demo(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run reuses the data, trains a new model, and gets the same figures."""
    monkeypatch.setattr("hashemb.cli.demo.OPTIONS", ModelOptions(rank=15, rows=2**15))
    figures = []
    for said in ("generated", "from an earlier run"):
        assert cli.main(["demo", "--dir", str(tmp_path / "demo"), "--impressions", "20K"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert f"18,000 impressions{', ' if 'earlier' in said else ' '}{said}" in out
        assert "A second process opened the table read-only: its 2,000 probabilities are the same bits." in out
        assert "A second trainer was killed" in out
        assert "18,000 impressions in 71 steps; undisturbed it was 71 steps." in out
        assert "no impression was lost or learned twice." in out
        figures.append([line for line in out.splitlines() if line.startswith(ROWS)])
    assert figures[0] == figures[1]
    losses = {line[:30].strip(): float(line[30:40]) for line in figures[0][:3]}
    assert losses["true probabilities"] < losses["model"] < losses["best constant"]
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"model.emb", "heldout.probabilities.txt", "serving"} | {
        f"impressions-20000-{part}{suffix}" for part in ("train", "heldout") for suffix in (".parquet", ".truth.npy")
    }


def test_comparison_of_known_predictors() -> None:
    """The true model gains everything that can be gained, a constant model nothing."""
    rng = np.random.default_rng(0)
    truth = rng.random(20_000).astype(np.float32)
    labels = (rng.random(20_000) < truth).astype(np.float32)
    constant = np.full(len(labels), labels.mean(dtype=np.float64))
    for model, gained in ((truth, "100%"), (constant, "0%")):
        lines = list(comparison(labels, model, truth))
        assert f"it has gained {gained} of what there was to gain" in lines[-1]
        assert [line[:30].strip() for line in lines[1:4]] == ["best constant", "model", "true probabilities"]
        assert lines[1].split()[3:] == ["1.0000", "0.5000", "1.0000"], "NE, AUC, calibration of the constant"
