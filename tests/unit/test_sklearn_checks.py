"""scikit-learn's own estimator checks, on each of our estimators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

import hashemb.sklearn
from hashemb.sklearn import HashedFMClassifier, HashedFwFMClassifier, HashedLogisticRegression

if "expected_failed_checks" not in inspect.signature(parametrize_with_checks).parameters:
    pytest.skip("scikit-learn before 1.6 has other checks", allow_module_level=True)

SMALL = {"rows": 4096}
ESTIMATORS = [
    HashedLogisticRegression(**SMALL),
    HashedFMClassifier(rank=4, **SMALL),
    HashedFwFMClassifier(rank=4, **SMALL),
]

FLOAT32 = "a weight of 3 and three copies differ in the last bits of float32 sums; test_sklearn.py has it to 1e-4"


def expected_failures(estimator: Any) -> dict[str, str]:
    """Return the checks whose requirements cannot be met, with the reasons."""
    failures = {"check_sample_weight_equivalence_on_dense_data": FLOAT32}
    if estimator._takes_sparse:
        failures["check_sample_weight_equivalence_on_sparse_data"] = FLOAT32
    return failures


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=expected_failures)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_all_estimators_are_checked() -> None:
    assert sorted(type(estimator).__name__ for estimator in ESTIMATORS) == sorted(hashemb.sklearn.__all__)
