"""BARS's recipe in plain PyTorch on the files of `frappe_deep.py`, as a baseline without hashemb's tables.

    python examples/frappe_plain.py [DIRECTORY] [--models DeepFM DCNv2] [--seeds 0 1 2]

The recipe uses a vocabulary of the training file, `torch.nn.Embedding` instead of the table, Adam for all parameters,
L2 on all rows in every batch, and a tenth of the learning rate once the validation AUC has not risen for two epochs
(FuxiCTR's settings of the benchmark: rank 10, batches of 4,096, towers 400-400-400, dropout .2). The validation and
test rows are those of BARS; its training negatives are unavailable and were redrawn, so the recipe need not reach the
published metrics.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from frappe import default_directory, load

import hashemb
from hashemb.ctr.metrics import auc, logloss
from hashemb.ctr.models import deep

RANK, L2, LR, BATCH_SIZE, MAX_EPOCHS = 10, 0.05, 1e-3, 4096, 30
PATIENCE, LAST_PATIENCE = 2, 4  # epochs without a better validation AUC before a lower rate, and before the end
Figures = dict[str, float]
Examples = tuple[torch.Tensor, np.ndarray]


def numbered(data: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[dict[str, Examples], int]:
    """Replace the keys by numbers: each key of the training file has one, and all other keys share one."""
    known = np.unique(data["train"][0])
    examples = {}
    for name, (keys, labels) in data.items():
        place = np.minimum(np.searchsorted(known, keys), known.size - 1)
        examples[name] = torch.from_numpy(np.where(known[place] == keys, place, known.size)), labels
    return examples, known.size + 1


def model_of(name: str, num_values: int, num_fields: int, directory: str) -> torch.nn.Module:
    """Build the model of `hashemb.ctr.models.deep` with `torch.nn.Embedding` instead of a table."""
    dim = RANK if name == "DCNv2" else 1 + RANK
    with hashemb.create(f"{directory}/unused.emb", num_embeddings=1, embedding_dim=dim) as table:
        model: torch.nn.Module = getattr(deep, name)(table, num_fields, dropout=0.2)
    model.embedding = torch.nn.Embedding(num_values, dim)
    torch.nn.init.normal_(model.embedding.weight, std=1e-4)
    return model


def train(name: str, data: dict[str, Examples], num_values: int, seed: int, max_epochs: int = MAX_EPOCHS) -> Figures:
    """Train a model; return the metrics of the epoch with the best validation AUC."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("medium")
    rng, best, idle, started = np.random.default_rng(seed), {"valid_auc": 0.0}, 0, time.perf_counter()
    keys, labels = data["train"]
    with tempfile.TemporaryDirectory(prefix="hashemb-frappe-") as directory:
        model = model_of(name, num_values, keys.shape[1], directory)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for epoch in range(1, max_epochs + 1):
        order = rng.permutation(len(labels))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            optimizer.zero_grad()
            logits = model(keys[batch])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels[batch]))
            (loss + L2 / 2 * model.embedding.weight.square().sum()).backward()
            optimizer.step()
        valid_auc = auc(data["valid"][1], deep.predict_proba(model, data["valid"][0]))
        if valid_auc > best["valid_auc"]:
            p = deep.predict_proba(model, data["test"][0])
            best = {"valid_auc": valid_auc, "test_auc": auc(data["test"][1], p)}
            best |= {"test_logloss": logloss(data["test"][1], p), "epoch": epoch}
            idle = 0
            continue
        idle += 1
        if idle == LAST_PATIENCE:
            break
        if idle >= PATIENCE:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
    return best | {"seconds": time.perf_counter() - started}


def show(title: str, runs: list[Figures]) -> None:
    """Print a line of medians."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    cells = [f"{m:>14.0f}" if name in ("epoch", "seconds") else f"{m:>14.4f}" for name, m in medians.items()]
    print(f"{title:<16}" + "".join(cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory())
    parser.add_argument("--models", nargs="+", choices=("DeepFM", "DCNv2"), default=("DeepFM", "DCNv2"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="two epochs on the first 20,000 rows")
    options = parser.parse_args()
    most, epochs = (20_000, 2) if options.smoke else (None, MAX_EPOCHS)
    loaded = {name: load(options.directory / f"{name}.csv.gz") for name in ("train", "valid", "test")}
    files, rows = numbered({name: (keys[:most], labels[:most]) for name, (keys, labels) in loaded.items()})
    heads = ("valid_auc", "test_auc", "test_logloss", "epoch", "seconds")
    print(f"{'':<16}" + "".join(f"{head:>14}" for head in heads))
    for wanted in options.models:
        found = []
        for number in options.seeds:
            found.append(train(wanted, files, rows, number, epochs))
            show(f"{wanted} seed {number}", found[-1:])
        show(f"{wanted} median", found)
