"""The table of an estimator: private or shared, opened by others, pickled, in other processes and threads."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clicks import clicks
from processes import in_processes

pytest.importorskip("sklearn")
pytest.importorskip("pandas")
pytest.importorskip("polars")
pytest.importorskip("pyarrow")

from sklearn.exceptions import NotFittedError

import hashemb
from hashemb.ctr.data import open_reader
from hashemb.ctr.training import EveryN, ModelOptions, Trainer, load_model, open_or_create
from hashemb.errors import FormatError, HashembError, ReadOnlyTableError
from hashemb.sklearn import HashedFMClassifier, HashedFwFMClassifier, HashedLogisticRegression

Estimator = Any
KINDS = [HashedLogisticRegression, HashedFMClassifier, HashedFwFMClassifier]
SMALL = {"rows": 4096, "random_state": 0}

every_kind = pytest.mark.parametrize("kind", KINDS)


# ---- the location of the table ----


def test_a_private_table_goes_with_its_estimator() -> None:
    table, y = clicks(50)
    model = HashedLogisticRegression(**SMALL).fit(table, y)
    path = model.table_.path
    assert os.path.isdir(path)
    model.fit(table, y)
    assert not os.path.exists(os.path.dirname(path)), "the table of the first fit is left behind"
    path = model.table_.path
    del model
    gc.collect()
    assert not os.path.exists(os.path.dirname(path))


def score_in_a_fork(model: Estimator, table: Any) -> list[float]:
    return list(model.decision_function(table))


def test_a_forked_child_leaves_the_table_to_its_parent() -> None:
    table, y = clicks(50)
    model = HashedLogisticRegression(**SMALL).fit(table, y)
    expected = model.decision_function(table).tolist()
    (found,) = in_processes(score_in_a_fork, [(model, table)], method="fork")
    assert found == expected
    assert os.path.isdir(model.table_.path)
    assert model.decision_function(table).tolist() == expected


def test_fit_makes_the_table_at_its_path_and_nothing_beside_it(tmp_path: Path) -> None:
    table, y = clicks(200)
    model = HashedFMClassifier(table=tmp_path / "m.emb", **SMALL).fit(table, y)
    assert [path.name for path in tmp_path.iterdir()] == ["m.emb"]
    assert hashemb.info(tmp_path / "m.emb").step == model.table_.step == 20 * 7
    with pytest.raises(FileExistsError, match="from scratch"):
        model.fit(table, y)
    with pytest.raises(FileExistsError, match="warm_start=True"):
        HashedFMClassifier(table=tmp_path / "m.emb", **SMALL).fit(table, y)
    model.set_params(warm_start=True, max_iter=2).fit(table, y)
    assert hashemb.info(tmp_path / "m.emb").step == 22 * 7


def test_a_fit_that_fails_leaves_nothing(tmp_path: Path) -> None:
    table, y = clicks(200)
    model = HashedFMClassifier(table=tmp_path / "m.emb", optimizer="sgd", lr=1e30, **SMALL)
    with pytest.raises((FloatingPointError, ValueError)):
        model.fit(table, y)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFittedError):
        model.predict(table)


def test_warm_start_goes_on_and_without_it_fit_begins_anew() -> None:
    table, y = clicks(100)
    model = HashedLogisticRegression(max_iter=3, warm_start=True, shuffle=False, **SMALL)
    warm = model.fit(table, y).fit(table, y).decision_function(table)
    assert model.table_.step == 6 * 4
    straight = HashedLogisticRegression(max_iter=6, shuffle=False, **SMALL).fit(table, y)
    np.testing.assert_array_equal(warm, straight.decision_function(table))
    anew = model.set_params(warm_start=False, max_iter=6).fit(table, y)
    np.testing.assert_array_equal(anew.decision_function(table), straight.decision_function(table))


def test_the_rate_can_be_changed_on_the_way() -> None:
    table, y = clicks(100)
    model = HashedLogisticRegression(**SMALL).partial_fit(table, y)
    assert model.table_.lr == 0.05
    model.set_params(lr=0.01).partial_fit(table, y)
    assert model.table_.lr == 0.01


@every_kind
def test_from_table_attaches_read_only_and_learns_when_asked(kind: type[Estimator], tmp_path: Path) -> None:
    table, y = clicks(200)
    options = {"rows": 5000, "num_hashes": 2, "dtype": "bfloat16", "weight_decay": 0.01, "optimizer": "rowwise-adagrad"}
    writer = kind(table=tmp_path / "m.emb", random_state=0, **options).partial_fit(table, y)
    reader = kind.from_table(tmp_path / "m.emb", verbose=0, batch_size=64)
    assert {name: reader.get_params()[name] for name in options} == options
    assert reader.batch_size == 64
    assert reader.feature_names_in_.tolist() == list(table)
    assert reader.table_.mode == "r"
    np.testing.assert_array_equal(reader.decision_function(table), writer.decision_function(table))
    writer.partial_fit(table, y)
    np.testing.assert_array_equal(reader.decision_function(table), writer.decision_function(table))
    reader.partial_fit(table, y)
    assert reader.table_.mode == "r+"
    np.testing.assert_array_equal(reader.decision_function(table), writer.decision_function(table))


def test_a_table_is_not_taken_for_what_it_is_not(tmp_path: Path) -> None:
    table, y = clicks(100)
    path = tmp_path / "m.emb"
    HashedFMClassifier(table=path, **SMALL).fit(table, y)
    with pytest.raises(HashembError, match="holds a HashedFMClassifier, not a HashedFwFMClassifier"):
        HashedFwFMClassifier.from_table(path)
    with pytest.raises(ValueError, match="made with num_embeddings 4096, not 64"):
        HashedFMClassifier(table=path, rows=64).partial_fit(table, y)
    with pytest.raises(ValueError, match="made with optimizer"):
        HashedFMClassifier(table=path, rows=4096, weight_decay=0.5).partial_fit(table, y)
    with pytest.raises(ValueError, match="differ from those of the first call"):
        HashedFMClassifier(table=path, **SMALL).partial_fit(table, y, classes=[0, 2])
    with pytest.raises(FileNotFoundError):
        HashedFMClassifier.from_table(tmp_path / "nothing")
    hashemb.create(tmp_path / "plain.emb", num_embeddings=100, embedding_dim=9).close()
    with pytest.raises(FileNotFoundError, match="no estimator here"):
        HashedFMClassifier.from_table(tmp_path / "plain.emb")
    card = path / "estimator.json"
    for damage, message in [
        ({"format": 99}, "format 99 is newer"),
        ({"columns": {"a": "x"}}, "not a kind"),
        ({"columns": {"\ud800": "string"}, "num_columns": 1}, "whole characters"),
        ({"num_columns": "3"}, "num_columns must be an integer"),
        ({"estimator": 5}, "estimator must be a string"),
        ({"classes": [1]}, "classes must be two labels"),
        ({"classes": [1, 1]}, "must be sorted"),
        ({"classes": [1, 10**30], "classes_dtype": "<i8"}, "can't hold"),
        ({"classes_dtype": "<U999999999"}, "classes_dtype"),
    ]:
        content = card.read_text()
        card.write_text(json.dumps(json.loads(content) | damage))
        with pytest.raises(FormatError, match=message):
            HashedFMClassifier.from_table(path)
        card.write_text(content)


@pytest.mark.parametrize(
    ("model", "rank", "kind"), [("lr", 0, HashedLogisticRegression), ("fwfm", 3, HashedFwFMClassifier)]
)
def test_a_trained_model_of_the_command_line_is_an_estimator(
    model: str, rank: int, kind: type[Estimator], tmp_path: Path
) -> None:
    table, y = clicks(300)
    lines = [f"{int(label)},{user},{site},{price!r}" for label, user, site, price in
             zip(y, table["user"], table["site"], table["price"].tolist(), strict=True)]  # fmt: skip
    (tmp_path / "data.csv").write_text("\n".join(["click,user,site,price", *lines]) + "\n")
    train_file(tmp_path / "m.emb", tmp_path / "data.csv", model, rank)
    with open_reader(tmp_path / "data.csv", batch_size=300) as reader:
        keys = next(iter(reader)).keys
    trained, _ = load_model(tmp_path / "m.emb")
    estimator = kind.from_table(tmp_path / "m.emb")
    np.testing.assert_array_equal(estimator.decision_function(table), trained.predict_logits(keys))
    assert estimator.classes_.tolist() == [0, 1]
    assert estimator.partial_fit(table, y.astype(int)).score(table, y) > 0.6
    trained.table.close()


def train_file(directory: Path, data: Path, model: str, rank: int) -> None:
    fresh, card = open_or_create(directory, ModelOptions(model=model, rank=rank, rows=4096, num_fields=3))
    trainer = Trainer(directory, fresh, card, [data], schedule=EveryN(100))
    with closing(trainer.model.table), closing(trainer.run()) as run:
        for _ in run:
            pass
        trainer.save()


def test_files_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to any file")
    table, y = clicks(100)
    path = tmp_path / "m.emb"
    HashedLogisticRegression(table=path, **SMALL).fit(table, y)
    for file in [*path.iterdir(), path]:
        file.chmod(file.stat().st_mode & ~0o222)
    reader = HashedLogisticRegression.from_table(path)
    assert np.isfinite(reader.decision_function(table)).all()
    with pytest.raises(ReadOnlyTableError):
        reader.partial_fit(table, y)


# ---- pickles, copies, threads, other processes ----


def logits_of(pickles: list[bytes], table: Any) -> list[tuple[list[float], str]]:
    models = [pickle.loads(pickled) for pickled in pickles]
    return [(model.decision_function(table).tolist(), model.table_.mode) for model in models]


@pytest.mark.parametrize("at_path", [False, True])
def test_pickles_predict_in_another_process(at_path: bool, tmp_path: Path) -> None:
    table, y = clicks(200)
    paths = [tmp_path / f"{kind.__name__}.emb" if at_path else None for kind in KINDS]
    models = [kind(table=path, **SMALL).fit(table, y) for kind, path in zip(KINDS, paths, strict=True)]
    pickles = [pickle.dumps(model) for model in models]
    assert all((len(pickled) < 2000) == at_path for pickled in pickles)
    (found,) = in_processes(logits_of, [(pickles, table)])
    assert found == [(model.decision_function(table).tolist(), "r" if at_path else "r+") for model in models]


def test_a_relative_path_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, y = clicks(50)
    monkeypatch.chdir(tmp_path)
    model = HashedLogisticRegression(table="m.emb", **SMALL).partial_fit(table, y)
    pickled = pickle.dumps(model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(pickle.loads(pickled).decision_function(table), model.decision_function(table))


def test_copies_of_private_tables_learn_apart() -> None:
    table, y = clicks(200)
    model = HashedLogisticRegression(**SMALL).partial_fit(table, y)
    copied = copy.deepcopy(model)
    straight = copy.deepcopy(model).partial_fit(table, y).decision_function(table)
    before = model.decision_function(table)
    copied.partial_fit(table, y)
    np.testing.assert_array_equal(model.decision_function(table), before)
    np.testing.assert_array_equal(copied.decision_function(table), straight)
    np.testing.assert_array_equal(model.partial_fit(table, y).decision_function(table), straight)


def attach_and_score(path: Path, table: Any) -> list[float]:
    return list(HashedFMClassifier.from_table(path).decision_function(table))


def test_two_processes_score_one_table(tmp_path: Path) -> None:
    table, y = clicks(200)
    model = HashedFMClassifier(table=tmp_path / "m.emb", **SMALL).fit(table, y)
    expected = model.decision_function(table).tolist()
    assert in_processes(attach_and_score, [(tmp_path / "m.emb", table)] * 2) == [expected] * 2


def test_threads_predict_beside_one_that_learns() -> None:
    table, y = clicks(500)
    model = HashedFMClassifier(**SMALL).partial_fit(table, y)
    still = copy.deepcopy(model)
    expected = still.decision_function(table)
    wrong: list[str] = []

    def predict() -> None:
        for _ in range(20):
            if not np.array_equal(still.decision_function(table), expected):
                wrong.append("an estimator that nobody trains changed its mind")
            if not np.isfinite(model.decision_function(table)).all():
                wrong.append("a prediction beside learning is not finite")

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        model.partial_fit(table, y)
    for thread in threads:
        thread.join()
    assert wrong == []
