"""Saved models with hostile cards, passed to everything that opens a model; see hostile_files.py.

Half of the cases change bytes of a card, half change its values: other types, numbers far out of range, missing or
unknown keys, deep nesting, lone surrogates, histograms of other sizes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import re
import shutil
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import Case, WrongError, changed

import hashemb
from hashemb import cli
from hashemb.ctr.report import describe, gather
from hashemb.ctr.training import Checkpoints, load_model, open_for_scoring, read_card, score
from hashemb.errors import FormatError, HashembError
from hashemb.sklearn import HashedFMClassifier, HashedFwFMClassifier, HashedLogisticRegression

_WORDS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"9" * 30, b"9" * 5000, b'""', b"[]", b"{}", b'"',
    b"[" * 5000, b'{"a":' * 3000, b",", b":", b"}", b"]", b"\\ud800", b"\\u0000", b"\xff", b"\0", b"\xef\xbb\xbf",
    b"1.5", b"18446744073709551616", b'"format": 1,',
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63 - 1, 2**63, 2**64,
    10**30, 10**400, "", "x", "0", "1", "\ud800", "\0", "a" * 3000, [], {}, [[]], [None], {"": None}, ["a", "b"],
    base64.b64encode(zlib.compress(bytes(64))).decode(), base64.b64encode(zlib.compress(bytes(1 << 24))).decode(),
    base64.b64encode(zlib.compress(np.full((2, 1 << 14), -5).tobytes())).decode(),
    base64.b64encode(zlib.compress(np.full((2, 1 << 14), np.nan).tobytes())).decode(),
    "string", "count", "vw", "csv", "field_aware_fm", "field_weighted_fm", "<U999999", "O", "<i8", "|b1", "M8[s]",
    "i4,i4",
]  # fmt: skip
#: The message of a model for keys that it does not accept: the data is valid, and so is the card by itself.
_OF_THE_MODEL = re.compile(r"the model has \d+ fields|fields must be|users can't be told apart")
_ESTIMATORS = {"HashedFMClassifier": HashedFMClassifier, "HashedFwFMClassifier": HashedFwFMClassifier}


def cases(directory: Path) -> Case:
    """Train models of every kind in the directory, and return a case that damages a copy of one."""
    data = _write_data(directory)
    models = {}
    for name, options in {
        "fm": ["a.csv", "--model", "fm", "--passes", "2"],
        "fwfm": ["a.csv", "--model", "fwfm", "--passes", "1"],
        "ffm": ["a.vw", "--model", "ffm", "--num-fields", "3"],
        "sampled": ["a.csv", "--negative-rate", "0.5", "--negative-correction", "weights", "--label-delay", "40"],
    }.items():
        arguments = [str(data / options[0]), "-t", str(directory / name), *options[1:], "--rows", "200"]
        arguments += ["--rank", "2", "--progress", "50"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main(["train", *arguments]) == 0
        models[name] = data / options[0]
    X, y = {"user": ["ann", "bob"] * 8, "n": list(range(16))}, ["no", "yes"] * 8
    for name, estimator in _ESTIMATORS.items():
        estimator(table=directory / name, rows=200, rank=2, max_iter=1).fit(X, y)
        models[name] = data / "a.csv"
    return lambda place, rng: _case(directory, models, place, rng)


def _write_data(directory: Path) -> Path:
    data = directory / "data"
    data.mkdir()
    rows = [f"{'yes' if i % 3 else 'no'},u{i % 7},{i * i},{i / 7}" for i in range(150)]
    (data / "a.csv").write_text("\n".join(["label,user,n,x", *rows, "bad"]) + "\n")
    (data / "a.vw").write_text("".join(f"{i % 2} |u u{i % 7} |a a{i % 3}:0.5 b\n" for i in range(60)))
    return data


def _case(directory: Path, models: dict[str, Path], place: Path, rng: random.Random) -> str:
    name = rng.choice(list(models))
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(directory / name, place)
    path = place / ("estimator.json" if name in _ESTIMATORS else "model.json")
    text = path.read_bytes()
    is_random = rng.random() < 0.5
    content = changed(text, rng, _WORDS) if is_random else _resealed(text, rng)
    use = _estimate if name in _ESTIMATORS else rng.choice([_inspect, _predict, _report, _train, _estimate, _resume])
    if use is not _resume:
        path.write_bytes(content)
    try:
        use(place, models[name], content)
    except (HashembError, ValueError, FileNotFoundError) as error:
        if not (str(place) in str(error) or str(models[name]) in str(error) or _OF_THE_MODEL.search(str(error))):
            raise WrongError(f"{use.__name__}: {type(error).__name__} names no file: {error}") from error
        return f"{'random' if is_random else 'values'} {type(error).__name__}"
    return f"{'random' if is_random else 'values'} {use.__name__[1:]}"


def _resealed(text: bytes, rng: random.Random) -> bytes:
    values = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _change(values, rng)
    return json.dumps(values).encode()


def _change(values: Any, rng: random.Random) -> None:
    """Change one value at any depth."""
    while True:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(values[key], (dict, list)) and rng.random() < 0.8:
            values = values[key]
            continue
        match rng.randrange(8):
            case 0:
                del values[key]
            case 1:
                values[key] = values[rng.choice(keys)]
            case 2 if isinstance(values, dict):
                values[rng.choice(["x", "\ud800", "", "label", "hashemb.bias"])] = values.pop(key)
            case 3 if isinstance(values, list):
                values.append(values[key])
            case 4 if isinstance(values[key], (int, float)):
                values[key] *= rng.choice([-1, 2, 10**10, 1.5, 0])
            case 5:
                values[key] = nested(rng.choice([50, 900]))
            case _:
                values[key] = rng.choice(_VALUES)
        return


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 5


# ---- uses ----


def _inspect(place: Path, data: Path, content: bytes) -> None:
    "\n".join(f"{name} {value}" for name, value in describe(place))


def _predict(place: Path, data: Path, content: bytes) -> None:
    model, card = load_model(place)
    with closing(model.table), open_for_scoring(card, [data], strict=False) as reader:
        for _ in score(model, reader, card.negatives()):
            pass


def _report(place: Path, data: Path, content: bytes) -> None:
    facts = gather(place, [data], compare=[place])
    facts.learning.calibration_by_quantile()
    [bool(row.auc > row.logloss) for row in facts.curve]


def _train(place: Path, data: Path, content: bytes) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main(["train", str(data), "-t", str(place), "--passes", "3", "--progress", "50"])
    if status:
        raise ValueError(errors.getvalue())
    read_card(place)  # a card that was read and written can be read again


def _estimate(place: Path, data: Path, content: bytes) -> None:
    if not (place / "estimator.json").exists():
        HashedLogisticRegression.from_table(place)
        return
    for name, estimator in _ESTIMATORS.items():
        if name.encode() in content:
            fitted = estimator.from_table(place)
            with contextlib.suppress(ValueError, TypeError, UserWarning):  # other columns, if the card says so
                fitted.predict_proba({"user": ["ann", "eve"], "n": [1, 2]})


def _resume(place: Path, data: Path, content: bytes) -> None:
    """Use the card as that of a checkpoint of a model whose training was killed."""
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):
        return
    snapshots = place.with_name("snapshots")
    shutil.rmtree(snapshots, ignore_errors=True)
    snapshots.mkdir()
    with hashemb.open(place, "r+") as table:
        try:
            table.snapshot(snapshots / "step-000000000000001", extra={"model": card, "delta": None})
        except (ValueError, TypeError, RecursionError):
            return  # not a valid snapshot: NaN and the like
        table.update([1], np.ones((1, table.embedding_dim), np.float32))
    try:
        Checkpoints(snapshots).resume(place)
    except FormatError as error:
        if str(snapshots) not in str(error):
            raise
        raise FormatError(f"{place}: {error}") from error
    read_card(place)
