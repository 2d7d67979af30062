"""Problems found by a check. They are listed one by one, and only counted if there are too many of a kind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

__all__ = ["Problem", "Progress", "Report"]

Progress = Callable[[int, int], None]  # (blocks done, total)

MAX_LISTED = 10  # listed problems of one kind in one file

_MESSAGE = re.compile(r"(?:damaged: )?expected (?P<expected>.*?)[,;] found (?P<found>.*)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A problem that `hashemb.verify` found in a file.

    Attributes
    ----------
    file : str
        Path of the file.
    expected, found : str
        Expected and actual content.

    Examples
    --------
    >>> from hashemb import Problem
    >>> print(Problem("ads.emb/weight.npy", "4352 bytes", "4096 bytes"))
    ads.emb/weight.npy: expected 4352 bytes, found 4096 bytes
    """

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


class Report:
    """Collection of the problems in one directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._listed: dict[tuple[str, str], list[Problem]] = {}
        self._more: dict[tuple[str, str], int] = {}

    def add(self, name: str, expected: str, found: str) -> None:
        """Add one problem in the file `name` of the directory."""
        self.add_many(name, expected, 1, [(expected, found)])

    def add_many(self, name: str, kind: str, count: int, pairs: Iterable[tuple[str, str]]) -> None:
        """Add `count` problems of one kind; only as many `pairs` (expected, found) are consumed as will be listed."""
        listed = self._listed.setdefault((name, kind), [])
        taken = [self._problem(name, *pair) for pair in islice(pairs, max(0, min(count, MAX_LISTED - len(listed))))]
        listed += taken
        self._more[name, kind] = self._more.get((name, kind), 0) + count - len(taken)

    def add_error(self, name: str, error: Exception) -> None:
        """Add an error raised while reading the file `name`, as a problem."""
        if isinstance(error, OSError):
            self.add(name, "a file that can be read", str(error))
        else:
            self.add_message(name, str(error), "what this version reads")

    def add_message(self, name: str, message: str, expected: str) -> None:
        """Add an error message about the file `name`; `expected` is used if the message does not name it."""
        filename = os.path.join(self.directory, name)
        message = message.removeprefix(f"{filename}: ").removeprefix(f"{self.directory}: ")
        parts = _MESSAGE.fullmatch(message)
        self.add(name, *((parts["expected"], parts["found"]) if parts else (expected, message)))

    def _problem(self, name: str, expected: str, found: str) -> Problem:
        return Problem(os.path.join(self.directory, name), expected, found)

    def problems(self) -> list[Problem]:
        found = []
        for (name, kind), listed in self._listed.items():
            found += listed
            if self._more[name, kind]:
                found.append(self._problem(name, kind, f"{self._more[name, kind]:,} more that are not so"))
        return found
