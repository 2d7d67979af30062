"""All compiled modules share one pool of threads and one choice of instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hashemb
from hashemb import _runtime

POOL = """
import os, sys
import numpy as np
import hashemb
from hashemb.ctr._maths import Maths

hashemb.set_num_threads(4)
table = hashemb.create(sys.argv[1], num_embeddings=1000, embedding_dim=4)
before = len(os.listdir("/proc/self/task"))
table.lookup(np.arange(100_000))
after_table = len(os.listdir("/proc/self/task"))
vectors, out = np.ones((80_000, 16), np.float32), np.empty(10_000, np.float32)
Maths("fm", 16, 0).run(vectors, out, bias=0.0, num_fields=8, num_threads=4)
print(after_table - before, len(os.listdir("/proc/self/task")) - after_table)
"""


def test_table_and_models_use_the_same_threads(tmp_path: Path) -> None:
    command = [sys.executable, "-c", POOL, str(tmp_path / "t")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["3", "0"]


def test_settings_of_the_public_module_are_those_of_the_runtime() -> None:
    assert hashemb.set_num_threads is _runtime.set_num_threads
    assert _runtime.get_isa() in _runtime.available_isas()
    assert _runtime.available_isas()[0] == "baseline"
    with pytest.raises(ValueError, match="no kernels for the instruction set 'sse9'"):
        _runtime.set_isa("sse9")


@pytest.mark.parametrize("isa", _runtime.available_isas())
def test_instruction_set_from_the_environment(isa: str) -> None:
    program = "import hashemb.ctr; from hashemb import _runtime; print(_runtime.get_isa())"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "HASHEMB_ISA": isa}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == isa
