"""Run a command as a child process and measure its wall time, processor time and peak memory, including its children.

Linux carries the peak memory of a process over `exec`, so a child would inherit the peak of a large parent. The command
is therefore started by a small process that imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

_STDERR_SHOWN = 2000  # characters


@dataclass(frozen=True)
class Usage:
    """The resources that a command used, and its output."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


def run_command(command: list[str], *, cpus: list[int], timeout_s: float) -> Usage:
    """Run `command` on those CPUs only; return its standard output and standard error together.

    Raises
    ------
    RuntimeError
        The command ended with a non-zero status; the message contains its last output.
    """
    starter = [sys.executable, "-S", "-m", "bench.process", json.dumps({"command": command, "cpus": cpus})]
    done = subprocess.run(starter, capture_output=True, text=True, errors="replace", timeout=timeout_s, cwd=_root())
    if done.returncode:
        raise RuntimeError(f"the starter of {command} ended with status {done.returncode}: {done.stderr}")
    found = json.loads(done.stdout)
    if found["status"]:
        shown = found["output"][-_STDERR_SHOWN:]
        raise RuntimeError(f"{' '.join(command)} ended with status {found['status']}: {shown}")
    return Usage(found["wall_s"], found["cpu_s"], found["peak_bytes"], found["output"])


def usable_cpus(count: int) -> list[int]:
    """Return the first `count` CPUs that this process may use, or all of them if there are fewer."""
    return sorted(os.sched_getaffinity(0))[:count]


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _measure(command: list[str], cpus: list[int]) -> dict[str, object]:
    os.sched_setaffinity(0, cpus)
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    wall_s = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": done.returncode,
        "wall_s": wall_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "output": done.stdout.decode(errors="replace"),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
