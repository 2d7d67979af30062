"""A table far larger than the memory limit can be trained: its pages are page cache, which the kernel can reclaim.

This needs root, a memory control group (version 1 or 2), and a file system that is not in memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import memory_limited
import pytest

import hashemb
from bench.harness import Skip, file_system
from bench.memory_limit import limited_group

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 128 << 20  # the interpreter with NumPy takes about 60 MiB


def oom_kills(group: Path) -> int:
    """Return the number of OOM kills among all processes ever in the group."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            found = re.search(r"^oom_kill (\d+)$", (group / name).read_text(), re.MULTILINE)
            return int(found.group(1)) if found else 0
    return 0


@pytest.mark.slow
def test_a_table_four_times_the_memory_limit(tmp_path: Path) -> None:
    if file_system(str(tmp_path)).split()[:1] == ["tmpfs"]:
        pytest.skip(f"{tmp_path} is memory (tmpfs)")
    program, path = memory_limited.__file__, tmp_path / "t"
    try:
        with limited_group(LIMIT_BYTES) as group:
            command = [sys.executable, program, str(path), "30", str(group)]
            child = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
            kills = oom_kills(group.parent)
    except Skip as reason:
        pytest.skip(str(reason))
    assert (child.returncode, kills) == (0, 0), child.stderr
    counts = json.loads(child.stdout)
    print(counts)
    logical_bytes = hashemb.info(path).logical_bytes
    assert logical_bytes > 4 * LIMIT_BYTES
    assert counts["snapshots"] > 0
    assert counts["deltas"] > 0
    assert hashemb.verify(path) == []
