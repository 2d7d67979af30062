"""``python -m bench [name ...] [--smoke | --full] [--json FILE] [--against DIR]``: run benchmarks and print timings."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from typing import Any

from bench import against
from bench.harness import Result, Settings, Skip, file_system, machine

BENCHES = [
    "lookup", "update", "pooled", "roofline", "hash", "overhead", "scale", "kv", "out_of_core", "sharing", "ctr",
    "compression",
]  # fmt: skip
#: Sparse tables and stores that keep files: these benchmarks also measure the disk, the others only kernels and memory.
ON_DISK = {"scale", "kv", "out_of_core", "compression"}
DIR_HELP = f"where tables are made; default /dev/shm if 8 GiB are free, for {sorted(ON_DISK)} {tempfile.gettempdir()}"
MEMORY, MEMORY_BYTES = "/dev/shm", 8 << 30


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = Settings(
        smoke=options.smoke,
        full=options.full,
        repeats=options.repeats or (1 if options.smoke else 11),
        inner=1 if options.smoke else options.inner,
        directory=options.dir or in_memory() or tempfile.gettempdir(),
        dims=options.dims,
        threads=options.threads,
        optimizers=options.optimizers,
        sides=options.sides,
    )
    report: dict[str, Any] = {"machine": machine(settings.directory), "settings": settings.__dict__, "results": []}
    show_facts(report["machine"])
    for name in options.names or (against.NAMES if options.against else BENCHES):
        began = time.perf_counter()
        disk = options.dir or tempfile.gettempdir()
        where = dataclasses.replace(settings, directory=disk) if name in ON_DISK else settings
        run_bench(name, where, report, options.json, options.against)
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


def in_memory() -> str | None:
    """Return the directory of a tmpfs with room for the tables and a peer's copy, if there is one."""
    if file_system(MEMORY).split()[:1] != ["tmpfs"] or shutil.disk_usage(MEMORY).free < MEMORY_BYTES:
        return None
    return MEMORY


def run_bench(name: str, settings: Settings, report: dict[str, Any], target: str | None, other: str | None) -> None:
    """Run one benchmark, or compare it with the build in `other`; print and save each result as it arrives."""
    try:
        question = importlib.import_module(f"bench.{name}")
        for result in against.run(name, settings, other) if other else question.run(settings):
            if name != "hash":  # it uses no files
                result.case["on"] = file_system(settings.directory)
            report["results"].append(result.as_dict())
            show(result)
            save(report, target)
    except Skip as reason:
        print(f"-- {name} skipped: {reason}")
    save(report, target)


def save(report: dict[str, Any], target: str | None) -> None:
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def show_facts(facts: dict[str, Any], indent: int = 0) -> None:
    """Print names and values, one per line."""
    width = max(map(len, facts), default=0) + 2
    for name, value in facts.items():
        print(f"{'':{indent}}{name:<{width}}{_on_one_line(value)}")


def _on_one_line(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = [f"{k} ({_on_one_line(v)})" if isinstance(v, dict) else f"{k} {v}" for k, v in value.items()]
    return ", ".join(parts)


def show(result: Result) -> None:
    """Print one table per result: nanoseconds per unit, and the ratio of each side's time to ours."""
    point = " ".join(f"{k}={v}" for k, v in result.case.items())
    print(f"\n{result.bench}: {point}")
    show_facts(result.checks, indent=2)
    print(f"  {'':30}{'ns per ' + result.unit:^26}{'time of the side / ours':^28}  median ns by phase")
    print(f"  {'side':30}{'median':>13}{'min':>13}{'median':>8}{'minima':>8}{'cpu':>8}")
    for side in result.sides:
        ratios = "".join(f"{side[k]:8.2f}" for k in ("median_ratio", "ratio_of_minima", "cpu_ratio"))
        phases = " ".join(f"{k} {v:.1f}" for k, v in side["phases_ns"].items())
        print(f"  {side['name']:30}{side['median_ns']:13.2f}{side['min_ns']:13.2f}{ratios}  {phases}  {side['note']}")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], help=f"which of {', '.join(BENCHES)}; default all")
    parser.add_argument("--only", dest="names", nargs="+", choices=BENCHES, default=argparse.SUPPRESS, help="the same")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument("--full", action="store_true", help="the whole grid (hours)")
    parser.add_argument("--json", metavar="FILE", help="write machine, settings and results")
    parser.add_argument("--repeats", type=int, help="timed runs of each side")
    parser.add_argument("--inner", type=int, default=2, help="batches in a timed run")
    parser.add_argument("--dir", help=DIR_HELP)
    parser.add_argument("--dims", type=int, nargs="+", default=[])
    parser.add_argument("--threads", type=int, nargs="+", default=[])
    parser.add_argument("--optimizers", nargs="+", choices=["rowwise_adagrad", "adagrad"], default=[])
    parser.add_argument("--against", metavar="DIR", help="a checkout with another build in place")
    parser.add_argument("--sides", default="", help="a regular expression: only the peers whose name it finds")
    options = parser.parse_args(arguments)
    if options.against and not glob.glob(os.path.join(glob.escape(options.against), "hashemb", "_core*.so")):
        parser.error(f"{options.against} has no build in place: there, run `python setup.py build_ext --inplace`")
    if options.dir:
        os.makedirs(options.dir, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
