"""Contents and names of files reach the terminal or an HTML page only as plain text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from hashemb import cli
from hashemb._text import printable
from hashemb.cli import dispatch

pytest.importorskip("pyarrow")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

TITLE, CLEAR, TURNED, SPACELESS = "\x1b]0;pwned\x07\x1b[31m", "\x9b2J", "\u202e", "\u2028"
NAMES = [f"a{TITLE}", f"b{CLEAR}", f"c{TURNED}", f"d{SPACELESS}", "<b>$x$", "ünï :smile: [red]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with such a name, with clicks whose columns have such names."""
    directory = tmp_path_factory.mktemp("escapes") / f"dir{TITLE}{CLEAR}{TURNED} é"
    directory.mkdir()
    header = ",".join(["label", *NAMES])
    lines = [",".join([str(i % 2), *(f"v{i % (5 + j)}" for j in range(len(NAMES)))]) for i in range(300)]
    (directory / "x.csv").write_text("\n".join([header, *lines, f"{TITLE},1,2,3,4,5,6"]) + "\n", encoding="utf-8")
    return directory


def seen(capsys: Any) -> str:
    """Return what was printed since the last call, after checking that all of it is printable."""
    out, err = capsys.readouterr()
    raw = {character for character in out + err if not (character.isprintable() or character == "\n")}
    assert not raw, f"{raw} in {out + err!r}"
    return str(out + err)


def test_every_command(place: Path, capsys: Any) -> None:
    data, table = str(place / "x.csv"), str(place / "T")

    def run(*arguments: Any, status: int = 0) -> str:
        assert cli.main([str(argument) for argument in arguments]) == status
        return seen(capsys)

    text = run("train", data, "-t", table, "--rows", "1000", "--passes", 1)
    assert r"found '\x1b]0;pwned\x07\x1b[31m'" in text, "of a bad line"
    assert r"dir\x1b]0;pwned\x07\x1b[31m\x9b2J\u202e é" in text
    text = run("inspect", table)
    for shown in (r"a\x1b]0;pwned\x07\x1b[31m", r"b\x9b2J", r"c\u202e", r"d\u2028", "<b>$x$", "ünï :smile: [red]"):
        assert shown in text
    run("snapshot", table, place / "S")
    run("delta", table, "-o", place / "d.delta")
    run("follow", place, place / "R", "--once")
    (place / f"bad{CLEAR}.delta").write_bytes(b"none")
    assert r"bad\x9b2J.delta" in run("follow", place, place / "R", "--once")
    assert "nothing is wrong" in run("verify", table)
    assert "nothing to repair" in run("repair", table, "--from", place / "S")
    (Path(table) / "blocks.npy").write_bytes(b"")
    assert r"blocks.npy: expected" in run("verify", table, status=1)
    assert "is restored" in run("repair", table, "--from", place / "S", "--yes")
    run("predict", data, "-t", table, "-o", place / "p.txt", status=1)
    run("predict", data, "-t", table, "-o", place / "p.txt", "--skip-bad-lines")


def test_errors_and_warnings(place: Path, capsys: Any) -> None:
    for arguments in (
        ["train", str(place / "none"), "-t", str(place / "E")],
        ["train", str(place / "x.csv"), "-t", str(place / "E"), "--label", TITLE],
        ["train", str(place / "x.csv"), "-t", str(place / "E"), "--model", TITLE],
        ["inspect", str(place)],
        ["verify", str(place / "none")],
        [TITLE],
    ):
        assert cli.main(arguments) in (1, 2)
        assert seen(capsys).startswith("hashemb: ")
    with warnings.catch_warnings():
        warnings.showwarning = dispatch._show_warning
        warnings.simplefilter("always")
        warnings.warn(f"beware of {TITLE}", RuntimeWarning, stacklevel=1)
    assert r"beware of \x1b]0;" in seen(capsys)


def test_names_that_are_no_text(tmp_path: Path, capsys: Any) -> None:
    """Bytes of a path that are not UTF-8 become lone surrogates, which no output can encode."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")
    Path(path).write_text("label,a\n" + "1,x\n0,y\n" * 20)
    table = os.fsdecode(os.fsencode(tmp_path) + b"/\xfe")
    assert cli.main(["train", path, "-t", table, "--rows", "100"]) == 0
    assert r"\udcfe" in seen(capsys)
    assert cli.main(["inspect", table]) == 0
    assert r"\udcff.csv" in seen(capsys)
    assert cli.main(["inspect", path + ".none"]) == 1
    assert r"\udcff.csv.none" in seen(capsys)


def test_output_of_another_encoding(place: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (["inspect", str(place / "T")], ["verify", str(place / "T")], ["inspect", str(place / "é")]):
        command = [sys.executable, "-m", "hashemb", *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120)
        assert b"Traceback" not in child.stderr, child.stderr
        assert rb"\xe9" in child.stdout + child.stderr


def test_the_page_of_a_report(place: Path, capsys: Any) -> None:
    """Names are escaped for HTML too, also in the figures, and dollar signs in them start no formulas."""
    page = place / "page.html"
    assert cli.main(["report", str(place / "T"), str(place / "x.csv"), "-o", str(page), "--user", NAMES[0]]) == 0
    seen(capsys)
    text = page.read_text(encoding="utf-8")
    assert {character for character in text if not character.isprintable()} == {"\n"}
    assert "<b>" not in text
    picture = text[text.index('id="collisions-') : text.index("Counted on the data given")]
    for shown in (r"a\x1b]0;pwned\x07\x1b[31m", r"c\u202e", "&lt;b&gt;$x$", "ünï :smile: [red]"):
        assert shown in picture, shown
        assert text.count(shown) >= 2


def test_progress_bars_on_a_terminal() -> None:
    rich_console = pytest.importorskip("rich.console")
    from hashemb.cli.console import progress_bar

    file = io.StringIO()
    console = rich_console.Console(file=file, force_terminal=True, width=120)
    with progress_bar(console, f"[red]{TURNED}{CLEAR}", 10) as advance:
        advance(5, 5)
    assert r"[red]\u202e\x9b2J" in file.getvalue()
    assert not set(file.getvalue()) & {TURNED, CLEAR[0]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 日本\u3000語\xa0😀", "plain ünï 日本\u3000語\xa0😀"),
        ("\x00\x07\x08\r\n\t\x7f", r"\x00\x07\x08\r\n\t\x7f"),
        ("\x80\x9b\x9f", r"\x80\x9b\x9f"),
        ("\u200b\u200e\u200f\u061c\u2066\u2069\ufeff", r"\u200b\u200e\u200f\u061c\u2066\u2069\ufeff"),
        ("\ud800\udcff\U000e0001", r"\ud800\udcff\U000e0001"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert printable("é\u20ac", "latin-1") == r"é\u20ac"
