"""Logistic regression and factorisation machines on Frappe, with hashed keys and no vocabulary.

    python examples/frappe.py [DIRECTORY] [--seeds 0 1 2]

DIRECTORY holds train.csv.gz, valid.csv.gz and test.csv.gz of the BARS benchmark's Frappe_x1: files with a header, the
column `label` and ten categorical columns. Default: $HASHEMB_DATA/frappe, else ../shared/data/frappe next to the
repository. BARS reports, on the test file, AUC .9356 for logistic regression, .9671 for a factorisation machine and
.9786 for a field-aware one, both of rank 10.

All models are trained by the same program with different model cards. Early stopping uses only the validation file. A
seed determines the order of the examples and the initial weights; the last line for a model is the median of its seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import hashemb
from hashemb.ctr.data import open_reader
from hashemb.ctr.metrics import auc, logloss
from hashemb.ctr.models import HashedModel
from hashemb.ctr.training import ModelCard, build_model

BATCH_SIZE = 1024
MAX_EPOCHS = 30
PATIENCE = 2  # epochs without a better validation AUC
NUM_EMBEDDINGS = 2**20  # 5,382 distinct values: 0.5 % of them share a row with another


@dataclass(frozen=True)
class Settings:
    """Settings that were tuned on the validation file. `initial_accumulator` damps the first steps of rare values."""

    name: str
    card: ModelCard
    lr: float
    initial_accumulator: float = 0.0
    weight_decay: float = 0.0
    init_scale: float = 0.01


MODELS = (
    Settings("LR", ModelCard(rank=0), lr=0.5, initial_accumulator=30.0),
    Settings("FM", ModelCard(rank=10), lr=0.2, weight_decay=1e-3),
    Settings("FwFM", ModelCard(rank=10, kind="field_weighted_fm", num_fields=10), lr=0.1, weight_decay=3e-3),
    Settings("FFM", ModelCard(rank=10, kind="field_aware_fm", num_fields=10), lr=0.2, weight_decay=3e-3),
)


def default_directory() -> Path:
    """Return the default directory of the data."""
    root = Path(__file__).resolve().parents[1]
    return Path(os.environ.get("HASHEMB_DATA", root.parent / "shared" / "data"), "frappe")


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read keys, uint64 (n, 10), and labels, float32 (n,), from a whole file."""
    with open_reader(path, label="label", batch_size=1 << 16) as reader:
        batches = list(reader)
    return np.concatenate([batch.keys for batch in batches]), np.concatenate([batch.labels for batch in batches])


def train(
    settings: Settings, data: dict[str, tuple[np.ndarray, np.ndarray]], directory: Path, seed: int = 0
) -> dict[str, float]:
    """Train until the validation AUC stops rising; return the test metrics of the best epoch."""
    optimizer = hashemb.Adagrad(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        initial_accumulator_value=settings.initial_accumulator,
    )
    table = hashemb.create(
        directory / f"{settings.name}-{seed}.emb",
        num_embeddings=NUM_EMBEDDINGS,
        embedding_dim=settings.card.embedding_dim,
        optimizer=optimizer,
        init=hashemb.Uniform(settings.init_scale),
        seed=seed,
    )
    with table:
        return _fit(build_model(table, settings.card), data, seed)


def _fit(model: HashedModel, data: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    keys, labels = data["train"]
    best = {"valid_auc": 0.0}
    for epoch in range(1, MAX_EPOCHS + 1):
        order = rng.permutation(len(labels))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            model.learn(keys[batch], labels[batch])
        valid_auc = auc(data["valid"][1], model.predict_proba(data["valid"][0]))
        if valid_auc > best["valid_auc"]:
            test = model.predict_proba(data["test"][0])
            best = {
                "epoch": epoch,
                "valid_auc": valid_auc,
                "test_auc": auc(data["test"][1], test),
                "test_logloss": logloss(data["test"][1], test),
            }
        elif epoch - best["epoch"] >= PATIENCE:
            break
    return best


def report(name: str, best: dict[str, float], seconds: float) -> None:
    """Print a line of the table."""
    figures = f"{best['valid_auc']:>10.4f}{best['test_auc']:>10.4f}{best['test_logloss']:>10.4f}"
    print(f"{name:<14}{figures}{best['epoch']:>7.0f}{seconds:>9.1f}", flush=True)


def main(directory: Path, seeds: list[int]) -> None:
    """Train the models and print their results."""
    missing = [name for name in ("train", "valid", "test") if not (directory / f"{name}.csv.gz").exists()]
    if missing:
        sys.exit(f"{directory}: {missing[0]}.csv.gz not found; see this file's first lines")
    data = {name: load(directory / f"{name}.csv.gz") for name in ("train", "valid", "test")}
    print(f"{'':<14}{'valid AUC':>10}{'test AUC':>10}{'logloss':>10}{'epoch':>7}{'seconds':>9}")
    with tempfile.TemporaryDirectory(prefix="hashemb-frappe-") as temporary:
        for settings in MODELS:
            runs = []
            for seed in seeds:
                started = time.perf_counter()
                best = train(settings, data, Path(temporary), seed)
                runs.append(best | {"seconds": time.perf_counter() - started})
                report(f"{settings.name} {seed}", best, runs[-1]["seconds"])
            if len(runs) > 1:
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                report(f"{settings.name} median", medians, medians["seconds"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    main(arguments.directory, arguments.seeds)
