"""Each tool as a command from text to a trained model, with its candidate settings and a parser for its losses."""

from __future__ import annotations

import abc
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.ctr_data import NAMESPACES, Rows
from bench.harness import Mismatch, Skip
from bench.process import Usage
from hashemb.ctr.metrics import StreamingMetrics, auc, logloss

LR, FM = "logistic regression", "factorisation machine, rank 15"
RANK = 15
START_ROWS = 256  # of the run that measures the start-up: at most one batch of any tool


@dataclass(frozen=True)
class Quality:
    """Progressive validation of one pass: the mean loss and the AUC of examples scored before they are learned."""

    examples: int
    logloss: float
    auc: float


@dataclass(frozen=True, eq=False)
class Side(abc.ABC):
    """A tool. `group` and `name` are as in the harness.

    `rows` is the number of rows that it is timed on (None: all), and `once` marks a slow tool, which is timed once. All
    `settings` are tried on the rows that it is timed on, and the one with the lowest loss counts; the first is timed.
    """

    name: str
    model: str
    group: str
    settings: tuple[Any, ...] = ("",)
    rows: int | None = None
    once: bool = False
    package: str | None = None
    has_quality: bool = True

    def require(self) -> None:
        """Raise `Skip` if the package is missing."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise Skip(f"{self.package} is not installed")

    @property
    def prepares(self) -> bool:
        """Whether a first, untimed run leaves something next to the rows that later runs use."""
        return False

    @abc.abstractmethod
    def command(self, rows: Rows, out: pathlib.Path, setting: Any, *, score: bool = False) -> list[str]:
        """Return the arguments of the program; everything it writes goes under `out`."""

    @abc.abstractmethod
    def counts(self, usage: Usage) -> tuple[int, int]:
        """Return the numbers of examples and positives that the program reports."""

    @abc.abstractmethod
    def quality(self, rows: Rows, out: pathlib.Path) -> Quality:
        """Return the quality of a run with `score`."""

    def check(self, rows: Rows, usage: Usage) -> None:
        """Check that every row was learned, with its own label."""
        labels = rows.labels()
        expected, found = (len(labels), round(float(labels.sum()))), self.counts(usage)
        if found != expected:
            raise Mismatch(f"{self.name}: learned {found} (examples, positives) of {expected}")


@dataclass(frozen=True, eq=False)
class Ours(Side):
    """``hashemb train`` with no option but the rank (and, at smoke size, fewer rows)."""

    source: str = "text"

    def command(self, rows: Rows, out: pathlib.Path, setting: str, *, score: bool = False) -> list[str]:
        rank = str(RANK if self.model == FM else 0)
        path = str(rows.text if self.source == "text" else rows.parquet)
        command = [sys.executable, "-m", "hashemb", "train", path, "--table", str(out / "t.emb")]
        return [*command, "--rank", rank, *setting.split()]

    def counts(self, usage: Usage) -> tuple[int, int]:
        return numbers(r"([\d,]+) examples, ([\d,]+) positive", usage.output)

    def quality(self, rows: Rows, out: pathlib.Path) -> Quality:
        progress = json.loads((out / "t.emb" / "model.json").read_text(encoding="utf-8"))["progress"]
        metrics = StreamingMetrics.from_state_dict(progress["metrics"])
        return Quality(metrics.examples, metrics.logloss, metrics.auc)


@dataclass(frozen=True, eq=False)
class VowpalWabbit(Side):
    """``python -m vowpalwabbit``, the command-line program; `cached`: it reads its binary cache of the text."""

    cached: bool = False

    @property
    def prepares(self) -> bool:
        return self.cached

    def command(self, rows: Rows, out: pathlib.Path, setting: str, *, score: bool = False) -> list[str]:
        command = [sys.executable, "-m", "vowpalwabbit", "-d", str(rows.vw), "-b", "22", "--hash", "all"]
        command += ["--loss_function", "logistic", "--link", "logistic", "-f", str(out / "vw.model"), *setting.split()]
        if self.model == FM:
            command += ["--lrqfa", f"{NAMESPACES}{RANK}"]
        if self.cached:  # the first run writes the cache, later runs read it
            command += ["--cache_file", str(rows.vw.with_suffix(".cache"))]
        return command + (["-p", str(out / "vw.predictions")] if score else [])

    def counts(self, usage: Usage) -> tuple[int, int]:
        (count,) = numbers(r"number of examples = (\d+)", usage.output)
        (label_sum,) = numbers(r"weighted label sum = (-?\d+)", usage.output)
        return count, (count + label_sum) // 2

    def quality(self, rows: Rows, out: pathlib.Path) -> Quality:
        return quality_of(rows, np.loadtxt(out / "vw.predictions", np.float64, ndmin=1))


@dataclass(frozen=True, eq=False)
class Peer(Side):
    """A program of `bench.ctr_peers`."""

    peer: str = ""

    def command(self, rows: Rows, out: pathlib.Path, setting: Any, *, score: bool = False) -> list[str]:
        predictions = str(out / "predictions.npy") if score else None
        spec = {"peer": self.peer, "path": str(rows.vw), "settings": setting, "predictions": predictions}
        return [sys.executable, "-W", "ignore", "-m", "bench.ctr_peers", json.dumps(spec)]

    def counts(self, usage: Usage) -> tuple[int, int]:
        found = json.loads(usage.output.splitlines()[-1])
        return found["examples"], found["positives"]

    def quality(self, rows: Rows, out: pathlib.Path) -> Quality:
        return quality_of(rows, np.load(out / "predictions.npy").astype(np.float64))


def numbers(pattern: str, text: str) -> tuple[int, ...]:
    """Return the groups of the pattern as integers."""
    found = re.search(pattern, text)
    if found is None:
        raise Mismatch(f"no {pattern!r} in what was printed: {text[-500:]}")
    return tuple(int(group.replace(",", "")) for group in found.groups())


def quality_of(rows: Rows, probabilities: np.ndarray) -> Quality:
    labels = rows.labels()
    return Quality(len(labels), logloss(labels, probabilities), auc(labels, probabilities))


def sides(smoke: bool) -> Sequence[Side]:
    """Return all sides, ours first. Rows and grids are smaller at smoke size."""
    fewer = {"VW FM": 50_000, "scikit-learn": 100_000, "river": 20_000, "torch": 100_000, "DeepCTR-Torch": 1024}
    rows = {name: 512 if smoke else count for name, count in fewer.items()}
    ours = ("--rows 2^14",) if smoke else ("",)
    torch_settings = {"lr": 0.04, "accumulator": 5.0}
    everybody = (
        Ours("hashemb", LR, "hashemb", ours),
        Ours("hashemb, Parquet", LR, "hashemb Parquet", ours, source="parquet"),
        VowpalWabbit("VW", LR, "VW LR", VW_LR, package="vowpalwabbit"),
        VowpalWabbit("VW, from its cache", LR, "VW LR", VW_LR[:1], package="vowpalwabbit", cached=True),
        Peer("scikit-learn", LR, "scikit-learn", SKLEARN, rows["scikit-learn"], package="sklearn", peer="sklearn"),
        Peer("river", LR, "river", RIVER, rows["river"], package="river", peer="river"),
        Ours("hashemb", FM, "hashemb", ours),
        Ours("hashemb, Parquet", FM, "hashemb Parquet", ours, source="parquet"),
        VowpalWabbit("VW", FM, "VW FM", VW_FM, rows["VW FM"], package="vowpalwabbit"),
        Peer("torch, batch 256", FM, "torch", ({"batch": 256, **torch_settings},), rows["torch"],
             package="torch", peer="torch"),
        Peer("torch, batch 4096", FM, "torch", ({"batch": 4096, **torch_settings},), rows["torch"],
             package="torch", peer="torch"),
        Peer("DeepCTR-Torch", FM, "torch", ({"batch": 256},), rows["DeepCTR-Torch"], once=True,
             package="deepctr_torch", has_quality=False, peer="deepctr"),
    )  # fmt: skip
    slow = {"DeepCTR-Torch", "torch, batch 4096"} if smoke else set()  # ten seconds per batch; a repeated side
    return [side for side in everybody if side.name not in slow]


VW_LR = ("-l 0.2", "-l 0.05", "-l 0.1", "-l 0.5")
#: The normalised default diverges with so many products; only these settings learned anything.
VW_FM = ("--coin", "-l 0.02 --adaptive --invariant", "--ftrl --ftrl_alpha 0.005")
SKLEARN = (
    {"learning_rate": "constant", "eta0": 0.01, "alpha": 1e-6},
    {"learning_rate": "invscaling", "eta0": 0.05, "power_t": 0.25, "alpha": 1e-6},
    {"alpha": 1e-4},
)
RIVER = ({"lr": 0.02}, {"lr": 0.05}, {"lr": 0.01})
