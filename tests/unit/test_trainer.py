"""The model directory and the trainer: positions, bit-exact resuming, files that grow or change."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr.models import FactorizationMachine, FieldAwareFM, FieldWeightedFM, HashedModel
from hashemb.ctr.training import (
    EveryN,
    ModelCard,
    ModelOptions,
    SourcePosition,
    Trainer,
    TrainStep,
    load_model,
    open_or_create,
    parse_count,
    read_card,
    training_lock,
)
from hashemb.ctr.training.model_dir import write_card
from hashemb.errors import HashembError

SMALL = ModelOptions(rank=3, rows=2000, weight_decay=1e-3)
BATCH = 50


def write_clicks(path: Path, start: int, stop: int, *, bad: Sequence[int] = ()) -> Path:
    """Write a CSV of clicks whose rows are a function of their number; those in `bad` have no valid label."""
    lines = ["click,user,site"]
    for i in range(start, stop):
        user, site = (i * 7919) % 101, f"s{(i * 104729) % 13}"
        label = "?" if i in bad else str(int((user + len(site) + i) % 3 == 0))
        lines.append(f"{label},{user},{site}")
    path.write_text("\n".join(lines) + "\n")
    return path


def trainer_for(directory: Path, paths: Sequence[Path], **options: Any) -> Trainer:
    model, card = open_or_create(directory, SMALL)
    card.batch_size = BATCH
    return Trainer(directory, model, card, paths, schedule=EveryN(100), **options)


def train(directory: Path, paths: Sequence[Path], *, stop_after: int | None = None, **options: Any) -> list[TrainStep]:
    """Run to the end, or stop cleanly after that many steps; return the steps taken."""
    trainer = trainer_for(directory, paths, **options)
    steps = []
    with closing(trainer.model.table), closing(trainer.run()) as run:
        for step in run:
            steps.append(step)
            if len(steps) == stop_after:
                break
        run.close()
        trainer.save()
    return steps


def contents(directory: Path) -> dict[str, Any]:
    """Return what must be equal for two models to be the same: table bytes, step, card without paths."""
    with hashemb.open(directory) as table:
        arrays = {"weight": table.weight.tobytes(), "step": table.step}
        arrays |= {name: array.tobytes() for name, array in table.state.items()}
    card = json.loads((directory / "model.json").read_text())
    return arrays | {"card": card}


def without_rates(steps: Sequence[TrainStep]) -> list[tuple[Any, ...]]:
    return [(row.examples, row.logloss_since_last, row.logloss, row.auc) for step in steps for row in step.rows]


@pytest.mark.parametrize("stop_after", [1, 3, 10, 11, 14])
@pytest.mark.parametrize("passes", [1, 2])
def test_resuming_equals_never_having_stopped(tmp_path: Path, stop_after: int, passes: int) -> None:
    """Weights, accumulators, decay, step, metrics and progressive table have equal bits. File a has 10.3 batches."""
    files = [write_clicks(tmp_path / "a.csv", 0, 515, bad=(3, 170)), write_clicks(tmp_path / "b.csv", 600, 801)]
    unbroken = train(tmp_path / "unbroken", files, passes=passes)
    steps = train(tmp_path / "broken", files, passes=passes, stop_after=stop_after)
    steps += train(tmp_path / "broken", files, passes=passes, stop_after=2)
    steps += train(tmp_path / "broken", files, passes=passes)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    assert without_rates(steps) == without_rates(unbroken)


def test_finished_files_are_not_learned_again(tmp_path: Path) -> None:
    files = [write_clicks(tmp_path / "a.csv", 0, 300)]
    train(tmp_path / "m", files)
    before = contents(tmp_path / "m")
    trainer = trainer_for(tmp_path / "m", files)
    assert trainer.finished
    trainer.model.table.close()
    assert train(tmp_path / "m", files) == []
    assert contents(tmp_path / "m") == before


def test_more_passes_and_new_files_go_on(tmp_path: Path) -> None:
    a, b = write_clicks(tmp_path / "a.csv", 0, 300), write_clicks(tmp_path / "b.csv", 300, 500)
    train(tmp_path / "m", [a])
    second = train(tmp_path / "m", [a, b])
    assert {Path(step.path).name for step in second} == {"b.csv"}
    assert second[-1].rows[-1].examples == 500, "the metrics of pass 1 go on"
    third = train(tmp_path / "m", [a, b], passes=2)
    assert [step.pass_number for step in third] == [2] * len(third)
    assert third[-1].rows[-1].examples == 500, "pass 2 has its own"
    sources = read_card(tmp_path / "m").sources
    assert [(s.passes, s.rows, s.rows_per_pass) for s in sources.values()] == [(2, 0, 300), (2, 0, 200)]


def test_a_file_that_grows_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "log.csv", 0, 300)
    train(tmp_path / "m", [path])
    write_clicks(path, 0, 420)
    steps = train(tmp_path / "m", [path])
    assert steps[-1].examples == 120
    assert read_card(tmp_path / "m").sources[str(path)].rows_per_pass == 420


def test_a_file_that_grows_while_half_learned_goes_on(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "log.csv", 0, 300)
    train(tmp_path / "m", [path], stop_after=2)
    write_clicks(path, 0, 420)
    assert train(tmp_path / "m", [path])[-1].examples == 420 - 2 * BATCH


def test_a_finished_file_with_new_contents_is_a_new_file(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "today.csv", 0, 300)
    train(tmp_path / "m", [path])
    write_clicks(path, 1000, 1300)
    assert train(tmp_path / "m", [path])[-1].examples == 300


def test_a_half_learned_file_with_new_contents_is_an_error(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "today.csv", 0, 300)
    train(tmp_path / "m", [path], stop_after=2)
    before = contents(tmp_path / "m")
    write_clicks(path, 1000, 1300)
    with pytest.raises(ValueError, match=r"today.csv is another file than the one whose first 100 rows have been"):
        train(tmp_path / "m", [path])
    assert contents(tmp_path / "m") == before


def test_bad_lines_are_reported_and_strict_stops_at_the_first(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "a.csv", 0, 300, bad=(10, 120))
    trainer = trainer_for(tmp_path / "lenient", [path])
    with closing(trainer.model.table):
        assert list(trainer.run())[-1].examples == 298
    assert trainer.bad_lines.count == 2
    assert [line.line for line in trainer.bad_lines.first] == [12, 122]
    with pytest.raises(ValueError, match=r"a.csv:12: label must be 0 or 1, found '\?'"):
        train(tmp_path / "strict", [path], strict=True)


def test_saving_while_running(tmp_path: Path) -> None:
    """Training can resume from every save: a copy of the directory at that moment ends the same."""
    path = write_clicks(tmp_path / "a.csv", 0, 500)
    now = [0.0]
    trainer = trainer_for(tmp_path / "m", [path], save_seconds=10.0, clock=lambda: now[0])
    saves = []
    with closing(trainer.model.table):
        for _ in trainer.run():
            now[0] += 4.0
            saves.append(read_card(tmp_path / "m").table_step)
    assert saves == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_fields_must_match_those_of_the_first_file(tmp_path: Path) -> None:
    train(tmp_path / "m", [write_clicks(tmp_path / "a.csv", 0, 100)])
    other = tmp_path / "other.csv"
    other.write_text("click,user,page\n1,7,x\n")
    with pytest.raises(ValueError, match="site"):
        train(tmp_path / "m", [other])
    more = tmp_path / "more.csv"
    more.write_text("page,site,click,user\nx,s1,1,7\n")
    assert train(tmp_path / "m", [more])[-1].examples == 1


def test_unlabelled_files_cannot_be_learned(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,site\n7,a\n8,b\n")
    with pytest.raises(ValueError, match="no label column to learn from; it has the fields user, site"):
        train(tmp_path / "m", [path])


def test_the_label_column_is_remembered(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("bought,user\n1,7\n0,8\n")
    assert train(tmp_path / "m", [tmp_path / "a.csv"])[-1].examples == 2
    assert read_card(tmp_path / "m").label == "bought"
    assert train(tmp_path / "m", [tmp_path / "b.csv"])[-1].examples == 2


def test_a_file_given_twice_is_an_error(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "a.csv", 0, 10)
    with pytest.raises(ValueError, match="given twice"):
        train(tmp_path / "m", [path, path.parent / "." / "a.csv"])


def test_pipes_are_read_once_and_have_no_position(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, write_clicks(tmp_path / "a.csv", 0, 200).read_bytes())
    os.close(write_end)
    pipe = Path(f"/dev/fd/{read_end}")
    try:
        assert train(tmp_path / "m", [pipe])[-1].examples == 200
        with pytest.raises(ValueError, match="can be read once, not 2 times"):
            train(tmp_path / "m", [pipe], passes=2)
    finally:
        os.close(read_end)
    assert read_card(tmp_path / "m").sources == {}


def test_two_trainers_on_one_model(tmp_path: Path) -> None:
    train(tmp_path / "m", [write_clicks(tmp_path / "a.csv", 0, 10)])
    message = rf"another trainer \(process {os.getpid()}\)"
    with training_lock(tmp_path / "m"), pytest.raises(HashembError, match=message), training_lock(tmp_path / "m"):
        pass
    with training_lock(tmp_path / "m"):
        pass


def test_load_model(tmp_path: Path) -> None:
    train(tmp_path / "m", [write_clicks(tmp_path / "a.csv", 0, 300)])
    model, card = load_model(tmp_path / "m")
    with closing(model.table):
        assert (model.rank, card.rank, list(card.schema)) == (3, 3, ["user", "site"])
        keys = hashemb.hash_fields({"user": np.array([7]), "site": ["s1"]})
        assert 0.0 < model.predict_proba(keys)[0] < 1.0


@pytest.mark.parametrize(
    ("name", "kind", "dim"),
    [("lr", FactorizationMachine, 1), ("fm", FactorizationMachine, 16), ("fwfm", FieldWeightedFM, 16),
     ("ffm", FieldAwareFM, 1 + 2 * 4)],
)  # fmt: skip
def test_models_by_name(tmp_path: Path, name: str, kind: type[HashedModel], dim: int) -> None:
    options = ModelOptions(model=name, num_fields=2, rows=500)
    model, _ = open_or_create(tmp_path / "m", options)
    model.table.close()
    for again in (options, ModelOptions(), ModelOptions(model=name)):
        model, _ = open_or_create(tmp_path / "m", replace(again, num_fields=None))
        with closing(model.table):
            assert (type(model), model.table.embedding_dim) == (kind, dim)
    for other in {"lr", "fm", "fwfm", "ffm"} - {name}:
        with pytest.raises(ValueError, match=rf"was made with (model|rank) .*, not ({other}|[01])"):
            open_or_create(tmp_path / "m", ModelOptions(model=other, rank=1 if name == "lr" else None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "lr", "rank": 3}, "a model lr can't have rank 3"),
        ({"model": "ffm", "rank": 0, "num_fields": 2}, "a model ffm can't have rank 0"),
        ({"model": "tree"}, "unknown model 'tree': one of lr, fm, fwfm, ffm"),
        ({"model": "fwfm"}, "number of fields of a new fwfm is not known.*give num_fields"),
    ],
)
def test_models_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_or_create(tmp_path / "m", ModelOptions(**options))
    assert not (tmp_path / "m").exists()


def test_a_card_of_before_there_were_other_models(tmp_path: Path) -> None:
    open_or_create(tmp_path / "m", SMALL)[0].table.close()
    values = json.loads((tmp_path / "m" / "model.json").read_text())
    del values["num_fields"]
    (tmp_path / "m" / "model.json").write_text(json.dumps(values))
    model, card = load_model(tmp_path / "m")
    with closing(model.table):
        assert isinstance(model, FactorizationMachine)
        assert (model.rank, card.num_fields) == (3, None)


def test_an_untrained_table_can_become_a_field_aware_model(tmp_path: Path) -> None:
    hashemb.create(tmp_path / "m", num_embeddings=77, embedding_dim=1 + 3 * 5).close()
    with pytest.raises(ValueError, match="of 2 fields and rank 7 needs"):
        open_or_create(tmp_path / "m", ModelOptions(model="ffm", num_fields=2))
    model, card = open_or_create(tmp_path / "m", ModelOptions(model="ffm", num_fields=3))
    with closing(model.table):
        assert isinstance(model, FieldAwareFM)
        assert (model.rank, card.num_fields) == (5, 3)


def test_card_round_trip_and_no_card(tmp_path: Path) -> None:
    card = ModelCard(
        rank=3, schema={"a": "string"}, label="click", sources={"/x": SourcePosition(10, "ab", 1, 2, 3)}
    )
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    with pytest.raises(FileNotFoundError, match=r"no model here \(model.json not found\)"):
        read_card(tmp_path / "elsewhere")


def test_an_untrained_table_can_become_a_model(tmp_path: Path) -> None:
    hashemb.create(tmp_path / "m", num_embeddings=77, embedding_dim=4, init=hashemb.Normal(0.1)).close()
    model, card = open_or_create(tmp_path / "m", ModelOptions())
    with closing(model.table):
        assert (card.rank, model.table.num_embeddings) == (3, 77)


def test_a_table_trained_as_something_else_cannot(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "m", num_embeddings=77, embedding_dim=4) as table:
        table.update([1], np.ones((1, 4), np.float32))
    with pytest.raises(HashembError, match=r"1 updates but no model\.json"):
        open_or_create(tmp_path / "m", ModelOptions())


@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"rows": 2001}, {"num_hashes": 2}, {"dtype": "float16"}, {"seed": 1}, {"init_scale": 0.5},
     {"optimizer": "sgd"}, {"weight_decay": 0.5}, {"initial_accumulator": 0.0}],
)  # fmt: skip
def test_options_that_contradict_the_model(tmp_path: Path, options: dict[str, Any]) -> None:
    open_or_create(tmp_path / "m", SMALL)[0].table.close()
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"was made with {name} .*, not {value}"):
        open_or_create(tmp_path / "m", ModelOptions(**options))


def test_options_that_agree_and_a_new_learning_rate(tmp_path: Path) -> None:
    open_or_create(tmp_path / "m", SMALL)[0].table.close()
    model, _ = open_or_create(tmp_path / "m", ModelOptions(rank=3, rows=2000, optimizer="adagrad", lr=0.5))
    with closing(model.table):
        assert model.table.lr == 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, hashemb.Adagrad(lr=0.04, initial_accumulator_value=5.0)),
        ({}, hashemb.Adagrad(lr=0.06, initial_accumulator_value=2.0)),
        ({"optimizer": "rowwise-adagrad", "lr": 0.1}, hashemb.RowWiseAdagrad(lr=0.1, initial_accumulator_value=1.0)),
        ({"initial_accumulator": 0.0, "weight_decay": 0.1}, hashemb.Adagrad(lr=0.06, weight_decay=0.1)),
        ({"optimizer": "sgd", "weight_decay": 0.1}, hashemb.SGD(lr=0.001, weight_decay=0.1)),
        ({"optimizer": "ftrl"}, hashemb.FTRL(alpha=0.03)),
        ({"optimizer": "ftrl", "lr": 0.3}, hashemb.FTRL(alpha=0.3)),
    ],
)
def test_optimizers_by_name(tmp_path: Path, options: dict[str, Any], expected: Any) -> None:
    model, _ = open_or_create(tmp_path / "m", ModelOptions(**{"rank": 0, "rows": 10, **options}))
    with closing(model.table):
        assert model.table.optimizer == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam': one of adagrad, "),
        ({"optimizer": "sgd", "initial_accumulator": 1.0}, "sgd has no accumulator to start at 1.0"),
        ({"optimizer": "ftrl", "weight_decay": 0.1}, "ftrl has no weight decay"),
    ],
)
def test_optimizers_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_or_create(tmp_path / "m", ModelOptions(rows=10, **options))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "2^", "1.5", "4Q", "1e", "2^22^2", "0.5K1"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


def test_counts() -> None:
    assert [parse_count(s) for s in ("1", "2^22", "2**33", "4Mi", "1.5k", "1_000", "3G")] == [
        1, 2**22, 2**33, 2**22, 1500, 1000, 3 * 10**9
    ]  # fmt: skip


def test_a_log_is_learned_in_growing_batches_at_first(tmp_path: Path) -> None:
    """The model equals one that is given those batches, and a stopped run resumes with the same batch boundaries."""
    path = write_clicks(tmp_path / "a.csv", 0, 700)
    bits = []
    for name, stop_after in (("whole", None), ("stopped", 3)):
        model, card = open_or_create(tmp_path / name, SMALL)
        card.batch_size, card.warm_up = 100, 600
        for stop in (stop_after, None):
            trainer = Trainer(tmp_path / name, model, card, [path])
            for number, _ in enumerate(trainer.run(), 1):
                if number == stop:
                    break
            trainer.save()
            card = read_card(tmp_path / name)
        assert model.table.step == 4 * 4 + 2 * 2 + 1  # 100 are 32 + 32 + 32 + 4, then 64 + 36, then whole
        bits.append(np.array(model.table.weight))
        model.table.close()
    assert np.array_equal(*bits)
