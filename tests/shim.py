"""Run test programs under fault_shim.c, which is compiled once per session and loaded by LD_PRELOAD."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
LIMIT_S = 900


def compiled(directory: Path) -> Path:
    """Compile the shim to a library; skip the test if there is no compiler."""
    compiler, library = shutil.which("cc"), directory / "fault_shim.so"
    if compiler is None:
        pytest.skip("no C compiler (cc) to build fault_shim.c with")
    if not library.exists():
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", str(library), str(TESTS / "fault_shim.c")], check=True)
    return library


@contextmanager
def fast_directory(otherwise: Path) -> Iterator[Path]:
    """Yield a directory on a tmpfs if there is one: these tests need no disk, and thousands of syncs would be slow."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(otherwise)
    with tempfile.TemporaryDirectory(prefix="hashemb-faults-", dir=parent) as name:
        yield Path(name)


def run(library: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM ARGUMENTS` under the shim, with one thread because it forks."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(TESTS / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
