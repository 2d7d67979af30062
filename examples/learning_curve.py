"""How close a factorisation machine comes to the best possible log loss on a stream whose truth is known.

    python examples/learning_curve.py [--impressions 8000000] [--svg docs/learning-curve.svg]

The stream (`hashemb.ctr.synthetic.ImpressionStream`) never ends and never repeats itself, and says with each impression
the probability with which it was clicked. So no held-out set is needed, and no labels to compare with: the expected log
loss of a prediction p made before learning is ``-(q ln p + (1 - q) ln(1 - p))``, q the true probability, and that of q
itself, its entropy, is the least there can be. Their ratio is free of the noise of clicks.

Two streams are learned: one whose values stay, at most 10,000 of a column, and the default one, which has up to 10^8
and replaces them all the time, so that a part of every impression is new and can't be known.
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
INITIAL_ACCUMULATOR = 50.0  # the factors of rare values stay put until there is something to learn
INIT_SCALE = 0.01
LEARNING_RATE = 0.1  # falls as 1 / sqrt(1 + impressions / DECAY_IMPRESSIONS): with Adagrad's own 1 / sqrt, as 1 / n
DECAY_IMPRESSIONS = 200_000

STREAMS: dict[str, dict[str, int | None]] = {
    "values stay, up to 10^4 in a column": {"max_vocabulary": 10**4, "drift_period": None},
    "values come and go, up to 10^8 in a column": {},
}


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
            model.table.lr = LEARNING_RATE / np.sqrt(1.0 + seen / DECAY_IMPRESSIONS)
            batches = range(0, count, BATCH_SIZE)
            predicted = [model.learn(keys[i : i + BATCH_SIZE], part.labels[i : i + BATCH_SIZE]) for i in batches]
            model_loss += expected_loss(part.probabilities, np.concatenate(predicted))
            best_loss += expected_loss(part.probabilities, part.probabilities)
            seen += count
            if seen >= following:
                yield Point(seen, model_loss / (seen - mark), best_loss / (seen - mark))
                mark, model_loss, best_loss, following = seen, 0.0, 0.0, next(due, impressions)


def run(name: str, impressions: int) -> list[Point]:
    """Learn one of the streams, printing the points as they come."""
    points: list[Point] = []
    started = time.perf_counter()
    print(f"{name}\n{'impressions':>13}{'model':>10}{'best':>10}{'above it':>10}{'seconds':>9}")
    with tempfile.TemporaryDirectory(prefix="hashemb-curve-") as directory:
        table = hashemb.create(
            Path(directory, "fm.emb"),
            num_embeddings=NUM_EMBEDDINGS,
            embedding_dim=1 + RANK,
            optimizer=hashemb.Adagrad(lr=LEARNING_RATE, initial_accumulator_value=INITIAL_ACCUMULATOR),
            init=hashemb.Uniform(INIT_SCALE),
        )
        with table:
            for point in learn(FactorizationMachine(table), ImpressionStream(seed=0, **STREAMS[name]), impressions):
                points.append(point)
                figures = f"{point.model:>10.5f}{point.best:>10.5f}{point.excess:>10.2%}"
                print(f"{point.impressions:>13,}{figures}{time.perf_counter() - started:>9.0f}", flush=True)
    return points


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Expected log loss above, its distance from the best possible below, over impressions on a logarithmic axis."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "hashemb", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 6.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for (name, points), colour in zip(curves.items(), ("#0b62c4", "#b34700"), strict=True):
            impressions = [point.impressions for point in points]
            upper.plot(impressions, [point.model for point in points], "o-", color=colour, ms=3, label=name)
            upper.plot(impressions, [point.best for point in points], ":", color=colour, label="the best possible")
            lower.plot(impressions, [100.0 * point.excess for point in points], "o-", color=colour, ms=3, label=name)
        lower.axhline(1.0, color="black", linestyle="--", linewidth=1, label="1 %")
        title = f"Factorisation machine of rank {RANK}, scored before learning"
        upper.set(ylabel="expected log loss (nats)", title=title)
        lower.set(xlabel="impressions", ylabel="above the best possible (%)", xscale="log", yscale="log")
        lower.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=8_000_000)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    curves = {name: run(name, options.impressions) for name in STREAMS}
    if options.svg is not None:
        draw(curves, options.svg)
        print(options.svg)


if __name__ == "__main__":
    main()
