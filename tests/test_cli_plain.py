"""The commands on tables run from a plain installation; those on models name the extra that they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hashemb
from hashemb.cli.dispatch import MODEL_COMMANDS

EXTRAS = ("pyarrow", "typer", "rich", "sklearn", "click", "matplotlib")
PROGRAM = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); from hashemb.cli import main; sys.exit(main())"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process in which no extra can be imported."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def good(*arguments: object) -> str:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def train(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with hashemb.open(path, "r+") as table:
        table.update(rng.integers(0, 1000, 100), rng.normal(size=(100, 4)).astype(np.float32))


def test_every_command_on_a_table(tmp_path: Path) -> None:
    path, copy, replica = tmp_path / "t", tmp_path / "copy", tmp_path / "replica"
    hashemb.create(path, num_embeddings=100_000, embedding_dim=4).close()
    train(path, 0)
    assert good("verify", path) == f"{path}: nothing is wrong\n"
    assert "geometry         100,000 rows x 4" in good("inspect", path, "--exact")
    assert good("snapshot", path, copy).startswith("snapshot number 0, step 1: ")
    train(path, 1)
    (tmp_path / "in").mkdir()
    for number, since in ((1, ()), (2, ("--since", tmp_path / "in/1.delta"))):
        out = good("delta", path, "-o", tmp_path / f"in/{number}.delta", *since)
        assert out.startswith(f"delta number {number}, step {number + 1}: ")
        train(path, number)
    assert good("follow", tmp_path / "in", replica, "--once").endswith("at number 2, step 3: 0 pending, lag 0.0 s\n")
    assert hashemb.info(replica).step == 3
    with (path / "control").open("r+b") as file:
        file.write(b"\xff" * 64)
    assert run("verify", path).returncode == 1
    assert "is restored" in good("repair", path, "--from", copy, "--yes")
    assert hashemb.info(path).step == 1


def test_models_name_the_extra(tmp_path: Path) -> None:
    for command in MODEL_COMMANDS:
        done = run(command, tmp_path)
        assert done.returncode == 1
        assert done.stderr == "hashemb: this needs typer: install it with pip install 'hashemb[ctr]'\n"
    assert all(f"    {command} " in good("--help") for command in (*MODEL_COMMANDS, "verify", "follow"))


def test_loading_the_command_line_loads_no_extra() -> None:
    program = f"import hashemb.cli, hashemb.ctr, sys; print([name for name in {EXTRAS} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_model_commands_are_all_listed() -> None:
    pytest.importorskip("typer")
    from hashemb.cli import models, report  # noqa: F401 - registers its command

    assert {command.callback.__name__ for command in models.app.registered_commands} == set(MODEL_COMMANDS)
