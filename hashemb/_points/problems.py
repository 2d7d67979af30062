"""What a check has found: problems, told one by one, and only counted where there are too many of a kind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

__all__ = ["Problem", "Report"]

MAX_LISTED = 10  # problems of one kind in one file that are told one by one

_MESSAGE = re.compile(r"(?:damaged: )?expected (?P<expected>.*?)[,;] found (?P<found>.*)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it must be.

    Attributes
    ----------
    file : str
        Its path.
    expected, found : str
        What must be there, and what is.

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
    """Collects the problems of one directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._listed: dict[tuple[str, str], list[Problem]] = {}
        self._more: dict[tuple[str, str], int] = {}

    def add(self, name: str, expected: str, found: str) -> None:
        """One problem in the file `name` of the directory."""
        self.add_many(name, expected, 1, [(expected, found)])

    def add_many(self, name: str, kind: str, count: int, pairs: Iterable[tuple[str, str]]) -> None:
        """`count` problems of one kind; of `pairs` (expected, found) no more are taken than will be told."""
        listed = self._listed.setdefault((name, kind), [])
        taken = [self._problem(name, *pair) for pair in islice(pairs, max(0, min(count, MAX_LISTED - len(listed))))]
        listed += taken
        self._more[name, kind] = self._more.get((name, kind), 0) + count - len(taken)

    def add_error(self, name: str, error: Exception) -> None:
        """An error of reading the file `name`, as a problem of it."""
        if isinstance(error, OSError):
            self.add(name, "a file that can be read", str(error))
        else:
            self.add_message(name, str(error), "what this version reads")

    def add_message(self, name: str, message: str, expected: str) -> None:
        """What an error said of the file `name`, which was to be `expected` if it did not say so itself."""
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
