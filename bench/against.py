"""Compare this build with another one, such as the one before a change: the same benchmarks, interleaved in one run.

Each build runs in its own process; both are started the same way, and one is idle while the other is timed. Both open
the same table, hence the same physical pages, so that neither gets a luckier placement. They get the same batches of
keys in a different order, so that neither finds in the caches what the other has just looked up. One repeat is four
turns, ours, other, other, ours, so that both begin once with cold caches and once with warm ones. Ratios are the other
build's time over ours, as for peers: above 1, this build is faster.

A process may be lucky for as long as it lives: with its processor, when another machine uses part of the core, and with
the pages of its own memory. So each case is measured by several pairs of processes, started one after another; with one
thread both of a pair keep to the same processor. The note gives the ratio of each pair.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import hashemb
from bench import embedding, overhead, workload
from bench.harness import OURS, Clock, Mismatch, Result, Settings, Skip, digest, get_isa, summaries, timed_run
from bench.sides import HashembSide
from bench.workload import Case

OTHER = "the other build"
NAMES = ("lookup", "update", "overhead")
PAIRS = 7
ROOT = pathlib.Path(__file__).resolve().parent.parent
#: Import hashemb from the other directory and the benchmarks from this one.
START = "import sys; sys.path[0] = sys.argv[1]; import hashemb; sys.path[0] = sys.argv[2]; import bench.against; "
START += "bench.against.serve()"


# ---- parent process ----


class Build:
    """A child process with one build loaded and a table open."""

    def __init__(self, name: str, directory: pathlib.Path) -> None:
        self.name = self.group = name
        command = [sys.executable, "-c", START, str(directory), str(ROOT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        found = pathlib.Path(self.ask("where")["file"])
        if directory.resolve() not in found.resolve().parents:
            self.close()
            raise Mismatch(f"{found} was loaded, and nothing of {directory}")

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(name: str, settings: Settings, other: str) -> Iterator[Result]:
    """Measure each case of a benchmark with both builds."""
    if name not in NAMES:
        raise Skip(f"--against is for {', '.join(NAMES)}")
    places = {OURS: pathlib.Path(hashemb.__file__).parents[1], OTHER: pathlib.Path(other)}
    for table, case, calls in cases(name, settings):
        yield compare(name, settings, places, table, case, calls)


def cases(name: str, settings: Settings) -> Iterator[tuple[hashemb.EmbeddingTable, Case, int]]:
    """Yield the cases of the benchmark: a warm table, the case, and the number of calls per batch for `overhead`."""
    if name != "overhead":
        optimizers = settings.optimizers or ["rowwise_adagrad", "adagrad"][: 1 if name == "lookup" else 2]
        grid = embedding.grid(settings, Case(rows=1 << 23, dim=16), optimizers)
        for table, case in embedding.with_tables(settings, grid):
            yield table, case, 1
        return
    base = Case(rows=1 << (14 if settings.smoke else 20), dim=16)
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-", dir=settings.directory) as directory:
        table = workload.make_table(directory, base)
        for case in overhead.cases(settings, base):
            yield table, case, overhead.calls_per_run(settings, case)
        workload.drop_table(table)


def compare(
    name: str,
    settings: Settings,
    places: dict[str, pathlib.Path],
    table: hashemb.EmbeddingTable,
    case: Case,
    calls: int,
) -> Result:
    """Measure one case with several pairs of processes, one after another."""
    opening = {"path": table.path, "case": dataclasses.asdict(case), "calls": calls, "train": name != "lookup"}
    settle_s = embedding.SETTLE_S if case.threads > 1 and not settings.smoke else 0.0
    cpus = sorted(os.sched_getaffinity(0))
    pairs = []
    for number in range(1 if settings.smoke else PAIRS):
        opening["cpus"] = [cpus[number % len(cpus)]] if case.threads == 1 else cpus
        pairs.append(measure_pair(settings, places, opening, settle_s))
    builds = pairs[0][0]
    clocks = {build.name: [clock for pair in pairs for clock in pair[1][build.name]] for build in builds}
    units = calls if name == "overhead" else case.num_keys
    rows = summaries(builds, clocks, 2 * units * (1 if name == "overhead" else settings.inner))  # type: ignore[arg-type]
    by_pair = " ".join(f"{median_ratio(pair[1]):.3f}" for pair in pairs)
    rows[1]["note"] = f"by phase {', '.join(phase_ratios(clocks[OURS], clocks[OTHER]))}; by pair {by_pair}"
    point = dataclasses.asdict(case) if name != "overhead" else overhead.point(case)
    checks = {"lookup_sha256": pairs[0][2], "opened": pairs[0][3]}
    return Result(name, {**point, "against": OTHER}, "call" if name == "overhead" else "key", units, rows, {}, checks)


def measure_pair(
    settings: Settings, places: dict[str, pathlib.Path], opening: dict[str, Any], settle_s: float
) -> tuple[list[Build], dict[str, list[Clock]], str, dict[str, Any]]:
    """Start a process for each build, measure both in turn, and return their times and what they looked up."""
    builds = [Build(name, place) for name, place in places.items()]
    try:
        opened = {build.name: build.ask("open", **opening) for build in builds}
        digests = {name: found.pop("lookup_sha256") for name, found in opened.items()}
        if len(set(digests.values())) != 1:
            raise Mismatch(f"look-ups of the same table differ: {digests}")
        return builds, measure(builds, settings, settle_s), digests[OURS], opened
    finally:
        for build in builds:
            build.close()


def measure(builds: list[Build], settings: Settings, settle_s: float) -> dict[str, list[Clock]]:
    """Like harness.measure, except that a build gets the batches that the other had half of the repeats earlier."""
    clocks: dict[str, list[Clock]] = {build.name: [] for build in builds}
    per_run, turns = settings.inner + 1, 2 * (settings.repeats + 1)
    for repeat in range(settings.repeats + 1):
        timed = {build.name: Clock() for build in builds}
        for visit, build in enumerate([*builds, *reversed(builds)]):
            turn = (2 * repeat + visit // 2 + builds.index(build) * turns // 2) % turns
            numbers = list(range(turn * per_run, (turn + 1) * per_run))  # the first is not timed
            time.sleep(settle_s)
            timed[build.name].add(**build.ask("run", numbers=numbers))
        for name, clock in timed.items() if repeat else ():
            clocks[name].append(clock)
    return clocks


def median_ratio(clocks: dict[str, list[Clock]]) -> float:
    pairs = zip(clocks[OURS], clocks[OTHER], strict=True)
    return float(np.median([theirs.total / ours.total for ours, theirs in pairs]))


def phase_ratios(ours: list[Clock], theirs: list[Clock]) -> list[str]:
    """Return, for each phase, the median of the ratios within each repeat."""
    ratios = {
        phase: np.median([b.seconds[phase] / a.seconds[phase] for a, b in zip(ours, theirs, strict=True)])
        for phase in ours[0].seconds
    }
    return [f"{phase} {ratio:.3f}" for phase, ratio in ratios.items()]


# ---- child processes ----


def serve() -> None:
    """Answer the requests of `Build`, one line of JSON each, until there are no more."""
    served: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("what")
        if what == "where":
            answer: dict[str, Any] = {"file": hashemb.__file__}
        elif what == "open":
            answer = open_table(served, **request)
        else:
            answer = time_batches(served, **request)
        print(json.dumps(answer), flush=True)
    if "table" in served:
        served["table"].close()


def open_table(
    served: dict[str, Any], path: str, case: dict[str, Any], calls: int, train: bool, cpus: list[int]
) -> dict[str, Any]:
    """Open the table and touch every page for writing: zero gradients change no value of a row."""
    os.sched_setaffinity(0, cpus)
    served["case"], served["calls"] = Case(**case), calls
    hashemb.set_num_threads(served["case"].threads)
    served["table"] = table = hashemb.open(path, "r+")
    step = min(workload.FILL_ROWS, table.num_embeddings)
    zeros = np.zeros((step, table.embedding_dim), np.float32)
    for begin in range(0, table.num_embeddings, step):
        rows = np.arange(begin, min(begin + step, table.num_embeddings))
        table.update(workload.keys_of_rows(rows, table.num_embeddings), zeros[: rows.size])
    side = HashembSide(table, served["case"], train=train)
    served["side"] = overhead.Calls(side) if calls > 1 else side
    keys = side.prepare(workload.keys_for(served["case"], 1 << 20))
    size = os.stat(sys.modules["hashemb._core"].__file__ or "").st_size
    versions = {"version": hashemb.__version__, "extension_bytes": size, "isa": get_isa()}
    return {**versions, "lookup_sha256": digest(side.lookup(keys)), "huge_page_bytes": workload.huge_page_bytes(table)}


def time_batches(served: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    case, calls, side = served["case"], served["calls"], served["side"]
    if calls > 1:  # a batch is that many calls: one untimed batch, one timed
        batches = [[workload.keys_for(case, number * calls + i) for i in range(calls)] for number in numbers[:2]]
    else:
        batches = [workload.keys_for(case, number) for number in numbers]
    clock = timed_run(side, [side.prepare(batch) for batch in batches])
    return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
