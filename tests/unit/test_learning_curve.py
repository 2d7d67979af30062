"""The saved progressive table is bounded, complete, and unchanged by saving it; and the example that plots one."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hashemb.ctr.training import LearningCurve, ProgressRow
from hashemb.ctr.training.learning_curve import MAX_ROWS

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "learning_curve.py"


def rows_of(losses: list[float], every: int = 100) -> list[ProgressRow]:
    """Return rows that are `every` examples and one second apart."""
    means = np.cumsum(losses) / np.arange(1, len(losses) + 1)
    return [
        ProgressRow(every * (i + 1), loss, float(means[i]), 0.9, 0.7, float(every)) for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("count", [1, MAX_ROWS, MAX_ROWS + 1, MAX_ROWS + 2, 5 * MAX_ROWS])
def test_no_more_rows_than_the_most_and_nothing_lost(count: int) -> None:
    losses = np.random.default_rng(0).random(count).tolist()
    curve = list(LearningCurve(rows_of(losses)))
    assert MAX_ROWS // 2 < len(curve) <= MAX_ROWS or len(curve) == count
    assert curve[-1].examples == 100 * count
    starts = [0, *(row.examples for row in curve[:-1])]
    for start, row in zip(starts, curve, strict=True):
        assert row.logloss_since_last == pytest.approx(np.mean(losses[start // 100 : row.examples // 100]))
        assert row.logloss == pytest.approx(np.mean(losses[: row.examples // 100]))
        assert row.examples_per_second == pytest.approx(100.0)


def test_through_json_and_on() -> None:
    losses = np.random.default_rng(0).random(3 * MAX_ROWS).tolist()
    rows = rows_of(losses)
    rows[5] = ProgressRow(600, 0.5, 0.5, math.nan, math.nan, 100.0)  # one class only
    whole, half = LearningCurve(rows), LearningCurve(rows[:400])
    text = json.dumps(half.to_json(), allow_nan=False)
    resumed = LearningCurve.from_json(json.loads(text))
    for row in rows[400:]:
        resumed.add(row)
    assert resumed.to_json() == whole.to_json()
    with pytest.raises(ValueError, match="a row must have examples, logloss_since_last, "):
        LearningCurve.from_json([{"examples": 3}])
    with pytest.raises(ValueError, match="rows must have more and more examples, found 400 after 400"):
        LearningCurve.from_json(half.to_json()[:1] * 2)
    with pytest.raises(ValueError, match="rows must be a list"):
        LearningCurve.from_json({})


# ---- the example ----


@pytest.fixture(scope="module")
def example() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("examples/ is not here")
    pytest.importorskip("pyarrow")
    specification = importlib.util.spec_from_file_location("learning_curve_example", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def test_the_example_learns_and_draws(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "curve.svg"
    monkeypatch.setattr(sys, "argv", ["learning_curve.py", "--impressions", "40000", "--svg", str(target)])
    example.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith(tuple("0123456789"))]
    assert [int(line[0].replace(",", "")) for line in lines] == 2 * [32768, 40000]
    excess = [float(line[3].rstrip("%")) for line in lines]
    assert excess[0] > excess[1] > 0.0
    assert excess[2] > excess[3] > 0.0
    assert target.read_text().startswith("<?xml")
    assert target.stat().st_size < 100_000


def test_the_expected_loss_is_least_for_the_truth(example: ModuleType) -> None:
    truth = np.random.default_rng(0).beta(1, 4, 1000)
    best = example.expected_loss(truth, truth)
    assert best == pytest.approx(-(truth * np.log(truth) + (1 - truth) * np.log1p(-truth)).sum())
    for other in (np.full(1000, truth.mean()), np.clip(truth + 0.01, 0, 1), np.zeros(1000)):
        assert example.expected_loss(truth, other) > best
