"""Optimisers, initialisers and errors: their values, their checks, and their messages."""

from __future__ import annotations

import copy
import dataclasses
import errno
import inspect
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from hashemb import FTRL, SGD, Adagrad, Normal, RowWiseAdagrad, Uniform, Zeros, errors, init, optim

OPTIMIZERS = [Adagrad, RowWiseAdagrad, SGD, FTRL]
INITIALIZERS = [Uniform, Normal, Zeros]
VALUES = [cls() for cls in [*OPTIMIZERS, *INITIALIZERS]]

DEFAULTS: dict[type, dict[str, float]] = {
    Adagrad: {"lr": 0.01, "eps": 1e-10, "initial_accumulator_value": 0.0, "weight_decay": 0.0},
    RowWiseAdagrad: {"lr": 0.01, "eps": 1e-10, "initial_accumulator_value": 0.0, "weight_decay": 0.0},
    SGD: {"lr": 0.01, "weight_decay": 0.0},
    FTRL: {"alpha": 0.05, "beta": 1.0, "l1": 0.0, "l2": 0.0},
    Uniform: {"scale": 0.01},
    Normal: {"std": 0.01},
    Zeros: {},
}
PARAMETERS = [(cls, name) for cls, defaults in DEFAULTS.items() for name in defaults]
ids = [f"{cls.__name__}-{name}" for cls, name in PARAMETERS]


@pytest.mark.parametrize("cls", DEFAULTS, ids=lambda cls: cls.__name__)
def test_defaults(cls: type[Any]) -> None:
    assert dataclasses.asdict(cls()) == DEFAULTS[cls]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_are_values(value: Any) -> None:
    """They are equal if their numbers are, hashable, frozen, can be copied and pickled, and repr round-trips."""
    assert value == type(value)()
    assert hash(value) == hash(type(value)())
    assert eval(repr(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
    for name in dataclasses.asdict(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1.0)


def test_kinds_differ_and_a_subclass_is_another_value() -> None:
    assert len({value.kind for value in VALUES}) == len(VALUES)
    assert RowWiseAdagrad() != Adagrad()
    assert Adagrad(lr=0.1) != Adagrad(lr=0.2)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_hyper_parameters_are_named(cls: type[Any]) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="positional argument"):
        cls(0.1)


@pytest.mark.parametrize(("cls", "name"), PARAMETERS, ids=ids)
@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_numbers_out_of_range(cls: type[Any], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must .*, got {value!r}$"):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "name"), PARAMETERS, ids=ids)
@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1]], ids=repr)
def test_what_is_no_number(cls: type[Any], name: str, value: object) -> None:
    with pytest.raises(
        TypeError, match=rf"{cls.__name__}: {name} must be a float, got {type(value).__name__}"
    ):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "name"), PARAMETERS, ids=ids)
@pytest.mark.parametrize("value", [0.25, 0, 0.0], ids=repr)
def test_numbers_in_range(cls: type[Any], name: str, value: float) -> None:
    if (cls, name) == (FTRL, "alpha") and value == 0:
        with pytest.raises(ValueError, match=r"FTRL: alpha must be between 1e-30 and 1e30 .*, got 0"):
            cls(alpha=value)
    else:
        assert getattr(cls(**{name: value}), name) == value


@pytest.mark.parametrize("cls", [Adagrad, RowWiseAdagrad, SGD], ids=lambda cls: cls.__name__)
def test_decay_must_leave_something_of_a_weight(cls: type[Any]) -> None:
    """Every step multiplies weights by 1 - lr * weight_decay: a factor of 0 would erase the table."""
    with pytest.raises(ValueError, match=r"lr \* weight_decay must be < 1, got 0.5 \* 2.0 = 1.0"):
        cls(lr=0.5, weight_decay=2.0)
    assert cls(lr=0.5, weight_decay=1.99).weight_decay == 1.99


def test_ftrl_names_its_rate_alpha() -> None:
    assert FTRL(alpha=0.3).lr == 0.3
    assert FTRL(alpha=0.3).weight_decay == 0.0
    with pytest.raises(TypeError, match="weight_decay"):
        FTRL(weight_decay=0.1)  # type: ignore[call-arg]


def test_state_files() -> None:
    assert Adagrad.state_files == {"accumulator": "element"}
    assert RowWiseAdagrad.state_files == {"accumulator": "row"}
    assert SGD.state_files == {}
    assert FTRL.state_files == {"z": "element", "n": "element"}


@pytest.mark.parametrize("cls", [Uniform, Normal], ids=lambda cls: cls.__name__)
def test_widths_that_would_overflow(cls: type[Any]) -> None:
    assert cls(1e30)
    with pytest.raises(ValueError, match=r"must be between 0 and 1e30 \(.*\), got 1.1e30"):
        cls(1.1e30)


@pytest.mark.parametrize("module", [optim, init, errors], ids=lambda module: module.__name__)
def test_all_lists_what_is_defined(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)
    defined = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    assert {name for name in defined if not name.startswith("_")} <= set(module.__all__)


def test_errors_form_the_tree_that_is_promised() -> None:
    parents = {
        errors.FormatError: errors.HashembError,
        errors.CorruptTableError: errors.FormatError,
        errors.ReadOnlyTableError: errors.HashembError,
        errors.ClosedTableError: errors.HashembError,
        errors.NoSpaceError: OSError,
        errors.MissingExtraError: ImportError,
    }
    for error, parent in parents.items():
        assert issubclass(error, parent)
        assert issubclass(error, errors.HashembError)


def test_no_space_is_an_os_error_with_its_number_and_file() -> None:
    error = errors.NoSpaceError("no room for 4096 bytes", Path("ads.emb/weight.npy"))
    assert (error.errno, error.strerror, error.filename) == (
        errno.ENOSPC,
        "no room for 4096 bytes",
        "ads.emb/weight.npy",
    )
    assert "no room for 4096 bytes" in str(error)
    assert errors.NoSpaceError("no room").filename is None


def test_a_missing_extra_says_what_to_install() -> None:
    error = errors.MissingExtraError("pyarrow", "ctr")
    assert str(error) == "this needs pyarrow: install it with  pip install 'hashemb[ctr]'"


@pytest.mark.parametrize(
    "error", [errors.NoSpaceError("no room", "weight.npy"), errors.MissingExtraError("pyarrow", "ctr")]
)
def test_errors_with_a_constructor_of_their_own_cross_processes(error: Exception) -> None:
    """Multiprocessing pickles the exceptions of a worker; a class that cannot be unpickled hangs the pool."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
