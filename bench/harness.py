"""The harness: run sides that answer the same question in turn in one process, A B A B …, and compare their times.

A side is prepared outside the clock and times its own phases with `Clock.lap`. Every run of a side starts with one
untimed batch, because the previous side has used the caches and threads. Ratios are a peer's time over ours, so
above 1 we are faster; "median ratio" is the median of the ratios within each repeat, in which slow drifts of a noisy
machine cancel. On a machine with other work, the ratio of minima estimates undisturbed runs; so does, for one thread,
the ratio of processor times (threads that wait by spinning use processor time too).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

try:
    from hashemb._runtime import get_isa
except ImportError:  # an older build, with which --against compares this one
    from hashemb._core import get_isa

OURS = "hashemb"
RATIOS = ("name", "median_ns", "median_ratio", "ratio_of_medians", "ratio_of_minima", "cpu_ratio")
PACKAGES = [
    "hashemb", "numpy", "torch", "fbgemm-gpu-cpu", "mmh3", "scikit-learn", "pandas", "polars", "pyarrow", "lmdb",
    "rocksdict", "redis", "vowpalwabbit", "river", "deepctr-torch",
]  # fmt: skip


class Skip(Exception):
    """Raised by a side or a benchmark that cannot run on this machine; the message gives the reason."""


class Mismatch(AssertionError):
    """Raised if the result of a side is wrong. The benchmark fails."""


class Clock:
    """A stopwatch: seconds per phase, and the processor time that the whole process used during the phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds = 0.0
        self.start()

    def start(self) -> None:
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap (or start) to `phase`."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self.cpu_seconds += cpu - self._last_cpu
        self._last, self._last_cpu = now, cpu

    def add(self, seconds: dict[str, float], cpu_seconds: float) -> None:
        for phase, took in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took
        self.cpu_seconds += cpu_seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Side(Protocol):
    """One way to do the work. Sides are compared by `group`: the best side of each group counts.

    A side that is too slow for a whole batch may process a part of it and set `share` to that fraction, at most 1.
    """

    name: str
    group: str

    def prepare(self, batch: Any) -> Any:
        """Convert a batch into the form that the side takes; not timed."""

    def run(self, prepared: Any, clock: Clock) -> None:
        """Process one batch and record its time."""


@dataclass
class Settings:
    """The options of the command line."""

    smoke: bool = False
    full: bool = False
    repeats: int = 11
    inner: int = 4
    directory: str = ""
    dims: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    sides: str = ""


@dataclass
class Result:
    """The result of one benchmark for one case: the times of each side, and what was checked."""

    bench: str
    case: dict[str, Any]
    unit: str
    units: int
    sides: list[dict[str, Any]]
    skipped: dict[str, str]
    checks: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "best": best_by_group(self.sides)}


def measure(
    sides: Sequence[Side], batch: Callable[[int], Any], *, units: int, repeats: int, inner: int, settle_s: float = 0.0
) -> list[dict[str, Any]]:
    """Run the sides in turn and summarise their times.

    Parameters
    ----------
    sides
        The sides to compare; the first one is ours.
    batch
        A function that returns batch number i; every run of a side gets different numbers.
    units
        Number of keys (or whatever is counted) in a batch.
    repeats, inner
        Number of timed runs of each side, and of batches in each. One more run, the first, is not counted.
    settle_s
        Pause before each run, in which idle threads of the previous side stop spinning.
    """
    clocks: dict[str, list[Clock]] = {side.name: [] for side in sides}
    number = 0
    with garbage_collector_off():
        for repeat in range(repeats + 1):
            for side in sides if repeat % 2 else reversed(sides):
                prepared = [side.prepare(batch(number + i)) for i in range(inner + 1)]
                number += inner + 1
                time.sleep(settle_s)
                clock = timed_run(side, prepared)
                if repeat:
                    clocks[side.name].append(clock)
    return summaries(sides, clocks, units * inner)


def timed_run(side: Side, prepared: list[Any]) -> Clock:
    """Run one untimed batch, then time the others."""
    side.run(prepared[0], Clock())
    clock = Clock()
    for p in prepared[1:]:
        clock.start()
        side.run(p, clock)
    return clock


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summaries(sides: Sequence[Side], clocks: dict[str, list[Clock]], units: int) -> list[dict[str, Any]]:
    """Return the median, minimum, quartiles and ratios of each side, in nanoseconds per unit."""
    ours = clocks[sides[0].name]
    our_total = np.array([clock.total for clock in ours]) * (1e9 / units)
    our_cpu = np.array([clock.cpu_seconds for clock in ours]) * (1e9 / units)
    rows = []
    for side in sides:
        runs = clocks[side.name]
        scale = 1e9 / (units * getattr(side, "share", 1.0))
        total = np.array([clock.total for clock in runs]) * scale
        cpu = np.array([clock.cpu_seconds for clock in runs]) * scale
        rows.append(
            {
                "name": side.name,
                "group": side.group,
                "median_ns": float(np.median(total)),
                "min_ns": float(total.min()),
                "quartiles_ns": np.quantile(total, [0.25, 0.75]).tolist(),
                "max_over_min": float(total.max() / total.min()),
                "cpu_median_ns": float(np.median(cpu)),
                "phases_ns": {
                    p: float(np.median([c.seconds[p] for c in runs])) * scale for p in runs[0].seconds
                },
                "runs": len(runs),
                "median_ratio": float(np.median(total / our_total)),
                "ratio_of_medians": float(np.median(total) / np.median(our_total)),
                "ratio_of_minima": float(total.min() / our_total.min()),
                "cpu_ratio": float(np.median(cpu) / np.median(our_cpu)),
                "note": getattr(side, "note", ""),
            }
        )
    return rows


def best_by_group(sides: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the fastest side of each group, by its median ratio to ours."""
    best: dict[str, dict[str, Any]] = {}
    for side in sides:
        group = side["group"]
        if group not in best or side["median_ratio"] < best[group]["median_ratio"]:
            best[group] = {k: side[k] for k in RATIOS}
    return best


@contextlib.contextmanager
def available(skipped: dict[str, str], name: str) -> Iterator[None]:
    """Wrap the construction of a side: a missing package or a `Skip` is recorded under `name` instead of raised."""
    try:
        yield
    except (Skip, ImportError) as reason:
        skipped[name] = str(reason)
        print(f"  skipped {name}: {reason}")


def digest(*arrays: Any) -> str:
    """Return a hash of the bytes of arrays, to compare results between machines and versions."""
    h = hashlib.sha256()
    for a in arrays:
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()[:16]


def require_memory(needed_bytes: int, what: str) -> None:
    """Raise `Skip` unless that much memory is available, with a gigabyte to spare."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available_kb = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if needed_bytes + (1 << 30) > available_kb * 1024:
        raise Skip(f"{what} needs {needed_bytes / 2**30:.1f} GiB, {available_kb / 2**20:.1f} GiB are available")


def machine(directory: str) -> dict[str, Any]:
    """Describe what the figures depend on: processor, kernel, pages, file system, versions."""
    return {
        "cpu": _first_field("/proc/cpuinfo", "model name") or platform.processor(),
        "family_model_stepping": "/".join(
            _first_field("/proc/cpuinfo", key) for key in ("cpu family", "model", "stepping")
        ),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "load_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem_enabled": _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "file_system": file_system(directory),
        "isa": get_isa(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def _first_field(path: str, key: str) -> str:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def file_system(directory: str) -> str:
    """Return the type of the file system that holds `directory`, and its huge-page option if it has one.

    The longest mount point that is a prefix wins.
    """
    best, kind = "", ""
    real = os.path.realpath(directory)
    for line in _read("/proc/self/mounts").splitlines():
        _, mount, fs_type, options, *_ = line.split()
        if len(mount) > len(best) and (real + "/").startswith(mount.rstrip("/") + "/"):
            huge = [option for option in options.split(",") if option.startswith("huge=")]
            best, kind = mount, " ".join([fs_type, *huge])
    return kind
