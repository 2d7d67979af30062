"""The programs that run under sanitizers (sanitize.py) run without them for some seconds, with the installed build."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sanitize
from sanitize import ROOT, Build, Tally, Unavailable, fuzz, reports, runtime, threads

PLAIN = Build("address", ROOT, ())


def test_hostile_files(tmp_path: Path, capsys: Any) -> None:
    assert fuzz(PLAIN, tmp_path, cases=80, seed=5) == []
    shown = capsys.readouterr().out
    assert shown.count("20 cases, 0 wrong") == 2 * len(sanitize.KINDS)
    assert "CorruptTableError" in shown


def test_eight_threads(tmp_path: Path, capsys: Any) -> None:
    assert threads(PLAIN, tmp_path, seconds=6, seed=5) == []
    shown = capsys.readouterr().out
    for what in ("lookup", "update", "snapshot", "export", "writer"):
        assert f"'{what}': " in shown


def test_a_process_that_dies_is_found_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at its third case and leaves a report, as under a sanitizer."""

    def run(build: Build, program: str, arguments: list[str], log: Path, timeout_s: float) -> Any:
        spec = json.loads(arguments[0])
        lines = [{"number": n, "kind": "table", "mutation": f"m{n}"} for n in range(spec["begin"], spec["end"])]
        lines = lines if spec["begin"] else lines[:3]
        whole = lines if spec["begin"] else lines[:2]
        noted = [json.dumps({**line, "wrong": [], "outcomes": ["ok"]}) + "\n" for line in whole]
        Path(spec["progress"]).write_text("".join(noted))
        (tmp_path / "current").write_text(json.dumps(lines[-1]))
        if spec["begin"]:
            return subprocess.CompletedProcess([], 0, "", "")
        log.with_name(f"{log.name}.123").write_text("ERROR: AddressSanitizer")
        return subprocess.CompletedProcess([], 1, "", "")

    monkeypatch.setattr(Build, "run", run)
    found = fuzz(PLAIN, tmp_path, cases=10, seed=0, kinds=("table",))
    assert len(found) == 2  # one resealed, one of bytes
    assert "AddressSanitizer" in found[0]
    assert "--replay m2 table" in found[0]


def test_what_is_wrong_is_told_once_with_its_first_case() -> None:
    tally = Tally()
    for number in range(3):
        wrong = [f"open r: TypeError: {number}"]
        tally.add({"kind": "table", "mutation": f"m{number}", "wrong": wrong, "outcomes": ["ok"]})
    assert tally.num_wrong == 3
    assert tally.described() == ["3 times: open r: TypeError: 0\n  python tests/sanitize.py address --replay m0 table"]


def test_reports_are_those_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "log.1").write_text("a report")
    (tmp_path / "log.2").write_text("")
    (tmp_path / "other").write_text("no report")
    assert reports(tmp_path / "log") == ["a report"]


def test_without_the_runtime_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="no libnone"):
        runtime("libnone.so")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="no gcc"):
        runtime("libasan.so")


def test_every_suppression_has_its_reason() -> None:
    before = "# "
    for line in (ROOT / "tests" / "tsan.supp").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith(("#", "race:^")), line
        assert before.strip() or not line.startswith("race:"), f"{line}: no reason above it"
        before = line
