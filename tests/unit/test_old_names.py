"""Modules that have moved are still found at their old names, with a warning."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(("old", "new"), [("readers", "data"), ("fields", "data"), ("deep", "models.deep")])
def test_an_old_name_hands_on_the_new_ones(old: str, new: str) -> None:
    if old == "deep":
        pytest.importorskip("torch")
    sys.modules.pop(f"hashemb.ctr.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"hashemb.ctr.{old} is now hashemb.ctr.{new}"):
        module = importlib.import_module(f"hashemb.ctr.{old}")
    current = importlib.import_module(f"hashemb.ctr.{new}")
    assert module.__all__
    assert all(getattr(module, name) is getattr(current, name) for name in module.__all__)
