"""A fuzzer for readers and saved models: read hostile files and check the outcome.

Each case is a function of (kind, seed, number), so that a failing case can be replayed by its number. The program
makes as many cases as requested. It ends with status 1 on anything but a documented error that names the file, on a
warning, and on more than a quarter GiB of memory for one of these small files; with a traceback if a case takes more
than 20 seconds::

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

#: One case: make its files in the directory, use them, and return the outcome as a word.
Case = Callable[[Path, random.Random], str]


class WrongError(AssertionError):
    """Raised for an undocumented outcome."""


def changed(data: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    """Return the data after a few changes: some that files suffer in practice, some that are typical of fuzzers."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        data = _changed_once(data, rng, words)
    return data


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """Return the data with a few bytes overwritten, and none moved."""
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
    """Return the outcome of one case; raise an error if it is wrong."""
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
    """Run `count` cases and count their outcomes; the first `patience` failures are printed."""
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
