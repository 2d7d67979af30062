"""Files that nobody would write, and what comes of reading them: for readers and for saved models.

Each case is a function of (kind, seed, number), so that one that fails is found again by its number. Run as a program
it makes as many as it is told to, and ends with status 1 after what is not a documented error that names the file, a
warning, or more than a quarter GiB of memory for one of these small files; with a traceback after 20 seconds on one::

    python tests/hostile_files.py readers --count 20000
    python tests/hostile_files.py models --count 20000 --seed 7
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import importlib
import io
import os
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

KINDS = {"readers": "hostile_data", "models": "hostile_models"}
MAX_SECONDS, MAX_GROWTH_BYTES = 20.0, 1 << 28

#: One case: makes its file or files in the directory, uses them, and returns what came of it in a word.
Case = Callable[[Path, random.Random], str]


class WrongError(AssertionError):
    """An outcome that is not documented."""


def changed(data: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    """The data after a few changes of the kinds that files suffer, and those that a fuzzer likes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        data = _changed_once(data, rng, words)
    return data


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """The data with a few bytes changed, and no other moved."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content))
        content[at] = rng.choice([content[at] ^ 1 << rng.randrange(8), 0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(content)


def _changed_once(data: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    at, size = rng.randint(0, len(data)), rng.choice([1, 1, 2, 4, 8, 64])
    at = rng.choice([at, max(0, len(data) - rng.randint(0, 600))])  # Parquet's footer is at the end
    piece = data[at : at + size]
    match rng.randrange(9):
        case 0 if piece:
            return data[:at] + bytes([piece[0] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes(rng.randrange(256) for _ in piece) + data[at + size :]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + piece * rng.choice([2, 3, 300]) + data[at + size :]
        case 4:
            return data[:at] + rng.choice(words) + data[at:]
        case 5:
            return data[:at] + rng.choice(words) + data[at + size :]
        case 6:
            return data[:at]
        case 7:
            start = rng.randint(0, len(data))
            return data[:at] + data[start : start + size] + data[at:]
        case _:
            return data[:at] + bytes([rng.choice([0, 0xFF, 0x80, 0x0A, 0x22])]) * size + data[at + size :]


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def run_case(case: Case, kind: str, seed: int, number: int, place: Path) -> str:
    """The outcome of one case; raises where it is not to be."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("error")
            outcome = case(place, random.Random(f"{kind} {seed} {number}"))
    finally:
        faulthandler.cancel_dump_traceback_later()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if number > 50 and grown > MAX_GROWTH_BYTES:
        raise WrongError(f"{grown:,} bytes of memory")
    return outcome


def run(kind: str, seed: int, count: int, *, first: int = 0, patience: int = 1) -> collections.Counter[str]:
    """Run so many cases, and count what came of them; the first `patience` that fail are printed."""
    cases: Callable[[Path], Case] = importlib.import_module(KINDS[kind]).cases
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        case = cases(Path(directory))
        for number in range(first, first + count):
            place = Path(directory, "case")
            try:
                outcomes[run_case(case, kind, seed, number, place)] += 1
            except Exception as error:
                outcomes["WRONG"] += 1
                print(f"{kind} --seed {seed} --first {number} --count 1: {type(error).__name__}: {error}")
                patience -= 1
                if not patience:
                    raise
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--patience", type=int, default=1, help="failures to print before the end")
    options = parser.parse_args()
    os.environ.setdefault("HASHEMB_NUM_THREADS", "1")
    outcomes = run(options.kind, options.seed, options.count, first=options.first, patience=options.patience)
    print(f"{options.kind}, seed {options.seed}: {sum(outcomes.values()):,} cases: {dict(outcomes.most_common())}")
    return 1 if outcomes["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
