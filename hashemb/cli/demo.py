"""The demonstration: train a model on a click log with known true probabilities, and compare the two."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import hashemb
from hashemb._text import format_bytes
from hashemb.cli.console import progress_bar, say
from hashemb.cli.session import run_training
from hashemb.ctr._types import Float32Array
from hashemb.ctr.metrics import auc, calibration, logloss, normalized_entropy
from hashemb.ctr.synthetic import ImpressionStream, truth_path
from hashemb.ctr.training import (
    MODEL_FILE,
    ModelCard,
    ModelOptions,
    Trainer,
    build_model,
    load_model,
    open_for_scoring,
    open_or_create,
    read_card,
    score,
    training_lock,
)
from hashemb.errors import HashembError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]


SEED = 0
MIN_IMPRESSIONS = 1000
HELD_OUT = 0.1  # share of the impressions, the last ones: as in production, the model predicts the future
OPTIONS = ModelOptions(rank=15, rows=2**22, seed=SEED)
SAVE_EVERY_S = 0.1  # for the trainer that is killed


@dataclass(frozen=True)
class DemoPaths:
    """Paths of the demonstration's files."""

    train: Path
    held_out: Path
    model: Path
    probabilities: Path
    serving: Path

    @classmethod
    def under(cls, directory: Path, impressions: int) -> DemoPaths:
        """Return the paths for a number of impressions; `directory` may hold data of other sizes too."""
        stem = f"impressions-{impressions}"
        return cls(
            directory / f"{stem}-train.parquet",
            directory / f"{stem}-heldout.parquet",
            directory / "model.emb",
            directory / "heldout.probabilities.txt",
            directory / "serving",
        )


def run_demo(directory: Path, impressions: int, console: Console) -> int:
    """Run the demonstration in `directory`, which is created if it does not exist.

    Returns
    -------
    int
        Exit status.
    """
    if impressions < MIN_IMPRESSIONS:
        raise ValueError(f"the demonstration needs at least {MIN_IMPRESSIONS:,} impressions, got {impressions:,}")
    started = time.perf_counter()
    paths = DemoPaths.under(directory, impressions)
    held_out = int(impressions * HELD_OUT)
    directory.mkdir(parents=True, exist_ok=True)
    _generate(paths.train, 0, impressions - held_out, console)
    _generate(paths.held_out, impressions - held_out, held_out, console)
    status = _train(paths, console)
    if status:
        return status
    probabilities, labels = _score(paths)
    say(console, "")
    for line in comparison(labels, probabilities, np.load(truth_path(paths.held_out))):
        say(console, line)
    say(console, "")
    _score_elsewhere(paths, probabilities, console)
    say(console, "")
    _kill_and_resume(paths, console)
    _say_where(paths, console)
    say(console, f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def _generate(path: Path, start: int, count: int, console: Console) -> None:
    """Write impressions `start` to `start + count` and their true probabilities, unless an earlier run has done so."""
    if path.exists() and truth_path(path).exists():
        say(console, f"{path}: {count:,} impressions, from an earlier run")
        return
    with progress_bar(console, f"generating {path.name}", count, unit_name="impressions") as advance:
        ImpressionStream(seed=SEED).write(path, start, count, progress=lambda done: advance(done, done))
    say(console, f"{path}: {count:,} impressions generated")


def _train(paths: DemoPaths, console: Console) -> int:
    """Learn the training file once, in a new model; resume the training of an unfinished model."""
    say(console, "")
    if (paths.model / MODEL_FILE).exists() and not _is_unfinished(paths):
        shutil.rmtree(paths.model)
    model, card = open_or_create(paths.model, OPTIONS)
    with closing(model.table), training_lock(paths.model):
        return run_training(Trainer(paths.model, model, card, [paths.train]), console)


def _is_unfinished(paths: DemoPaths) -> bool:
    position = read_card(paths.model).sources.get(str(paths.train.absolute()))
    return position is not None and position.rows > 0


def _score(paths: DemoPaths) -> tuple[Float32Array, Float32Array]:
    """Return the probabilities and labels of the held-out impressions, with the table opened read-only."""
    model, card = load_model(paths.model)
    with closing(model.table), open_for_scoring(card, [paths.held_out]) as reader:
        batches = list(score(model, reader))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return np.concatenate([batch.probabilities for batch in batches]), np.concatenate(labels)


def comparison(labels: Float32Array, probabilities: Float32Array, truth: Float32Array) -> Iterator[str]:
    """Format a table that compares the best constant, the model and the true probabilities on the same labels."""
    constant = np.full(len(labels), np.mean(labels, dtype=np.float64))
    yield f"{f'{len(labels):,} held-out impressions':<30}{'logloss':>10}{'NE':>9}{'AUC':>9}{'calibration':>13}"
    losses = []
    for name, p in (("best constant", constant), ("model", probabilities), ("true probabilities", truth)):
        losses.append(logloss(labels, p))
        ne, area, ratio = normalized_entropy(labels, p), auc(labels, p), calibration(labels, p)
        yield f"{name:<30}{losses[-1]:>10.6f}{ne:>9.4f}{area:>9.4f}{ratio:>13.4f}"
    gained, possible = losses[0] - losses[1], losses[0] - losses[2]
    yield (
        f"The model is {losses[1] - losses[2]:.6f} nats per impression from the truth, which nothing can beat; "
        f"it has gained {gained / possible:.0%} of what there was to gain over the constant."
    )


def _score_elsewhere(paths: DemoPaths, probabilities: Float32Array, console: Console) -> None:
    """Score the same impressions from the same files in another process, and compare bit for bit."""
    command = [sys.executable, "-m", "hashemb", "predict", str(paths.held_out)]
    command += ["--table", str(paths.model), "--output", str(paths.probabilities)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise HashembError(f"scoring in a second process failed: {child.stderr.strip()}")
    theirs = np.loadtxt(paths.probabilities, dtype=np.float32)
    if not np.array_equal(theirs, probabilities):
        raise HashembError(f"{np.sum(theirs != probabilities):,} probabilities differ in a second process")
    say(console, f"A second process opened the table read-only: its {len(theirs):,} probabilities are the same bits.")


def _kill_and_resume(paths: DemoPaths, console: Console) -> None:
    """Train again, in a process that is killed halfway, while a server in another process follows its deltas."""
    shutil.rmtree(paths.serving, ignore_errors=True)
    served = Serving.under(paths.serving)
    with _following(served):
        killed_at = _train_until_killed(paths, served)
        say(console, f"A second trainer was killed (SIGKILL) at step {killed_at:,} or later, a checkpoint behind it.")
        _run(served.train_command(paths.train), "the resumed trainer")
        step = hashemb.info(served.model).step
        _wait_for(lambda: served.replica.exists() and hashemb.info(served.replica).step == step, "the server")
    undisturbed = hashemb.info(paths.model).step
    learned = sum(position.rows_per_pass for position in read_card(served.model).sources.values())
    say(console, f"Resumed: {learned:,} impressions in {step:,} steps; undisturbed it was {undisturbed:,} steps.")
    same = [np.array_equal(_score_table(paths, table), _score_table(paths, paths.model)) for table in served.tables]
    if step != undisturbed or not all(same):
        raise HashembError("the resumed trainer or the server differs from the undisturbed run")
    deltas = len(list(served.deltas.glob("*.delta")))
    say(console, f"A server that followed {deltas} deltas in a third process gives the undisturbed model's bits:")
    say(console, "no impression was lost or learned twice.")


@dataclass(frozen=True)
class Serving:
    """Paths of the files of the killed trainer and the server."""

    model: Path
    snapshots: Path
    deltas: Path
    replica: Path

    @classmethod
    def under(cls, directory: Path) -> Serving:
        paths = (directory / name for name in ("model.emb", "snapshots", "deltas", "replica.emb"))
        (directory / "deltas").mkdir(parents=True)
        return cls(*paths)

    @property
    def tables(self) -> tuple[Path, Path]:
        return self.model, self.replica

    def train_command(self, data: Path, save_every_s: float = 60.0) -> list[str]:
        command = [sys.executable, "-m", "hashemb", "train", str(data), "--table", str(self.model)]
        command += ["--snapshots", str(self.snapshots), "--deltas", str(self.deltas)]
        command += ["--passes", "1", "--batch-size", str(ModelCard.batch_size)]  # as for a log, however small
        options = ["--rank", str(OPTIONS.rank), "--rows", str(OPTIONS.rows), "--seed", str(OPTIONS.seed)]
        return [*command, *(options if OPTIONS.seed is not None else options[:4]), "--save-every", str(save_every_s)]


@contextmanager
def _following(served: Serving) -> Iterator[None]:
    command = [sys.executable, "-m", "hashemb", "follow", str(served.deltas), str(served.replica), "--interval", "0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
        if server.poll() is not None:
            raise HashembError(f"the server ended with status {server.returncode}")
    finally:
        server.terminate()
        server.wait()


def _train_until_killed(paths: DemoPaths, served: Serving) -> int:
    """Kill a trainer after its first non-empty checkpoint; return the step of the last checkpoint before the kill."""
    trainer = subprocess.Popen(served.train_command(paths.train, SAVE_EVERY_S), stdout=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _checkpoint_step(served) > 0 or trainer.poll() is not None, "the trainer")
        if trainer.returncode:
            raise HashembError(f"the trainer failed with status {trainer.returncode}")
        return _checkpoint_step(served)
    finally:
        trainer.kill()
        trainer.wait()


def _checkpoint_step(served: Serving) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in served.snapshots.glob("step-*")), default=0)


def _wait_for(condition: Callable[[], bool], what: str, limit_s: float = 300.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise HashembError(f"{what} did nothing for {limit_s:.0f} s")
        time.sleep(0.01)


def _run(command: list[str], what: str) -> None:
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise HashembError(f"{what} failed: {child.stderr.strip()}")


def _score_table(paths: DemoPaths, table: Path) -> Float32Array:
    """Return the probabilities of the held-out impressions from a table, which may hold only weights."""
    card = read_card(paths.model)
    with hashemb.open(table) as opened, open_for_scoring(card, [paths.held_out]) as reader:
        model = build_model(opened, card)
        return np.concatenate([batch.probabilities for batch in score(model, reader)])


def _say_where(paths: DemoPaths, console: Console) -> None:
    info = hashemb.info(paths.model)
    sizes = f"{format_bytes(info.logical_bytes)}, of which {format_bytes(info.disk_bytes)} on disk"
    say(console, f"{'model':<16}{paths.model} ({sizes}; hashemb inspect {paths.model})")
    say(console, f"{'impressions':<16}{paths.train}, {paths.held_out}")
    say(console, f"{'truth':<16}{truth_path(paths.train)}, {truth_path(paths.held_out)}")
    say(console, f"{'probabilities':<16}{paths.probabilities}")
