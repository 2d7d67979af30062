"""Initialisers: what a row reads as until it is first written. Values, not procedures.

An initial value is a pure function of (seed, row, column), computed where it is needed and never stored; see
docs/hashing.md for the generator. With ``num_hashes = k`` each row is scaled by ``1 / sqrt(k)``, so that a
key's vector keeps the variance named here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Initializer", "Normal", "Uniform", "Zeros"]


def _check_width(owner: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a float, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value < 0.0 or value > 1e30:
        raise ValueError(f"{owner}: {name} must be between 0 and 1e30, got {value!r}")


@dataclass(frozen=True)
class Uniform:
    """Uniform on [-scale, scale), in steps of ``scale * 2**-23``."""

    scale: float = 0.01
    kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        _check_width("Uniform", "scale", self.scale)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and standard deviation `std`; the tails end at 6.2 standard deviations."""

    std: float = 0.01
    kind: ClassVar[str] = "normal"

    def __post_init__(self) -> None:
        _check_width("Normal", "std", self.std)


@dataclass(frozen=True)
class Zeros:
    """All zeros."""

    kind: ClassVar[str] = "zeros"


Initializer = Uniform | Normal | Zeros
