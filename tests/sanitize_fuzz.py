"""The fuzzing process of sanitize.py: it opens mutations of a table, a snapshot, deltas or a model, in turn.

For each mutation it tries every way to read and use the result. It writes down the mutation before and the outcomes
afterwards, so that its notes name the case if it dies. If a case takes too long, the process prints its stacks and
ends.
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from resealed import DOCUMENTED, Mutation, mutations, outcomes

import hashemb
from hashemb.ctr.training import ModelCard, SourcePosition, load_model, read_card
from hashemb.ctr.training.model_dir import write_card
from hashemb.errors import HashembError

CASES_PER_DRAW = 100
VARIANTS: dict[str, dict[str, Any]] = {
    "adagrad": {"weight_decay": 1e-3},
    "float16": {"dtype": "float16", "num_hashes": 2, "optimizer": hashemb.RowWiseAdagrad()},
    "ftrl": {"optimizer": hashemb.FTRL()},
}


def originals(place: Path, kind: str) -> list[Path]:
    """Make directories of that kind from three sorts of tables, through the public API."""
    return [make(place / f"{kind}-{name}", kind, dict(options)) for name, options in VARIANTS.items()]


def make(path: Path, kind: str, options: dict[str, Any]) -> Path:
    decay = options.pop("weight_decay", None)
    if decay is not None:
        options["optimizer"] = hashemb.Adagrad(weight_decay=decay)
    table_path = path if kind in ("table", "model") else path.with_name(f"{path.name}-source")
    with hashemb.create(table_path, num_embeddings=5000, embedding_dim=5, **options) as table:
        train(table, 1)
        if kind == "snapshot":
            table.snapshot(path, extra={"position": [1, {"a": "b"}]})
        elif kind == "deltas":
            path.mkdir()
            first = table.export_delta(None, path / "0.delta", state=True)
            train(table, 2)
            table.export_delta(first, path / "1.delta", state=True)
    if kind == "model":
        write_card(path, ModelCard(rank=4, schema={"a": "categorical"}, sources={"/data": SourcePosition(9, "x")}))
    return path


def train(table: hashemb.EmbeddingTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table.update(rng.integers(0, 3000, 300), rng.normal(size=(300, table.embedding_dim)).astype(np.float32))


# ---- using the result of a mutation ----


def use(copy: Path, kind: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the uses that `resealed.outcomes` leaves out: those that write, in the process and next to the copy."""
    beside = copy.with_name(f"{copy.name}-beside")
    if kind == "deltas":
        for file in sorted(copy.glob("*.delta")):
            yield f"apply {file.name}", lambda file=file: apply_to_new(file, beside)
        return
    yield "snapshot", lambda: with_table(copy, lambda table: table.snapshot(beside / "snapshot"))
    yield "export", lambda: with_table(copy, lambda table: table.export_delta(None, beside / "x.delta", state=True))
    yield "stats", lambda: with_table(copy, lambda table: (table.stats(exact=True), table.prefetch([1]), repr(table)))
    yield "bags", lambda: with_table(copy, lambda table: table.lookup([1, 2, 3], offsets=[0, 1, 3], pooling="mean"))
    if kind == "snapshot":
        yield "restore", lambda: hashemb.restore(beside / "restored", copy)
    if kind == "model":
        yield "card", lambda: read_card(copy)
        yield "model", lambda: load_model(copy)[0].table.close()


def with_table(path: Path, work: Callable[[hashemb.EmbeddingTable], Any]) -> None:
    with hashemb.open(path, "r+") as table:
        if table.embedding_dim <= 1 << 16:
            work(table)


def apply_to_new(file: Path, beside: Path) -> None:
    with hashemb.create(beside / file.stem, num_embeddings=5000, embedding_dim=5) as table:
        hashemb.apply_delta(table, file)


def outcome_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except OSError as error:
        return "FileNotFoundError" if isinstance(error, FileNotFoundError) else "OSError"
    except HashembError as error:
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "ok"


def try_case(original: Path, kind: str, mutation: Mutation, place: Path) -> dict[str, str]:
    """Use a copy with the mutation in every way; return the outcomes by name."""
    copy, beside = place / "case", place / "case-beside"
    for old in (copy, beside, place / "case.replica"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(original, copy)
    beside.mkdir()
    mutation.apply(copy)
    found = outcomes(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return found | {name: outcome_of(call) for name, call in use(copy, kind)}


# ---- the cases ----


def drawn(originals: list[Path], spec: dict[str, Any]) -> Iterator[tuple[int, Path, Mutation]]:
    """Yield cases `begin` to `end` of a seed: each hundred is drawn at once from one original."""
    for draw in range(spec["begin"] // CASES_PER_DRAW, -(-spec["end"] // CASES_PER_DRAW)):
        rng = random.Random(f"{spec['seed']} {spec['kind']} {spec['seal']} {draw}")
        original = originals[draw % len(originals)]
        seal: Any = {"resealed": rng.choice(["sum", "all"]), "bytes": ""}[spec["seal"]]
        for i, mutation in enumerate(mutations(original, rng, CASES_PER_DRAW, seal=seal)):
            number = draw * CASES_PER_DRAW + i
            if spec["begin"] <= number < spec["end"]:
                yield number, original, mutation


def main(spec: dict[str, Any]) -> None:
    place, kind = Path(spec["place"]), spec["kind"]
    shutil.rmtree(place / "originals", ignore_errors=True)
    (place / "originals").mkdir()
    made = originals(place / "originals", kind)
    if "mutation" in spec:
        for original in made:
            print(original.name, try_case(original, kind, Mutation.decode(spec["mutation"]), place))
        return
    with open(spec["progress"], "w", encoding="utf-8") as progress:
        for number, original, mutation in drawn(made, spec):
            line: dict[str, Any] = {"number": number, "kind": kind, "mutation": mutation.encode()}
            (place / "current").write_text(json.dumps(line), encoding="utf-8")
            faulthandler.dump_traceback_later(spec["patience_s"], exit=True)
            results = try_case(original, kind, mutation, place)
            faulthandler.cancel_dump_traceback_later()
            line["wrong"] = [f"{name}: {result}" for name, result in results.items() if result not in DOCUMENTED]
            line["outcomes"] = sorted({result for result in results.values() if result in DOCUMENTED})
            print(json.dumps(line), file=progress, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    main(json.loads(sys.argv[1]))
