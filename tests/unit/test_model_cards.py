"""`model.json`: every value is checked when the file is read, whichever program wrote it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hashemb
from hashemb.ctr.training import ModelCard, load_model, read_card
from hashemb.ctr.training.model_dir import write_card
from hashemb.errors import FormatError


def card(**changes: Any) -> str:
    """Return the text of a card with these changes."""
    return json.dumps({"format": 1, "rank": 3, "kind": "factorization_machine", "sources": {}} | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a model card"),
        ("[]", "the card must be an object, found '\\[\\]'"),
        ('{"format": 2}', "format 2 is newer than this version reads"),
        ("{}", "format must be an integer, found nothing"),
        (card(kind="tree"), "kind must be one of factorization_machine, .*, found 'tree'"),
        (card(kind=["x"]), "kind must be one of"),
        ('{"format": 1, "kind": "factorization_machine"}', "rank must be an integer, found nothing"),
        (card(rank="3"), "rank must be an integer, found '3'"),
        (card(rank=True), "rank must be an integer, found 'True'"),
        (card(rank=-1), "rank must be from 0 to 9,223,372,036,854,775,807, found -1"),
        (card(rank=10**400), "rank must be from 0 to .*, found one that is far outside"),
        (card(batch_size=0), "batch_size must be from 1 to"),
        (card(kind="field_aware_fm"), "num_fields must be an integer, found nothing"),
        (card(kind="field_weighted_fm", num_fields=10**9), "num_fields must be from 1 to 65,536"),
        (card(negative_rate=2), "the rate of negatives must be in"),
        (card(negative_rate="x"), "negative_rate must be a number"),
        (card(negative_correction=[]), "correction must be one of"),
        (card(schema=["a"]), "schema must be an object"),
        (card(schema={"a": "tree"}), "kind of field 'a' must be one of string, integer, count, float, found 'tree'"),
        (card(schema={"\ud800": "string"}), "a field must be whole characters"),
        (card(data_format="xml"), "data_format must be one of"),
        (card(label=5), "label must be a string, found '5'"),
        (card(label_values=["a"]), "label_values must be two different strings"),
        (card(label_values=["a", "a"]), "label_values must be two different strings"),
        (card(sources=[]), "sources must be an object"),
        (card(sources={"a": {}}), "source 'a': digest must be a string"),
        (card(sources={"a": {"digest": ""}}), "source 'a' must be a position in a file"),
        (card(sources={"a": {"digest": "", "size_bytes": -1}}), "source 'a': size_bytes must be from 0"),
        (card(sources={"a": {"digest": "", "size_bytes": 0, "x": 1}}), "source 'a' must be a position in a file"),
        (card(sources={"a": {"digest": "", "size_bytes": 0, "bad_lines": [5]}}), "a bad line must be a string"),
        (card(progress=[]), "progress must be an object"),
        (card(progress={"rows": []}), "pass must be an integer"),
        (card(progress={"pass": 1}), "metrics must be an object"),
        ('{"format": 1, "rank": ' + "[" * 100_000 + "]" * 100_000 + "}", "values nested too deep"),
        ('{"format": 1, "rank": ' + "9" * 5000 + "}", "not a model card"),
        ("\x00\xff", "not a model card"),
    ],
)
def test_bad_cards(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_card(tmp_path)


def test_a_card_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(FormatError, match=r"model\.json: not a model card: no regular file"):
        read_card(tmp_path)


def test_a_card_is_written_to_no_other_file(tmp_path: Path) -> None:
    """This holds whatever is at its temporary name: a link to another file, or the leftover of a killed writer."""
    (tmp_path / "other").write_text("kept")
    new = tmp_path / f".model.json.{os.getpid()}.tmp"
    for prepare in (lambda: new.symlink_to(tmp_path / "other"), lambda: new.write_text("half")):
        prepare()
        write_card(tmp_path, ModelCard(rank=4))
        assert read_card(tmp_path).rank == 4
        assert (tmp_path / "other").read_text() == "kept"
        assert not os.path.lexists(new)


def test_a_card_of_another_table(tmp_path: Path) -> None:
    """The card is valid but does not match the table: the error names the file, before anything is allocated for it."""
    hashemb.create(tmp_path / "T", num_embeddings=10, embedding_dim=4).close()
    for change, message in (
        ({"rank": 7}, "of rank 7 needs rows of 1 . rank = 8 elements"),
        ({"kind": "field_weighted_fm", "num_fields": 60_000}, "60,000 fields have 1,800,030,000 pairs"),
        ({"kind": "field_aware_fm", "num_fields": 2}, "needs rank >= 1 and rows of"),
    ):
        (tmp_path / "T" / "model.json").write_text(card(**change))
        with pytest.raises(FormatError, match=rf"T/model\.json: .*{message}"):
            load_model(tmp_path / "T")


@pytest.mark.parametrize(("kind", "count"), [("readers", 300), ("models", 150)])
def test_hostile_files(kind: str, count: int) -> None:
    """Run a few cases of hostile_files.py in a child process, which contains a crash or a hang."""
    run_hostile_files(kind, count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["readers", "models"])
def test_very_many_hostile_files(kind: str) -> None:
    run_hostile_files(kind, 10_000)


def run_hostile_files(kind: str, count: int) -> None:
    for needed in ("pyarrow", "typer", "sklearn"):
        pytest.importorskip(needed)
    program = Path(__file__).parents[1] / "hostile_files.py"
    command = [sys.executable, str(program), kind, "--count", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(Path(hashemb.__file__).parents[1])}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert child.returncode == 0, child.stdout + child.stderr
    print(child.stdout)
