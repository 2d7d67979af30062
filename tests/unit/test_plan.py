"""The plan of a run: the first file is opened once, and nothing is created before it has been read."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashemb.ctr.data import open_reader
from hashemb.ctr.data import readers as _readers
from hashemb.ctr.training import Columns, ModelOptions, TrainOptions, TrainPlan, read_card

pytest.importorskip("pyarrow")

MODEL = ModelOptions(rows=2000)


def write_clicks(path: Path, count: int, bad: int | None = None) -> Path:
    rows = [f"{'?' if i == bad else i * i % 3 % 2},{i % 101},s{i % 13}" for i in range(count)]
    path.write_text("\n".join(["click,user,site", *rows]) + "\n")
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of paths that readers open from now on."""
    paths: list[str] = []
    original = _readers.open_source_of
    monkeypatch.setattr(_readers, "open_source_of", lambda path, *rest: paths.append(path) or original(path, *rest))
    return paths


def keys_of(reader: Any) -> list[np.ndarray[Any, Any]]:
    return [batch.keys for batch in reader]


@pytest.mark.parametrize(("most", "kept_bytes"), [(1000, 1 << 20), (999, 1 << 20), (10, 1 << 20), (1000, 10)])
def test_looking_ahead_changes_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], most: int, kept_bytes: int
) -> None:
    path = write_clicks(tmp_path / "a.csv", 1000)
    expected = keys_of(open_reader(path, batch_size=64))
    monkeypatch.setattr(_readers, "_KEPT_BYTES", kept_bytes)
    opened.clear()
    with open_reader(path, batch_size=999) as reader:
        assert reader.look_ahead(most) == (1000 if most == 1000 else None)
        reader.batch_size = 64
        found = keys_of(reader)
        assert reader.report.rows_good == 1000
        assert reader.bytes_read == path.stat().st_size
    assert len(expected) == len(found) == 16
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(opened) == (1 if kept_bytes > 10 else 2), "rows that take too much memory are read again"


def test_a_bad_line_is_found_in_its_turn(tmp_path: Path, opened: list[str]) -> None:
    path = write_clicks(tmp_path / "a.csv", 100, bad=70)
    with open_reader(path, batch_size=10, strict=True) as reader:
        assert reader.look_ahead(1000) == 99
        with pytest.raises(ValueError, match=r"a\.csv:72: label must be 0 or 1"):
            list(reader)
        assert (len(opened), reader.report.rows_bad) == (2, 1)
    with open_reader(path, batch_size=10) as reader:
        assert reader.look_ahead(1000) == 99
        assert sum(batch.num_examples for batch in reader) == 99
        assert (len(opened), reader.report.rows_bad) == (3, 1)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_first_file_is_opened_once_in_the_first_pass(tmp_path: Path, opened: list[str], passes: int) -> None:
    path = write_clicks(tmp_path / "a.csv", 500)
    options = TrainOptions([path], tmp_path / "T", MODEL, passes=passes)
    lines: list[str] = []
    with TrainPlan(options) as plan, plan.trainer(lines.append) as trainer:
        for _ in trainer.run():
            pass
        trainer.save()
    assert opened == [str(path)] * passes
    assert [line.split()[0] for line in lines] == ["Fields:", "500"]
    card = read_card(tmp_path / "T")
    assert (card.rank, card.batch_size, card.passes, list(card.schema)) == (0, 32, 10, ["user", "site"])
    assert card.sources[str(path)].passes == passes


def test_a_pipe_is_not_opened_before_the_run(tmp_path: Path, opened: list[str]) -> None:
    data = write_clicks(tmp_path / "a.csv", 300).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with TrainPlan(TrainOptions([pipe], tmp_path / "T", MODEL)) as plan, plan.trainer(print) as trainer:
        assert opened == []
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        steps = list(trainer.run())
        writer.join()
    assert steps[-1].examples == 300
    assert opened == [str(pipe)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "clicks"}, "no column 'clicks'"),
        ({"columns": Columns(positive="yes")}, "'yes' can't be its positive value"),
        ({"columns": Columns(numeric=("site",))}, "'site' holds string values"),
        ({"negative_rate": 0.0}, r"must be in \(0, 1\]"),
        ({"model": ModelOptions(model="lr", rank=2)}, "can't have rank 2"),
    ],
)
def test_errors_create_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_clicks(tmp_path / "a.csv", 50)
    with pytest.raises(ValueError, match=message):
        TrainPlan(TrainOptions([path], tmp_path / "T", **options))
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_several_passes_over_a_pipe_create_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="can be read once, not 2 times"):
        TrainPlan(TrainOptions([pipe], tmp_path / "T", passes=2))
    assert not (tmp_path / "T").exists()
