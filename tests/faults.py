"""The fault sweep: repeat each operation on a table with its first, second, … system call failing.

It runs under fault_shim.c (LD_PRELOAD), with each attempt in a forked child:

    python faults.py DIRECTORY STRIDE VARIANTS [NAME …]

An attempt passes if the operation gives the right answer, or if it raises an OSError or HashembError after which the
table is unchanged (or has the complete result of the operation), and the same call succeeds once the faults are over.
The program prints a line of JSON: the number of attempts by scenario and by kind of call, and the failures.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from fault_scenarios import FIRST, OPTIONS, SCENARIOS, Scenario, shim

import hashemb
from hashemb.errors import HashembError

# fmt: off
KINDS = ["open", "create", "ftruncate", "fallocate", "mmap", "msync", "fsync", "rename", "write", "read", "populate",
         "lock", "mkdir", "unlink"]
# fmt: on
MODES = ["transient", "persistent", "dead", "short"]
LIMIT_S = 30


# ---- one attempt ----


def attempt(scenario: Scenario, n: int, mode: int, variant: int) -> int:
    """Run one operation with the n-th call failing. Return the kind of that call, or -1 if there was no n-th call."""
    scenario.prepare()
    shim.shim_arm(os.fsencode(scenario.root), ctypes.c_long(n), mode, variant)
    error = None
    try:
        scenario.act()
    except (OSError, HashembError) as caught:
        error = caught
    finally:
        kind: int = shim.shim_disarm()
    scenario.dead = MODES[mode] == "dead"
    scenario.lasting = MODES[mode] in ("dead", "persistent")
    if error is not None:
        assert kind >= 0, f"failed without a fault: {error!r}"
        assert str(error) not in ("", "None")
        check_leftovers(scenario.root, KINDS[kind], MODES[mode])
        scenario.check_failed()
        scenario.again()
    scenario.check_done()
    scenario.finish()
    if error is not None or kind < 0 or KINDS[kind] != "open":  # a removal begins with an open
        check_leftovers(scenario.root, KINDS[kind] if kind >= 0 else "", MODES[mode] if kind >= 0 else "")
    return kind


def check_leftovers(root: Path, kind: str, mode: str) -> None:
    """Check that no unfinished file is left, unless its removal was made to fail."""
    if kind == "unlink" or mode == "dead" or (mode == "persistent" and kind == "open"):
        return
    found = [str(path.relative_to(root)) for path in root.rglob("*") if path.name.endswith((".tmp", "saving.json"))]
    assert found == [], f"left behind: {found}"


def attempt_in_child(name: str, root: Path, n: int, mode: int, variant: int) -> tuple[int, str]:
    """Run an attempt in a child; return (kind, failure). A hang ends by SIGALRM, a memory fault by its own signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        code = 0
        try:
            answer = f"{attempt(SCENARIOS[name](root), n, mode, variant)}"
        except BaseException:
            answer, code = traceback.format_exc()[-3000:], 1
        os.write(writer, answer.encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        return 0, answer or f"the process ended with {status}; below 0 it is a signal, -14 the time limit"
    return int(answer), ""


# ---- the sweep ----


def sweep(name: str, work: Path, mode: int, variant: int, stride: int, found: dict[str, Any]) -> None:
    """Try n = 1, 1 + stride, … until no call is left to fail."""
    n, wrong_before = 1, len(found["wrong"])
    while len(found["wrong"]) < wrong_before + 3:
        root = work / "attempt"
        shutil.copytree(work / "template", root, symlinks=True)
        kind, wrong = attempt_in_child(name, root, n, mode, variant)
        shutil.rmtree(root)
        if wrong:
            found["wrong"].append({"scenario": name, "mode": MODES[mode], "n": n, "variant": variant, "what": wrong})
        elif kind < 0:
            return
        else:
            found["scenarios"][name] += 1
            found["kinds"][KINDS[kind]] += 1
        n += stride


def main(work: str, stride: str, variants: str, *names: str) -> int:
    found: dict[str, Any] = {"scenarios": Counter(), "kinds": Counter(), "wrong": []}
    with hashemb.create(Path(work) / "template-t", **OPTIONS) as table:
        table.update(*FIRST)
    (Path(work) / "template").mkdir()
    os.rename(Path(work) / "template-t", Path(work) / "template" / "t")
    for name in names or (name for name in SCENARIOS if name != "canary"):
        for variant in range(int(variants)):
            for mode in range(len(MODES)):
                sweep(name, Path(work), mode, variant, int(stride) if mode else 1, found)
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
