"""How close a factorisation machine comes to the best possible log loss on a stream whose truth is known.

    python examples/learning_curve.py [--impressions 10000000] [--svg docs/learning-curve.svg]

The stream (`hashemb.ctr.synthetic.ImpressionStream`) never ends and never repeats itself, and says with each impression
the probability with which it was clicked. So no held-out set is needed, and no labels to compare with: the expected log
loss of a prediction p made before learning is ``-(q ln p + (1 - q) ln(1 - p))``, q the true probability, and that of q
itself, its entropy, is the least there can be. Their ratio is free of the noise of clicks.

`--max-vocabulary` and `--drift-period` are the stream's: how many values its largest column has, and how fast they
come and go (0: never).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

import hashemb
from hashemb.ctr.models import FactorizationMachine
from hashemb.ctr.readahead import read_ahead
from hashemb.ctr.synthetic import Impressions, ImpressionStream

CHUNK = 1 << 15
BATCH_SIZE = 256
RANK = 6  # TRUE_RANK: the truth is a factorisation machine of this rank
NUM_EMBEDDINGS = 2**24
LEARNING_RATE = 0.1
INITIAL_ACCUMULATOR = 20.0
INIT_SCALE = 0.01


class Point(NamedTuple):
    """Mean expected log loss of the impressions since the point before: the model's, and the least there can be."""

    impressions: int
    model: float
    best: float

    @property
    def excess(self) -> float:
        """By how much the model is above the best possible, as a share of it."""
        return self.model / self.best - 1.0


def expected_loss(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Sum over impressions of the log loss that is expected of a prediction, in nats."""
    p = np.clip(predicted.astype(np.float64), 1e-7, 1.0 - 1e-7)
    return float(-(truth * np.log(p) + (1.0 - truth) * np.log1p(-p)).sum())


def chunks(stream: ImpressionStream, impressions: int) -> Iterator[tuple[np.ndarray, Impressions]]:
    """The stream's first impressions, with their keys."""
    for start in range(0, impressions, CHUNK):
        part = stream.generate(start, min(CHUNK, impressions - start))
        yield part.keys(), part


def learn(model: FactorizationMachine, stream: ImpressionStream, impressions: int) -> Iterator[Point]:
    """Learn the stream; a point at every power of two of impressions from 2^15, two between, and at the end."""
    dues = [CHUNK * round(2**octave * part) for octave in range(40) for part in (1, 1.25, 1.5, 1.75)]
    due = iter(sorted({due for due in dues if due < impressions} | {impressions}))
    following = next(due)
    seen, mark, model_loss, best_loss = 0, 0, 0.0, 0.0
    with closing(read_ahead(chunks(stream, impressions))) as parts:
        for keys, part in parts:
            count = len(part.labels)
            batches = range(0, count, BATCH_SIZE)
            predicted = [model.learn(keys[i : i + BATCH_SIZE], part.labels[i : i + BATCH_SIZE]) for i in batches]
            model_loss += expected_loss(part.probabilities, np.concatenate(predicted))
            best_loss += expected_loss(part.probabilities, part.probabilities)
            seen += count
            if seen >= following:
                yield Point(seen, model_loss / (seen - mark), best_loss / (seen - mark))
                mark, model_loss, best_loss, following = seen, 0.0, 0.0, next(due, impressions)


def draw(points: list[Point], path: Path, title: str) -> None:
    """The curve, and below it the distance from the best possible, both over impressions on a logarithmic axis."""
    import matplotlib
    from matplotlib.figure import Figure

    impressions = [point.impressions for point in points]
    style = {"svg.fonttype": "none", "svg.hashsalt": "hashemb", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        losses = [point.model for point in points]
        upper.plot(impressions, losses, "o-", color="#0b62c4", ms=4, label="predicted before learning")
        upper.plot(impressions, [point.best for point in points], "--", color="#b34700", label="true probabilities")
        upper.set(ylabel="expected log loss (nats)", title=title)
        lower.plot(impressions, [100.0 * point.excess for point in points], "o-", color="#0b62c4", ms=4)
        lower.axhline(1.0, color="#b34700", linestyle="--", label="1 %")
        lower.set(xlabel="impressions", ylabel="above the best possible (%)", xscale="log", yscale="log")
        lower.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=10_000_000)
    parser.add_argument("--max-vocabulary", type=int, default=10**8)
    parser.add_argument("--drift-period", type=int, default=1 << 21)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    stream = ImpressionStream(
        seed=0, max_vocabulary=options.max_vocabulary, drift_period=options.drift_period or None
    )
    optimizer = hashemb.Adagrad(lr=LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR)
    points, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hashemb-curve-") as directory:
        table = hashemb.create(
            Path(directory, "fm.emb"),
            num_embeddings=NUM_EMBEDDINGS,
            embedding_dim=1 + RANK,
            optimizer=optimizer,
            init=hashemb.Uniform(INIT_SCALE),
        )
        print(f"{'impressions':>13}{'model':>10}{'best':>10}{'above it':>10}{'seconds':>9}")
        with table:
            for point in learn(FactorizationMachine(table), stream, options.impressions):
                points.append(point)
                seconds = time.perf_counter() - started
                figures = f"{point.model:>10.5f}{point.best:>10.5f}{point.excess:>10.2%}"
                print(f"{point.impressions:>13,}{figures}{seconds:>9.0f}", flush=True)
    if options.svg is not None:
        draw(points, options.svg, f"A factorisation machine of rank {RANK} and the best possible")
        print(options.svg)


if __name__ == "__main__":
    main()
