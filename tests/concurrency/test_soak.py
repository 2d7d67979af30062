"""A short form of the soak (soak.py), and checks that it can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from soak import Plan, SoakError, judge, run_soak
from soak_roles import ROLES


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    plan = Plan(20, pace=0.4, every_s=0.5, growth_kib=8192, prefill=False)  # memory does not settle within seconds
    figures = run_soak(tmp_path, plan, tmp_path / "soak.csv")
    print(figures)
    assert figures["sums"] == "exact"
    assert set(figures["processes"]) == set(ROLES)
    assert len((tmp_path / "soak.csv").read_text().splitlines()) > 5 * 20
    assert [path.name for path in tmp_path.iterdir()] == ["soak.csv"]


def samples(anonymous_kib: list[float], descriptors: list[int]) -> list[dict[str, object]]:
    return [
        {"seconds": 10.0 * i, "process": "writer", "anonymous_kib": kib, "descriptors": count, "threads": 1}
        for i, (kib, count) in enumerate(zip(anonymous_kib, descriptors, strict=True))
    ]


def test_level_memory_and_descriptors_pass() -> None:
    noise = np.random.default_rng(0).normal(0, 50, 100)
    start = np.minimum(np.arange(100) * 500, 20_000)  # it grows only at first
    assert judge(samples(list(30_000 + start + noise), [9] * 100), 512)["processes"]["writer"]["grown_kib"] < 100


def test_growing_memory_fails() -> None:
    with pytest.raises(SoakError, match="grew by 98"):
        judge(samples([30_000 + 20 * i for i in range(100)], [9] * 100), 512)


def test_growing_descriptors_fail() -> None:
    with pytest.raises(SoakError, match="descriptors rose from 11 to 16"):
        judge(samples([30_000] * 100, [9 + i // 10 for i in range(100)]), 512)
