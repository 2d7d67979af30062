"""DeepFM and DCN-V2 on Frappe, with hashed keys and no vocabulary: three seeds of each, and the medians.

    python examples/frappe_deep.py [DIRECTORY] [--models DeepFM DCNv2] [--seeds 0 1 2] [--set optimizer.weight_decay=0]

All settings are in frappe_deep.json next to this file; --set changes single values of every model for one run. --tune,
with which the settings were found, never reads the test file. DIRECTORY is that of frappe.py. BARS reports, on the test
file, AUC / log loss .9842 / .1482 for DeepFM and .9845 / .1491 for DCN-V2.

Models whose names end in "-redrawn" are trained with new negatives in every epoch, as is usual with negative sampling:
the training file's own negatives are not observations but one draw of two items for each positive, uniform over the
items that are not positive for its user. These models redraw as many negatives by that rule from the training file.

DCNv2-small has a tenth of the memory for rows: each value consists of ten concatenated pieces of two bfloat16 numbers,
each hashed separately to 10,764 rows, of which 3,000 are for users, 7,000 for items and the rest for all other fields.
Hardly any two values share all ten pieces, and the cross layers and the tower, which keep their width, distinguish
them. The model is distilled: the large model, DCNv2-redrawn, is trained first, and its probabilities for each epoch's
rows replace the labels (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, at temperature 1).
Training therefore takes the memory of both models, and serving that of the small one.

Both learning rates, the table's and the tower's, decrease linearly from their initial values to 0 over all epochs.
Test metrics are those of the epoch with the best validation AUC.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tables import keys_for_rows
from frappe import default_directory, load

import hashemb
import hashemb.reference
from hashemb.ctr.metrics import auc, logloss
from hashemb.ctr.models import deep
from hashemb.torch import TableOptimizer

Data = dict[str, tuple[np.ndarray, np.ndarray]]
Settings = dict[str, Any]


@contextmanager
def trained(
    models: dict[str, Settings], name: str, data: Data, directory: Path, seed: int, *, verbose: bool = False
) -> Iterator[tuple[torch.nn.Module, dict[str, float]]]:
    """Train a model on a new table, after its teacher if it has one; return it and the metrics of its best epoch."""
    settings = models[name]
    with ExitStack() as stack:
        teacher = None
        if settings["teacher"] is not None:
            others = {file: examples for file, examples in data.items() if file != "test"}
            lesson = trained(models, settings["teacher"], others, directory, seed, verbose=verbose)
            teacher, _ = stack.enter_context(lesson)
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision(settings["matmul_precision"])  # "medium": bfloat16, if that is fast
        optimizer = dict(settings["optimizer"])
        table = stack.enter_context(
            hashemb.create(
                directory / f"{name}.emb",
                num_embeddings=settings["num_embeddings"],
                embedding_dim=settings["embedding_dim"],
                optimizer=getattr(hashemb, optimizer.pop("class"))(**optimizer),
                init=hashemb.Normal(settings["init_std"]),
                dtype=settings["dtype"],
                seed=seed,
            )
        )
        keys_each = data["train"][0].shape[1] * settings["pieces"]
        model: torch.nn.Module = getattr(deep, settings["class"])(table, keys_each, **settings["model"])
        if settings["regions"]:
            model = Split(model, table, settings["pieces"], settings["regions"])
        yield model, fit(model, settings, data, np.random.default_rng(seed), teacher, verbose=verbose)


class Split(torch.nn.Module):
    """Wraps a model so that each key becomes `pieces` keys, different hashes of a value, whose rows are concatenated.

    `regions` are the numbers of rows for the first field, for the second and so on; the last is for all remaining
    fields. Without regions, a very frequent value would slow the learning of a rare one in the same row, because
    Adagrad's steps become shorter with each gradient of the row.
    """

    def __init__(self, model: torch.nn.Module, table: hashemb.EmbeddingTable, pieces: int, regions: list[int]) -> None:
        super().__init__()
        self.model, self.table = model, table
        self.salts = hashemb.hash_keys(np.arange(pieces), field="piece")
        self.sizes = np.array(regions, np.uint64)[:, None]
        self.starts = self.sizes.cumsum(axis=0) - self.sizes

    def forward(self, keys: np.ndarray) -> torch.Tensor:
        region = np.minimum(np.arange(keys.shape[1]), len(self.sizes) - 1)
        hashes = hashemb.reference.fmix64(keys[..., None] ^ self.salts) >> np.uint64(32)
        rows = self.starts[region] + (hashes * self.sizes[region] >> np.uint64(32))
        split: torch.Tensor = self.model(keys_for_rows(self.table, rows).reshape(len(keys), -1))
        return split


def fit(
    model: torch.nn.Module,
    settings: Settings,
    data: Data,
    rng: np.random.Generator,
    teacher: torch.nn.Module | None,
    *,
    verbose: bool,
) -> dict[str, float]:
    """Train for all epochs; evaluate each on the validation file and, if its AUC is the best so far, the test file.

    With a teacher, its probabilities are learned instead of the labels.
    """
    optimizer, tables = torch.optim.Adam(model.parameters(), lr=settings["tower_lr"]), TableOptimizer(model)
    num_batches = -(-len(data["train"][1]) // settings["batch_size"])
    total = settings["epochs"] * num_batches
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / total) for o in (optimizer, tables)]
    best: dict[str, float] = {"valid_auc": 0.0}
    started = time.perf_counter()
    for epoch in range(1, settings["epochs"] + 1):
        keys, labels = data["train"]
        if settings["negatives"] == "redrawn":
            keys = redrawn(keys, labels, rng)
        targets = labels if teacher is None else deep.predict_proba(teacher, keys)
        for loss in losses(model, (keys, targets), settings["batch_size"], rng):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tables.step()
            for schedule in schedules:
                schedule.step()
        figures = evaluate(model, data["valid"], "valid")
        if verbose:
            seconds = time.perf_counter() - started
            print(f"{epoch:>5} {figures['valid_auc']:.5f} {figures['valid_logloss']:.4f} {seconds:.1f} s", flush=True)
        if figures["valid_auc"] > best["valid_auc"]:
            test = evaluate(model, data["test"], "test") if "test" in data else {}
            best = {"epoch": epoch, **figures, **test}
    return best | {"seconds": time.perf_counter() - started}


def redrawn(keys: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the keys with a new item in each negative: any item of the file that is not positive for its user."""
    users, items = np.unique(keys[:, 0], return_inverse=True)[1], np.unique(keys[:, 1])
    positive = np.zeros((users.max() + 1, items.size), bool)
    is_positive = labels == 1
    positive[users[is_positive], np.searchsorted(items, keys[is_positive, 1])] = True
    keys, rows = keys.copy(), np.flatnonzero(~is_positive)
    while rows.size:
        drawn = rng.integers(items.size, size=rows.size)
        keys[rows, 1] = items[drawn]
        rows = rows[positive[users[rows], drawn]]
    return keys


def losses(
    model: torch.nn.Module, examples: tuple[np.ndarray, np.ndarray], batch_size: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Yield the mean logistic loss of each batch of an epoch, in random order."""
    keys, targets = examples
    order = rng.permutation(len(targets))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield torch.nn.functional.binary_cross_entropy_with_logits(model(keys[batch]), torch.from_numpy(targets[batch]))


def evaluate(model: torch.nn.Module, examples: tuple[np.ndarray, np.ndarray], name: str) -> dict[str, float]:
    """Compute AUC and log loss on a file."""
    keys, labels = examples
    probabilities = deep.predict_proba(model, keys)
    return {f"{name}_auc": auc(labels, probabilities), f"{name}_logloss": logloss(labels, probabilities)}


def read_settings(path: Path, changes: list[str]) -> dict[str, Settings]:
    """Read the settings of each model; `changes` have the form ``name.name=value``, with a value in JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    models = {name: {**content["common"], **settings} for name, settings in content["models"].items()}
    for settings in models.values():
        for change in changes:
            names, _, value = change.partition("=")
            *outer, last = names.split(".")
            place = settings
            for name in outer:
                place = place[name]
            if last not in place:
                raise SystemExit(f"--set {change}: there is no {last!r} among {sorted(place)}")
            place[last] = json.loads(value)
    return copy.deepcopy(models)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=default_directory())
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", dest="changes")
    parser.add_argument("--tune", action="store_true", help="show every epoch, and don't read the test file")
    parser.add_argument("--smoke", action="store_true", help="two epochs on the first 20,000 rows, without teachers")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Train the models and print their results."""
    options = parse(arguments)
    files = ("train", "valid") if options.tune else ("train", "valid", "test")
    missing = [name for name in files if not (options.directory / f"{name}.csv.gz").exists()]
    if missing:
        sys.exit(f"{options.directory}: {missing[0]}.csv.gz not found; see this file's first lines")
    data = {name: load(options.directory / f"{name}.csv.gz") for name in files}
    models = read_settings(options.settings, options.changes)
    if options.smoke:
        data = {name: (keys[:20_000], labels[:20_000]) for name, (keys, labels) in data.items()}
        models = {name: settings | {"epochs": 2, "teacher": None} for name, settings in models.items()}
    names = ["valid_auc", *(["test_auc", "test_logloss"] if "test" in data else []), "epoch", "seconds"]
    print(f"{'':<24}" + "".join(f"{name:>14}" for name in names))
    for name in options.models or models:
        runs = []
        for seed in options.seeds:
            with (
                tempfile.TemporaryDirectory(prefix="hashemb-frappe-") as temporary,
                trained(models, name, data, Path(temporary), seed, verbose=options.tune) as (_, run),
            ):
                runs.append(run)
            show(f"{name} seed {seed}", [run], names)
        show(f"{name} median", runs, names)


def show(title: str, runs: list[dict[str, float]], names: list[str]) -> None:
    """Print a line of medians."""
    medians = [statistics.median(run[name] for run in runs) for name in names]
    cells = [f"{m:>14.0f}" if n in ("epoch", "seconds") else f"{m:>14.4f}" for n, m in zip(names, medians, strict=True)]
    print(f"{title:<24}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
