"""Initialisers: the values that a row has until it is first written.

An initial value is a pure function of (seed, row, column). It is computed where it is needed and never stored; see
docs/explanation/hashing.md for the generator. With ``num_hashes = k`` each row is scaled by ``1 / sqrt(k)``, so that a
key's vector has the variance given here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hashemb._rules import hyper_parameter

__all__ = ["Initializer", "Normal", "Uniform", "Zeros"]


def _check_width(initializer: Uniform | Normal, name: str) -> None:
    """Check that a width is between 0 and 1e30, and store it as a Python number."""
    width = hyper_parameter(type(initializer).__name__, name, getattr(initializer, name), 0.0)
    object.__setattr__(initializer, name, width)


@dataclass(frozen=True)
class Uniform:
    """Uniform on [-scale, scale), in steps of ``scale * 2**-23``; `scale` is 0 to 1e30."""

    scale: float = 0.01
    kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        _check_width(self, "scale")


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and standard deviation `std`; the tails are cut at 6.2 standard deviations.

    `std` is 0 to 1e30.
    """

    std: float = 0.01
    kind: ClassVar[str] = "normal"

    def __post_init__(self) -> None:
        _check_width(self, "std")


@dataclass(frozen=True)
class Zeros:
    """All zeros."""

    kind: ClassVar[str] = "zeros"


Initializer = Uniform | Normal | Zeros
