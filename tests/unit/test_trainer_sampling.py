"""Training with a label delay and with down-sampled negatives: stopped anywhere, it ends with the same bits."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import cli
from hashemb.ctr.data import open_reader
from hashemb.ctr.metrics import calibration
from hashemb.ctr.training import (
    EveryN,
    ModelOptions,
    NegativeSampling,
    Trainer,
    load_model,
    open_or_create,
    read_card,
)
from hashemb.ctr.training.negatives import agreed_sampling

pytest.importorskip("pyarrow")

SMALL = ModelOptions(rank=3, rows=2000, weight_decay=1e-3)
BATCH = 50


def write_clicks(path: Path, start: int, stop: int, bad: Sequence[int] = ()) -> Path:
    """Write impressions of which one in five is a click; clicks depend on the user."""
    lines = ["click,user,site"]
    for i in range(start, stop):
        user = (i * 7919) % 101
        label = "?" if i in bad else int((user * 31 + i) % 10 < (4 if user % 2 else 1))
        lines.append(f"{label},{user},s{(i * 104729) % 13}")
    path.write_text("\n".join(lines) + "\n")
    return path


def train(
    directory: Path, paths: Sequence[Path], *, stop_after: int | None = None, rate: float = 1.0, **options: Any
) -> int:
    """Run to the end, or stop cleanly after that many steps; return the number of steps taken."""
    model, card = open_or_create(directory, SMALL)
    card.batch_size, card.negative_rate = BATCH, rate
    trainer = Trainer(directory, model, card, paths, schedule=EveryN(100), **options)
    steps = 0
    with closing(model.table), closing(trainer.run()) as run:
        for _ in run:
            steps += 1
            if steps == stop_after:
                break
        run.close()
        trainer.save()
    return steps


def contents(directory: Path) -> dict[str, Any]:
    with hashemb.open(directory) as table:
        arrays = {name: array.tobytes() for name, array in table.state.items()}
        return arrays | {
            "weight": table.weight.tobytes(),
            "step": table.step,
            "card": json.loads((directory / "model.json").read_text()),
        }


@pytest.mark.parametrize(("delay", "rate"), [(1, 1.0), (130, 1.0), (10_000, 1.0), (0, 0.3), (130, 0.3)])
@pytest.mark.parametrize("stop_after", [1, 4, 11, 13])
def test_resuming_equals_never_having_stopped(tmp_path: Path, delay: int, rate: float, stop_after: int) -> None:
    """This includes waiting examples from the file before the one being read: file a has 10.3 batches."""
    files = [write_clicks(tmp_path / "a.csv", 0, 515, bad=(3, 170)), write_clicks(tmp_path / "b.csv", 600, 801)]
    options: dict[str, Any] = {"label_delay": delay, "rate": rate}
    for passes in (1, 2):
        train(tmp_path / f"unbroken{passes}", files, passes=passes, **options)
        broken = tmp_path / f"broken{passes}"
        train(broken, files, passes=passes, stop_after=stop_after, **options)
        waiting = read_card(broken).progress["waiting"]
        assert (waiting > 0) == (delay > 0), "the last batch, for one, has not been learned yet"
        train(broken, files, passes=passes, stop_after=2 + waiting // BATCH, **options)
        train(broken, files, passes=passes, **options)
        assert contents(broken) == contents(tmp_path / f"unbroken{passes}")


def test_a_long_delay_learns_everything_at_the_end(tmp_path: Path) -> None:
    files = [write_clicks(tmp_path / "a.csv", 0, 515)]
    train(tmp_path / "m", files, label_delay=10_000)
    card = read_card(tmp_path / "m")
    (position,) = card.sources.values()
    assert (position.passes, position.rows, position.rows_per_pass) == (1, 0, 515)
    assert card.progress["waiting"] == 0
    assert hashemb.info(tmp_path / "m").step == 11
    train(tmp_path / "undelayed", files)
    losses = [read_card(tmp_path / name).progress["rows"][-1]["logloss"] for name in ("m", "undelayed")]
    assert losses[0] == pytest.approx(np.log(2), rel=0.01), "nothing had been learned when the last was scored"
    assert losses[1] < losses[0] - 0.01


def test_the_card_keeps_curves_and_bad_lines(tmp_path: Path) -> None:
    files = [write_clicks(tmp_path / "a.csv", 0, 515, bad=(3, 170)), write_clicks(tmp_path / "b.csv", 600, 801)]
    train(tmp_path / "m", files)
    first = read_card(tmp_path / "m").progress["rows"]
    assert [row["examples"] for row in first] == [100, 200, 300, 400, 500, 600, 700, 714]
    train(tmp_path / "m", files, passes=3, stop_after=20)
    progress = read_card(tmp_path / "m").progress
    assert progress["pass"] == 3
    assert progress["first_pass_rows"] == first
    bad = [(position.bad_rows, position.bad_lines) for position in read_card(tmp_path / "m").sources.values()]
    assert bad[0][0] == 2
    assert bad[0][1][0].endswith("a.csv:5: label must be 0 or 1, found '?'")
    assert bad[1] == (0, [])


# ---- on the command line ----


def hashemb_keys(path: Path) -> np.ndarray:
    with open_reader(path, batch_size=10_000) as reader:
        return next(reader).keys


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    return write_clicks(tmp_path / "clicks.csv", 0, 6000)


@pytest.mark.parametrize("correction", ["predictions", "weights"])
def test_negative_rate_on_the_command_line(clicks: Path, tmp_path: Path, capsys: Any, correction: Any) -> None:
    """The rate is saved with the model, and its predictions are calibrated."""
    table = str(tmp_path / "m")
    options = ["--rank", "0", "--rows", "4096", "--batch-size", "50", "--initial-accumulator", "0.1"]
    sampling = ["--negative-rate", "0.2", "--negative-correction", correction]
    assert cli.main(["train", str(clicks), "-t", table, *options, *sampling, "--passes", "3"]) == 0
    assert f"Learning 0.2 of the negatives, corrected by {correction}" in capsys.readouterr().out
    assert cli.main(["predict", str(clicks), "-t", table]) == 0
    printed = np.array(capsys.readouterr().out.split(), np.float32)
    labels = np.array([line[0] == "1" for line in clicks.read_text().splitlines()[1:]], float)
    assert calibration(labels, printed) == pytest.approx(1.0, abs=0.1)
    model, card = load_model(table)
    with closing(model.table):
        assert card.negatives() == NegativeSampling(0.2, correction)
        raw = model.predict_proba(hashemb_keys(clicks))
    assert calibration(labels, raw) == pytest.approx(1.0, abs=0.1) or correction == "predictions"
    assert calibration(labels, raw) > 1.8 or correction == "weights"


def test_the_rate_may_not_change(clicks: Path, tmp_path: Path, capsys: Any) -> None:
    table = str(tmp_path / "m")
    command = ["train", str(clicks), "-t", table, "--rank", "0", "--rows", "4096"]
    assert cli.main([*command, "--negative-rate", "0.2"]) == 0
    assert cli.main([*command, "--passes", "2"]) == 0
    for extra in (["--negative-rate", "0.3"], ["--negative-correction", "weights"]):
        assert cli.main([*command, "--passes", "3", *extra]) == 1
    assert "the model has learned 0.2 of the negatives, corrected by predictions; that can't" in capsys.readouterr().err
    assert agreed_sampling(None, 0.5, None) == NegativeSampling(0.5)
    assert agreed_sampling(NegativeSampling(0.5), 0.5, "predictions") == NegativeSampling(0.5)


@pytest.mark.parametrize(("rate", "status"), [("0", 1), ("1.5", 2), ("-1", 2)])
def test_bad_rates_make_no_model(clicks: Path, tmp_path: Path, rate: str, status: int) -> None:
    assert cli.main(["train", str(clicks), "-t", str(tmp_path / "m"), "--negative-rate", rate]) == status
    assert not (tmp_path / "m").exists()


def test_label_delay_on_the_command_line(clicks: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["train", str(clicks), "-t", str(tmp_path / "m"), "--rank", "0", "--rows", "4096"]
    assert cli.main([*command, "--label-delay", "1000"]) == 0
    assert "Labels are learned 1,000 examples after they are scored." in capsys.readouterr().out
    assert read_card(tmp_path / "m").sources[str(clicks)].rows_per_pass == 6000


def test_what_a_pipe_gave_is_not_waited_for_again(clicks: Path, tmp_path: Path) -> None:
    """A stopped run can't read a pipe again, and the next one must not use examples of another file instead."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with suppress(BrokenPipeError):
            pipe.write_text(clicks.read_text())

    writer = threading.Thread(target=write)
    writer.start()
    train(tmp_path / "m", [pipe], label_delay=500, stop_after=20)
    writer.join()
    assert read_card(tmp_path / "m").progress["waiting"] == 0
    train(tmp_path / "m", [clicks], label_delay=500)
    assert read_card(tmp_path / "m").progress["rows"][-1]["examples"] == 1000 + 6000
