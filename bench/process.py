"""A command in a process of its own: wall time, processor time and peak memory, of it and of what it starts.

Linux carries the peak of the memory before `exec` over to the program after it, so a large parent would be charged to
every child. The command is therefore started by a small process that imports nothing but the standard library.
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
    """What a command took, and what it printed."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


def run_command(command: list[str], *, cpus: list[int], timeout_s: float) -> Usage:
    """Run `command` on those CPUs alone; standard output and standard error come back together.

    Raises
    ------
    RuntimeError
        It ended with another status than 0; its last output is in the message.
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
    """The first `count` CPUs that this process may use, or as many as there are."""
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
