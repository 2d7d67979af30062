"""`hashemb train` that is stopped or killed, and what others can do meanwhile."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import SMALL, criteo_lines, run, write_lines

import hashemb
from hashemb.ctr.data import open_reader
from hashemb.ctr.training import load_model, read_card


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "clicks.tsv", criteo_lines(3000))


def start_training(path: Path, directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hashemb", "train", str(path), "--table", str(directory), *SMALL]
    command += ["--progress", "500", "--batch-size", "100", "--weight-decay", "1e-4"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Ctrl-C finishes the batch, saves, and prints how to resume; the resumed run ends with the same bits."""
    path = write_lines(tmp_path / "clicks.tsv", criteo_lines(12_000))
    whole = start_training(path, tmp_path / "whole")
    expected, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0
    output = ""
    for _ in range(2):
        child = start_training(path, tmp_path / "parts")
        part = read_until_row(child)
        child.send_signal(number)
        rest, err = rest_of(child)
        assert (child.returncode, err) == (status, "")
        assert "is saved and complete; the same command goes on from here." in rest
        output += part + rest
    last = start_training(path, tmp_path / "parts")
    output += last.communicate(timeout=120)[0]
    assert last.returncode == 0
    for name in ("weight.npy", "accumulator.npy", "paid.npy"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert hashemb.info(tmp_path / "parts").step == hashemb.info(tmp_path / "whole").step == 120
    assert _figures(output) == _figures(expected)


def read_until_row(child: subprocess.Popen[str]) -> str:
    """Return the output of the child up to and including the first row of its table."""
    assert child.stdout is not None
    text = ""
    while not _figures(text):
        line = child.stdout.readline()
        assert line, "the child has ended"
        text += line
    return text


def rest_of(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Return the remaining output. `communicate` would skip lines that readline has already buffered."""
    assert child.stdout is not None
    assert child.stderr is not None
    with child.stdout, child.stderr:
        output, errors = child.stdout.read(), child.stderr.read()
    child.wait(timeout=120)
    return output, errors


def _figures(output: str) -> list[list[str]]:
    """Return the rows of the progressive validation tables, without the rates."""
    return [line.split()[:5] for line in output.splitlines() if re.match(r" +[\d,]+ +0\.", line)]


def test_killed_and_resumed_says_so(tmp_path: Path) -> None:
    """SIGKILL can't be caught: the table is ahead of its card, and the next run explains what that means."""
    path = write_lines(tmp_path / "clicks.tsv", criteo_lines(12_000))
    child = start_training(path, tmp_path / "T")
    read_until_row(child)
    child.kill()
    child.communicate(timeout=60)
    again = run("train", path, "--table", tmp_path / "T")
    assert again.returncode == 0, again.stderr
    assert re.search(r"The table has \d+ updates that its last save doesn't know of", again.stdout)
    assert "12,000 examples" in again.stdout


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "clicks.tsv", criteo_lines(12_000))
    child = start_training(path, tmp_path / "T")
    try:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        second = run("train", path, "--table", tmp_path / "T")
        assert second.returncode == 1
        assert f"another trainer (process {child.pid}) is at work on this model" in second.stderr
        assert run("predict", path, "--table", tmp_path / "T", "-o", tmp_path / "p").returncode == 0
    finally:
        child.send_signal(signal.SIGCONT)
        child.communicate(timeout=120)
    assert child.returncode == 0


def test_scoring_while_training(tmp_path: Path, clicks: Path) -> None:
    """Readers open a table that is being trained and see it learn."""
    path = write_lines(tmp_path / "clicks.tsv", criteo_lines(12_000))
    child = start_training(path, tmp_path / "T")
    read_until_row(child)
    model, _ = load_model(tmp_path / "T")
    with model.table, open_reader(clicks, batch_size=100) as reader:
        keys = next(reader).keys
        first = model.predict_proba(keys)
        child.communicate(timeout=120)
        deadline = time.monotonic() + 10
        while np.array_equal(model.predict_proba(keys), first) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not np.array_equal(model.predict_proba(keys), first)
        assert model.table.step == 120


def test_train_into_a_pipe_that_closes(tmp_path: Path) -> None:
    """The run stops, but what it has learned so far is saved."""
    path = write_lines(tmp_path / "clicks.tsv", criteo_lines(12_000))
    child = start_training(path, tmp_path / "T")
    read_until_row(child)
    assert child.stdout is not None
    child.stdout.close()
    child.wait(timeout=120)
    assert child.stderr is not None
    child.stderr.close()
    card = read_card(tmp_path / "T")
    assert card.table_step == hashemb.info(tmp_path / "T").step
    assert card.sources[str(path)].rows + card.sources[str(path)].rows_per_pass == card.table_step * 100
