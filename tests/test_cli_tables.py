"""`hashemb train` on arbitrary tables, and on libsvm, libffm and Vowpal Wabbit text."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashemb import cli
from hashemb.ctr.metrics import auc
from hashemb.ctr.training import load_model, open_for_scoring, read_card, score

ROWS = ["--rows", "2^16"]


def people(n: int, seed: int) -> tuple[dict[str, list[Any]], np.ndarray[Any, Any]]:
    """Make a table of people and labels: text with commas, quotes and line breaks, integers, floats, missing values."""
    rng = np.random.default_rng(seed)
    age, hours = rng.integers(17, 90, n), rng.integers(1, 99, n)
    gain = np.where(rng.random(n) < 0.1, np.exp(rng.normal(8.5, 1, n)), 0).astype(int)
    job, rate = rng.integers(0, 8, n), rng.gamma(2, 10, n).round(2)
    jobs = ["clerk", "farmer, self-employed", 'a "boss"', "sales\nand\nrepair", "nurse", "?", "pilot", ""]
    logit = -2.2 + 0.08 * (hours - 40) - 0.002 * (age - 50) ** 2 + 1.5 * (gain > 4000) + 0.5 * (job - 4) + 0.03 * rate
    columns = {"age": age, "job": [jobs[j] for j in job], "gain": gain, "hours": hours, "rate": rate}
    table = {name: list(values) for name, values in columns.items()}
    for name, missing in (("age", "NA"), ("rate", "nan"), ("hours", "")):
        for i in np.flatnonzero(rng.random(n) < 0.04):
            table[name][i] = missing
    return table, rng.random(n) < 1 / (1 + np.exp(-logit))


def write_table(path: Path, n: int, seed: int, classes: tuple[str, str] = ("<=50K", ">50K")) -> np.ndarray[Any, Any]:
    table, truth = people(n, seed)
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_MINIMAL)
    writer.writerow([*table, "income"])
    writer.writerows([*row, classes[int(y)]] for row, y in zip(zip(*table.values(), strict=True), truth, strict=True))
    path.write_text(out.getvalue(), newline="")
    return truth


def held_out_auc(directory: Path, path: Path, truth: np.ndarray[Any, Any]) -> float:
    model, card = load_model(directory)
    with model.table, open_for_scoring(card, [path]) as reader:
        return auc(truth, np.concatenate([batch.probabilities for batch in score(model, reader)]))


@pytest.mark.parametrize("rows", [800, 3000])
def test_one_command_and_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, rows: int
) -> None:
    """The model is saved next to the data, what was inferred is printed, and the AUC is close to scikit-learn's."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "people.csv", rows, seed=1)
    truth = write_table(tmp_path / "held-out.csv", 2000, seed=2)
    assert cli.main(["train", "people.csv", "--label", "income", *ROWS]) == 0
    out = capsys.readouterr().out
    assert "Label 'income': '>50K' is 1, '<=50K' is 0 (--positive chooses the other)." in out
    assert "Fields: 2 integer, 1 string, 1 count, 1 float (--numeric, --categorical)." in out
    assert f"{rows:,} examples, a small table: 10 passes in batches of 32 (--model, --passes, --batch-size)." in out
    assert "bad line" not in out
    card = read_card(tmp_path / "people.model")
    assert card.schema == {"age": "integer", "job": "string", "gain": "count", "hours": "integer", "rate": "float"}
    assert (card.label, list(card.label_values or ()), card.batch_size, card.passes) == (
        "income", ["<=50K", ">50K"], 32, 10,
    )  # fmt: skip
    ours = held_out_auc(tmp_path / "people.model", tmp_path / "held-out.csv", truth)
    assert ours >= one_hot_auc(rows, truth) - 0.01


def one_hot_auc(rows: int, truth: np.ndarray[Any, Any]) -> float:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (train, labels), (test, _) = people(rows, seed=1), people(2000, seed=2)
    as_text = [np.array([[str(v) for v in values] for values in table.values()]).T for table in (train, test)]
    encoder = preprocessing.OneHotEncoder(handle_unknown="ignore").fit(as_text[0])
    model = linear_model.LogisticRegression(max_iter=1000).fit(encoder.transform(as_text[0]), labels)
    return auc(truth, model.predict_proba(encoder.transform(as_text[1]))[:, 1])


def test_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Nothing is learned twice; more data of the same kind is learned with the options the model was created with."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "people.csv", 300, seed=1, classes=("no", "yes"))
    command = ["train", "people.csv", "--label", "income", *ROWS]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "Nothing to do: every file has been learned 10 times" in capsys.readouterr().out
    write_table(tmp_path / "more.csv", 200, seed=3, classes=("no", "yes"))
    assert cli.main(["train", "more.csv", "--table", "people.model"]) == 0
    assert [source.passes for source in read_card(tmp_path / "people.model").sources.values()] == [10, 10]
    assert cli.main(["train", "more.csv", "--table", "people.model", "--positive", "no", "--passes", "11"]) == 1
    assert "positive 'no': the model was made with 'yes'; leave the option out" in capsys.readouterr().err
    assert cli.main(["train", "more.csv", "--table", "people.model", "--numeric", "age", "--passes", "11"]) == 1
    assert "numeric 'age': the model reads it as integer; leave the option out" in capsys.readouterr().err


def test_what_is_said_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "people.csv", 300, seed=1)
    options = ["--positive", "<=50K", "--numeric", "age,hours", "--categorical", "gain", "--categorical", "rate"]
    options += ["--passes", "2", "--batch-size", "100", "--table", "named", *ROWS]
    assert cli.main(["train", "people.csv", "--label", "income", *options]) == 0
    card = read_card(tmp_path / "named")
    assert card.label_values == [">50K", "<=50K"]
    assert card.schema == {"age": "count", "job": "string", "gain": "integer", "hours": "count", "rate": "string"}
    assert card.batch_size == 100
    assert [source.passes for source in card.sources.values()] == [2]
    assert "Pass 3" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a,y\n1,u\n2,v\n3,w\n" * 3, ["--label", "y"], "the label column 'y' has more than two values: 'u', 'v', 'w'"),
        ("a,y\n1,u\n2,v\n", ["--label", "z"], "no column 'z' for the label; it has a, y"),
        ("a,y\n1,u\n2,v\n", [], "no label column to learn from; it has the fields a, y"),
        ("a,y\n1,0\n", ["--label", "y", "--numeric", "b"], "no column 'b', which numeric= names"),
    ],
)
def test_errors_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(text)
    assert cli.main(["train", "a.csv", *arguments, *ROWS]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


SPARSE = {
    "libsvm": lambda y, a, b: f"{y} {a}:1 {100 + b}:0.5",
    "libffm": lambda y, a, b: f"{y} 0:{a}:1 1:{100 + b}:0.5",
    "vw": lambda y, a, b: f"{y} 1.0 'x|ad {a} |user u{b}:0.5",
}


@pytest.mark.parametrize("format", list(SPARSE))
def test_sparse_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, format: str) -> None:
    """Files give probabilities, bad lines are reported, and field-aware models accept formats with fields."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 1500), rng.integers(0, 5, 1500)
    labels = np.where(rng.random(1500) < 0.1 + 0.2 * a, 1, -1)
    lines = [SPARSE[format](y, i, j) for y, i, j in zip(labels, a, b, strict=True)]
    (tmp_path / "data").write_text("\n".join([*lines[:700], "1 x", *lines[700:]]) + "\n")
    models = ["fm"] if format == "libsvm" else ["fm", "ffm"]
    for name in models:
        command = ["train", "data", "--table", name, "--model", name, "--passes", "3", "--batch-size", "32", *ROWS]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert "1 bad line left out:" in out
        assert "data:701: " in out
        assert cli.main(["predict", "data", "--table", name, "--skip-bad-lines"]) == 0
        printed = capsys.readouterr()
        assert auc(labels > 0, np.array(printed.out.split(), np.float32)) > 0.75
        assert "1 bad line has no probability" in printed.err
