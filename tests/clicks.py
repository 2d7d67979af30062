"""Clicks with three kinds of columns, for tests of the estimators."""

from __future__ import annotations

from typing import Any

import numpy as np


def clicks(n: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """Return a table of users, sites and prices, and labels that depend on all three and on a pair of them."""
    random = np.random.default_rng(seed)
    user, site = random.integers(0, 30, n), random.integers(0, 10, n)
    price = np.exp(random.normal(size=n))
    logit = np.sin(user * 7.0) + np.cos(site * 3.0) + ((user + site) % 2) - 0.5 - np.log(price)
    names = np.array([f"site-{i}.com" for i in range(10)])
    table = {"user": user, "site": names[site], "price": price}
    return table, random.random(n) < 1.0 / (1.0 + np.exp(-logit))


def rows_of(table: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: column[rows] for name, column in table.items()}
