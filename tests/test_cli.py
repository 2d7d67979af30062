"""The command line: called in process for its output, and as a process for signals and pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import cli
from hashemb.ctr.data import open_reader
from hashemb.ctr.metrics import auc
from hashemb.ctr.training import load_model, read_card

CRITEO_COLUMNS = 13, 26
SMALL = ["--rows", "2^14", "--rank", "3"]


def criteo_lines(n: int, seed: int = 0, *, labelled: bool = True) -> list[str]:
    """Make lines in Criteo's format whose labels depend on the first categories."""
    rng = np.random.default_rng(seed)
    integers = rng.integers(0, 30, (n, CRITEO_COLUMNS[0]))
    categories = rng.integers(0, 20, (n, CRITEO_COLUMNS[1]))
    labels = rng.random(n) < 0.1 + 0.04 * categories[:, 0]
    rows = []
    for y, i, c in zip(labels, integers, categories, strict=True):
        fields = [*map(str, i), *(f"{value:08x}" for value in c)]
        rows.append("\t".join([str(int(y)), *fields] if labelled else fields))
    return rows


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "clicks.tsv", criteo_lines(3000))


@pytest.fixture(scope="module")
def trained(clicks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "T"
    assert cli.main(["train", str(clicks), "--table", str(directory), *SMALL]) == 0
    return directory


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hashemb", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_train_prints_the_progressive_table(clicks: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["train", str(clicks), "-t", str(tmp_path / "T"), *SMALL]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert "factorization machine of rank 3, 16,384 rows, adagrad, lr 0.04" in lines[0]
    assert lines[1].split() == ["examples", "since", "last", "logloss", "NE", "AUC", "examples/s"]
    rows = [line.split() for line in lines[2:5]]
    assert [row[0] for row in rows] == ["1,024", "2,048", "3,000"]
    assert all(len(row) == 6 for row in rows)
    assert 0.55 < float(rows[-1][4]) < 1.0, "AUC of labels that depend on a category"
    assert "3,000 examples" in lines[5]
    assert "Best constant's logloss: 0." in lines[5]
    assert lines[6] == f"Model: {tmp_path / 'T'}"


def test_progress_every_n(clicks: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["train", str(clicks), "-t", str(tmp_path / "T"), *SMALL, "--progress", "1K"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert rows == ["1,000", "2,000", "3,000"]


def test_all_options_reach_the_table(clicks: Path, tmp_path: Path) -> None:
    options = ["--rank", "0", "--rows", "5000", "--lr", "0.1", "--optimizer", "rowwise-adagrad"]
    options += ["--weight-decay", "1e-5", "--num-hashes", "2", "--dtype", "bfloat16", "--seed", "9"]
    options += ["--init-scale", "0.05", "--initial-accumulator", "0.5", "--batch-size", "100"]
    options += ["--format", "criteo", "--label", "label"]
    assert cli.main(["train", str(clicks), "-t", str(tmp_path / "T"), *options]) == 0
    info = hashemb.info(tmp_path / "T")
    assert (info.num_embeddings, info.embedding_dim, info.num_hashes, info.dtype) == (5000, 1, 2, "bfloat16")
    assert info.optimizer == hashemb.RowWiseAdagrad(lr=0.1, weight_decay=1e-5, initial_accumulator_value=0.5)
    assert (info.seed, info.init, info.step) == (9, hashemb.Uniform(0.05), 30)


def test_training_again_says_what_to_do(clicks: Path, trained: Path, capsys: Any) -> None:
    capsys.readouterr()
    step = hashemb.info(trained).step
    assert cli.main(["train", str(clicks), "-t", str(trained)]) == 0
    out = capsys.readouterr().out
    assert out == "Nothing to do: every file has been learned once. To learn them again: --passes 2\n"
    assert hashemb.info(trained).step == step


def test_second_pass(clicks: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["train", str(clicks), "-t", str(tmp_path / "T"), *SMALL, "--passes", "2"]) == 0
    out = capsys.readouterr().out
    assert "Pass 2: these examples have been learned before" in out
    assert out.count("examples  since last") == 2
    assert read_card(tmp_path / "T").sources[str(clicks)].passes == 2


def test_bad_lines_are_reported(tmp_path: Path, capsys: Any) -> None:
    lines = criteo_lines(60)
    for number in range(10, 35):
        lines[number] = "2" + lines[number][1:]
    path = write_lines(tmp_path / "bad.tsv", lines)
    assert cli.main(["train", str(path), "-t", str(tmp_path / "T"), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "25 bad lines left out:" in out
    assert f"  {path}:11: label must be 0 or 1, found '2'" in out
    assert out.count("label must be") == 20
    assert "… and 5 more" in out
    assert cli.main(["train", str(path), "-t", str(tmp_path / "S"), *SMALL, "--strict"]) == 1
    assert capsys.readouterr().err == f"hashemb: {path}:11: label must be 0 or 1, found '2'\n"


def test_predict_writes_one_probability_a_line(clicks: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    before = hashemb.info(trained).step
    assert cli.main(["predict", str(clicks), "-t", str(trained)]) == 0
    out = capsys.readouterr().out
    assert cli.main(["predict", str(clicks), "-t", str(trained), "-o", str(tmp_path / "p.txt")]) == 0
    assert (tmp_path / "p.txt").read_text() == out
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    printed = np.array(out.split(), np.float32)
    model, _ = load_model(trained)
    with model.table, open_reader(clicks, batch_size=10_000) as reader:
        batch = next(reader)
        np.testing.assert_array_equal(printed, model.predict_proba(batch.keys))
    assert auc(batch.labels, printed) > 0.6
    assert hashemb.info(trained).step == before


def test_predict_without_labels(trained: Path, tmp_path: Path, capsys: Any) -> None:
    with_labels = write_lines(tmp_path / "a.tsv", criteo_lines(100, seed=3))
    without = write_lines(tmp_path / "b.tsv", criteo_lines(100, seed=3, labelled=False))
    outputs = []
    capsys.readouterr()
    for path in (with_labels, without):
        assert cli.main(["predict", str(path), "-t", str(trained)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 100


def test_predict_keeps_lines_aligned(trained: Path, tmp_path: Path, capsys: Any) -> None:
    lines = criteo_lines(20)
    lines[4] = "junk"
    path = write_lines(tmp_path / "bad.tsv", lines)
    output = tmp_path / "p.txt"
    assert cli.main(["predict", str(path), "-t", str(trained), "-o", str(output)]) == 1
    assert f"hashemb: {path}:5: expected 40 columns, found 1" in capsys.readouterr().err
    assert not output.exists()
    assert cli.main(["predict", str(path), "-t", str(trained), "-o", str(output), "--skip-bad-lines"]) == 0
    assert "1 bad line has no probability in the output" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 19


def test_predict_never_replaces_a_device(clicks: Path, trained: Path) -> None:
    assert cli.main(["predict", str(clicks), "-t", str(trained), "-o", os.devnull]) == 0
    assert not Path(os.devnull).is_file()


def test_inspect_model(trained: Path, clicks: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert cli.main(["inspect", str(trained), "--exact"]) == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    with hashemb.open(trained) as table:
        touched = int((table.state["accumulator"] != 0).any(axis=1).sum())
    assert facts["geometry"] == "16,384 rows x 4"
    assert facts["rows touched"] == f"{touched:,} ({touched / 16384:.2%}, counted)"
    with open_reader(clicks, batch_size=10_000) as reader:
        distinct = len(np.unique(next(reader).keys)) + 1
    estimated = int(facts["distinct keys"].split()[0].replace(",", ""))
    assert estimated == pytest.approx(distinct, rel=0.1)
    assert facts["collision rate"].endswith("(expected)")
    assert facts["optimizer"].startswith("Adagrad(lr=0.04")
    assert facts["model"] == "factorization machine of rank 3"
    assert facts["step"] == str(11 * 8 + 6)  # 11 batches of 256 and one of 184, in 32s
    assert facts["fields"].startswith("39: I1, I2")
    assert facts["learned"] == f"{clicks}: 1 pass"
    assert facts["pass 1"].startswith("3,000 examples: logloss 0.")
    assert {"size, logical", "size, on disk"} <= facts.keys()


def test_inspect_plain_table(tmp_path: Path, capsys: Any) -> None:
    hashemb.create(tmp_path / "t", num_embeddings=2**33, embedding_dim=16).close()
    assert cli.main(["inspect", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "8,589,934,592 rows x 16" in out
    assert "rows touched     0 (0.00%)" in out
    assert "1.0 TiB" in out
    assert "model" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "-"], 1, "standard input has no name to call the model by: say where it goes with --table"),
        (["train", "--table", "{new}"], 2, "Missing argument"),
        (["train", "{data}", "-t", "{new}", "--rank", "-1"], 2, "'--rank'"),
        (["train", "{data}", "-t", "{new}", "--rank", "x"], 2, "'--rank'"),
        (["train", "{data}", "-t", "{new}", "--model", "tree"], 2, "'tree' is not one of lr, fm, fwfm, ffm"),
        (["train", "{data}", "-t", "{new}", "--model", "lr", "--rank", "4"], 1, "a model lr can't have rank 4"),
        (["train", "{data}", "-t", "{new}", "--rows", "0"], 2, "'0' is not a count >= 1 such as 4194304, 2^22"),
        (["train", "{data}", "-t", "{new}", "--rows", "many"], 2, "'many' is not a count"),
        (["train", "{data}", "-t", "{new}", "--batch-size", "0.5"], 2, "'0.5' is not a count"),
        (["train", "{data}", "-t", "{new}", "--passes", "0"], 2, "'--passes'"),
        (["train", "{data}", "-t", "{new}", "--optimizer", "adam"], 2, "'adam' is not one of adagrad, rowwise-"),
        (["train", "{data}", "-t", "{new}", "--dtype", "int8"], 2, "'int8' is not one of float32, float16, bfloat16"),
        (["train", "{data}", "-t", "{new}", "--progress", "often"], 2, "'often' is not a count"),
        (["train", "{data}", "-t", "{new}", "--format", "xml"], 2, "'xml' is not one of auto, criteo, csv, parquet"),
        (["train", "{data}", "-t", "{new}", "--frobnicate"], 2, "--frobnicate"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["train", "{data}", "-t", "{new}", "--lr", "-1"], 1, "lr must be between 0 and 1e30"),
        (["train", "{data}", "-t", "{new}", "--lr", "2", "--weight-decay", "1"], 1, "lr * weight_decay must be < 1"),
        (["train", "{data}", "-t", "{new}", "--num-hashes", "17"], 1, "num_hashes"),
        (["train", "{data}", "-t", "{new}", "--optimizer=ftrl", "--weight-decay", "1"], 1, "ftrl has no weight decay"),
        (["train", "{data}", "-t", "{new}", "--label", "click"], 1, "no column 'click' for the label"),
        (["train", "{data}", "-t", "{new}", "--format", "parquet"], 1, "clicks.tsv"),
        (["train", "{data}", "{data}", "-t", "{new}"], 1, "is given twice; to learn it again, raise passes"),
        (["train", "{nowhere}", "-t", "{new}"], 1, "nowhere: No such file or directory"),
        (["train", "{data}", "{nowhere}", "-t", "{new}"], 1, "nowhere: No such file or directory"),
        (["train", "{unlabelled}", "-t", "{new}"], 1, "no label column to learn from"),
        (["train", "{data}", "-t", "{new}/deep"], 1, "does not exist"),
        (["train", "{data}", "-t", "{empty}"], 1, "not a hashemb table"),
        (["train", "{data}", "-t", "{trained}", "--rank", "7"], 1, "was made with rank 3, not 7"),
        (["train", "{data}", "-t", "{trained}", "--model", "ffm"], 1, "was made with model fm, not ffm"),
        (["train", "{data}", "-t", "{trained}", "--rows", "77"], 1, "was made with rows 16384, not 77"),
        (["predict", "{data}", "-t", "{nowhere}"], 1, "nowhere: no model here (model.json not found)"),
        (["predict", "{data}", "-t", "{plain}"], 1, "no model here (model.json not found)"),
        (["predict", "{nowhere}", "-t", "{trained}"], 1, "nowhere: No such file or directory"),
        (["predict", "{csv}", "-t", "{trained}"], 1, "other.csv: no column 'I1' (39 of 39 fields are missing)"),
        (["predict", "{data}", "-t", "{trained}", "-o", "{nowhere}/p"], 1, "No such file or directory"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", "{nowhere}"], 1, "nowhere"),
        (["inspect", "{empty}"], 1, "not a hashemb table"),
        (["demo", "--impressions", "10"], 1, "needs at least 1,000 impressions, got 10"),
        (["demo", "--impressions", "ten"], 2, "'ten' is not a count"),
    ],
)
def test_what_goes_wrong_is_one_line(
    arguments: list[str], status: int, message: str, clicks: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {name: tmp_path / name for name in ("new", "nowhere", "empty", "plain")}
    places |= {"data": clicks, "trained": trained, "csv": tmp_path / "other.csv", "unlabelled": tmp_path / "u.tsv"}
    places["empty"].mkdir()
    places["csv"].write_text("click,a\n1,2\n")
    write_lines(places["unlabelled"], criteo_lines(5, labelled=False))
    hashemb.create(places["plain"], num_embeddings=10, embedding_dim=2).close()
    before = (trained / "weight.npy").read_bytes()
    capsys.readouterr()
    assert cli.main([argument.format(**places) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hashemb: ")
    assert message in err
    assert not places["new"].exists(), "nothing is left behind"
    assert (trained / "weight.npy").read_bytes() == before


def test_help_and_version(capsys: Any) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hashemb {hashemb.__version__}\n"
    for arguments in ([], ["--help"]):
        assert cli.main(arguments) == 0
        assert all(name in capsys.readouterr().out for name in ("train", "predict", "inspect", "demo")[:1])
    assert cli.main(["train", "--help"]) == 0
    assert "--initial-accumulator" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["typer", "rich", "pyarrow"])
def test_without_the_extra(package: str, clicks: Path, tmp_path: Path) -> None:
    """Run in a child process in which the package cannot be imported."""
    program = f"import sys; sys.modules[{package!r}] = None; from hashemb.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", str(clicks), "--table", str(tmp_path / "T")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert child.stderr == f"hashemb: this needs {package}: install it with pip install 'hashemb[ctr]'\n"
    assert not (tmp_path / "T").exists()


def test_output_in_a_pipe_is_plain(clicks: Path, tmp_path: Path) -> None:
    """There are no bars, no escape codes and no wrapping at 80 columns, whatever the environment sets for colours."""
    long_name = tmp_path / ("T" * 120)
    child = run("train", clicks, "--table", long_name, *SMALL, env={**os.environ, "TERM": "xterm-256color"})
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert "\x1b" not in child.stdout
    assert "\r" not in child.stdout
    assert f"Model: {long_name}" in child.stdout.splitlines()


def test_train_from_standard_input(clicks: Path, tmp_path: Path) -> None:
    with open(clicks) as file:
        child = run("train", "-", "--table", tmp_path / "T", *SMALL, stdin=file)
    assert child.returncode == 0, child.stderr
    assert "3,000 examples" in child.stdout
    assert read_card(tmp_path / "T").sources == {}


def test_predict_into_a_pipe_that_closes(trained: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "many.tsv", criteo_lines(20_000))
    command = f"{sys.executable} -m hashemb predict {path} --table {trained} | head -1; echo ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert child.stderr == ""
    assert child.stdout.splitlines()[1] == "0"
