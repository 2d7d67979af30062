"""Ways to damage the files of a directory, as values that are drawn from a seed and printed if damage goes undetected.

As a program, it applies each line of JSON on standard input to a copy of a directory, opens and uses the result in both
modes, and prints what happened, for a parent that checks whether the process survives.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import hashemb
from hashemb.errors import HashembError

HEADER_BYTES = 4096


@dataclass(frozen=True)
class Damage:
    """A damage of the given kind to `file`: at byte or to size `a`, with byte, size or mask `b`, or with `other`."""

    kind: str
    file: str
    a: int = 0
    b: int = 0
    other: str = ""

    def apply(self, directory: Path) -> bool:
        """Apply the damage; return whether it has changed anything."""
        path = directory / self.file
        before = path.read_bytes()
        getattr(self, f"_{self.kind}")(path)
        return not path.exists() or path.read_bytes() != before

    def _truncate(self, path: Path) -> None:
        os.truncate(path, self.a)

    def _extend(self, path: Path) -> None:
        with open(path, "ab") as file:
            file.write(bytes([self.b]) * self.a)

    def _flip(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.a] ^= 1 << self.b
        path.write_bytes(data)

    def _fill(self, path: Path) -> None:
        """Overwrite 512 bytes with one value, like a lost sector."""
        data = bytearray(path.read_bytes())
        end = min(self.a + 512, len(data))
        data[self.a : end] = bytes([self.b]) * (end - self.a)
        path.write_bytes(data)

    def _remove(self, path: Path) -> None:
        path.unlink()

    def _swap(self, path: Path) -> None:
        other = path.parent / self.other
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)

    def _replace(self, path: Path) -> None:
        shutil.copyfile(self.other, path)

    def _exchange(self, path: Path) -> None:
        """Exchange two pages of the file."""
        data = bytearray(path.read_bytes())
        a, b = (slice(at, min(at + 4096, len(data))) for at in (self.a, self.b))
        data[a], data[b] = data[b], data[a]
        path.write_bytes(data)


def drawn(directory: Path, file: str, seed: int, *, flips: int) -> Iterator[Damage]:
    """Draw damages of one file: of its ends, and bit flips in its header, middle and tail."""
    size, rng = (directory / file).stat().st_size, random.Random(f"{seed} {file}")
    yield Damage("remove", file)
    for extra in (1, 8, 4096):
        yield Damage("extend", file, extra, rng.choice([0, 0x20, 0xFF]))
    if size:
        for shorter in sorted({0, 1, size // 2, size - 1, max(0, size - 4096), rng.randrange(size)}):
            yield Damage("truncate", file, shorter)
        for _ in range(flips):
            low = rng.choice([0, min(HEADER_BYTES, size - 1), max(0, size - 64)])
            yield Damage("flip", file, rng.randrange(low, size), rng.randrange(8))
        for value in (0, 0xFF, 0x5A):
            yield Damage("fill", file, rng.randrange(size), value)


# ---- the child ----


def outcome(directory: Path, mode: str) -> str:
    """Open and use a table; return "opened", or the name of the error."""
    keys, grads = np.arange(40), np.ones((40, 16), np.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with hashemb.open(directory, mode) as table:  # type: ignore[arg-type]
                table.lookup(keys)
                table.stats(exact=True)
                if mode == "r+":
                    table.update(keys, grads)
                    table.flush()
        return "opened"
    except (HashembError, FileNotFoundError) as error:
        return type(error).__name__


def main(original: Path) -> None:
    with tempfile.TemporaryDirectory(dir=original.parent) as place:
        for line in sys.stdin:
            results = []
            for mode in ("r", "r+"):
                copy = Path(place) / "t"
                shutil.copytree(original, copy)
                Damage(**json.loads(line)).apply(copy)
                results.append(outcome(copy, mode))
                shutil.rmtree(copy)
            print(json.dumps(results), flush=True)


def encode(damages: list[Damage]) -> str:
    return "".join(json.dumps(asdict(damage)) + "\n" for damage in damages)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
