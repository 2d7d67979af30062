"""The demonstration: a click log whose true probabilities are known, a model of it, and their distance."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hashemb.ctr.console import format_bytes, progress_bar, say
from hashemb.ctr.inspection import describe
from hashemb.ctr.metrics import StreamingMetrics, auc, calibration, logloss, normalized_entropy
from hashemb.ctr.model_dir import MODEL_FILE, load_model, training_lock
from hashemb.ctr.models import FactorizationMachine
from hashemb.ctr.options import ModelOptions, open_or_create
from hashemb.ctr.scoring import open_for_scoring, score
from hashemb.ctr.session import run_training
from hashemb.ctr.synthetic import ImpressionStream
from hashemb.ctr.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]

SEED = 0
HELD_OUT = 0.1  # of the impressions, the last ones: as in life, the model is asked about the future
OPTIONS = ModelOptions(rank=15, rows=2**22, lr=0.05, seed=SEED)


@dataclass(frozen=True)
class DemoPaths:
    """Where the demonstration keeps its things."""

    train: Path
    held_out: Path
    model: Path
    probabilities: Path

    @classmethod
    def under(cls, directory: Path, impressions: int) -> DemoPaths:
        """Paths for that many impressions; data of other sizes may lie beside them."""
        stem = f"impressions-{impressions}"
        return cls(
            directory / f"{stem}-train.parquet",
            directory / f"{stem}-heldout.parquet",
            directory / "model.emb",
            directory / "heldout.probabilities.txt",
        )


def run_demo(directory: Path, impressions: int, console: Console) -> int:
    """Run the demonstration in `directory`, which is made if need be.

    Returns
    -------
    int
        Exit status.
    """
    if impressions < 1000:
        raise ValueError(f"the demonstration needs at least 1,000 impressions, got {impressions}")
    directory.mkdir(parents=True, exist_ok=True)
    paths = DemoPaths.under(directory, impressions)
    started = time.perf_counter()
    held_out = int(impressions * HELD_OUT)
    _generate(paths.train, 0, impressions - held_out, console)
    _generate(paths.held_out, impressions - held_out, held_out, console)
    status = _train(paths, console)
    if status:
        return status
    probabilities, labels = _score(paths)
    _compare(probabilities, labels, np.load(_truth(paths.held_out)), console)
    _score_elsewhere(paths, probabilities, console)
    _say_where(paths, console)
    say(console, f"Done in {time.perf_counter() - started:.0f} s.")
    return 0
