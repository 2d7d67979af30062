"""Run the extension under sanitizers: hostile files with AddressSanitizer and UndefinedBehaviorSanitizer, and threads
with ThreadSanitizer.

    $ python tests/sanitize.py address --cases 20000     # resealed mutations, and as many of arbitrary bytes
    $ python tests/sanitize.py thread --minutes 10

The program builds the extension out of tree with gcc's sanitizers, and runs sanitize_fuzz.py or sanitize_threads.py
with it. Sanitizer reports, crashes, hangs and undocumented exceptions are failures; they are printed with the means to
replay them. `--build DIR` keeps the build for the next run; it is not rebuilt when sources change. Python itself is
not instrumented: only its calls of the C library are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FLAGS = {"address": "address,undefined", "thread": "thread"}
RUNTIMES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}
KINDS = ("table", "snapshot", "deltas", "model")
PLACE = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()  # avoids waiting for a disk
CASES_PER_PROCESS = 500
PATIENCE_S = 60.0  # for one case, under a sanitizer, on a machine with other work


class Unavailable(Exception):
    """Raised if there is no compiler, or if it lacks this sanitizer; the message says which."""


@dataclass(frozen=True)
class Build:
    """A copy of the package with an instrumented extension."""

    sanitizer: str
    directory: Path
    runtimes: tuple[str, ...]

    def environment(self, log: Path) -> dict[str, str]:
        """Return variables that preload the sanitizer runtimes in Python; reports go to files that begin with `log`."""
        options = {
            "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:log_path={log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={log}",
            "TSAN_OPTIONS": f"history_size=7:second_deadlock_stack=1:halt_on_error=0:exitcode=0:log_path={log}:"
            f"ignore_noninstrumented_modules=1:suppressions={HERE / 'tsan.supp'}",
        }
        path = os.pathsep.join([str(self.directory), str(HERE), str(ROOT)])
        return {**os.environ, **options, "PYTHONPATH": path, "LD_PRELOAD": " ".join(self.runtimes),
                "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip

    def run(self, program: str, arguments: list[str], log: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        command = [*without_randomised_addresses(self.sanitizer), sys.executable, str(HERE / program), *arguments]
        return subprocess.run(command, env=self.environment(log), capture_output=True, text=True, timeout=timeout_s)


def without_randomised_addresses(sanitizer: str) -> list[str]:
    """Return a command prefix: gcc 12's ThreadSanitizer supports fewer mapping addresses than kernels choose from."""
    return ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []


def build(sanitizer: str, directory: Path) -> Build:
    """Build what does not exist yet, in a copy of the sources; raise `Unavailable` if that is impossible."""
    runtimes = tuple(runtime(name) for name in RUNTIMES[sanitizer])
    missing = [name for name in ("Cython", "setuptools", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{sys.executable} lacks {', '.join(missing)}, with which the extension is built")
    package = directory / "hashemb"
    if not list(package.glob("_core*.so")):
        source = directory / "source"
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_*.c")  # generated C
        shutil.copytree(ROOT / "hashemb", source / "hashemb", ignore=ignored)
        shutil.copy(ROOT / "setup.py", source)
        flags = f"-g -O1 -fno-omit-frame-pointer -fsanitize={FLAGS[sanitizer]} -fno-sanitize-recover=undefined"
        environment = {**os.environ, "CC": "gcc", "CFLAGS": flags, "LDFLAGS": f"-fsanitize={FLAGS[sanitizer]}"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the build with {flags} failed:\n{done.stderr[-4000:]}")
        (source / "hashemb").rename(package)
        shutil.rmtree(source)
    return Build(sanitizer, directory, runtimes)


def runtime(name: str) -> str:
    """Return the path of gcc's runtime library of a sanitizer."""
    if shutil.which("gcc") is None:
        raise Unavailable("no gcc")
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        raise Unavailable(f"this gcc has no {name}")
    return os.path.realpath(found)


def reports(log: Path) -> list[str]:
    """Return the reports that the sanitizers have written."""
    return [file.read_text(errors="replace") for file in sorted(log.parent.glob(f"{log.name}*")) if file.stat().st_size]


# ---- hostile files ----


def fuzz(made: Build, work: Path, *, cases: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[str]:
    """Run `cases` resealed mutations and as many of arbitrary bytes, divided among the kinds; return the failures."""
    found: list[str] = []
    for seal in ("resealed", "bytes"):
        for i, kind in enumerate(kinds):
            share = cases * (i + 1) // len(kinds) - cases * i // len(kinds)
            found += fuzz_kind(made, work, kind, seal, seed, share)
    return found


def fuzz_kind(made: Build, work: Path, kind: str, seal: str, seed: int, cases: int) -> list[str]:
    """Run the cases of one kind in processes; if one dies, the next continues after the case that killed it."""
    at, tally = 0, Tally()
    while at < cases:
        log, progress = work / f"log-{kind}-{seal}-{at}", work / "progress"
        progress.unlink(missing_ok=True)
        spec = {"kind": kind, "seal": seal, "seed": seed, "begin": at, "end": min(at + CASES_PER_PROCESS, cases)}
        spec |= {"place": str(work), "progress": str(progress), "patience_s": PATIENCE_S}
        done = made.run("sanitize_fuzz.py", [json.dumps(spec)], log, PATIENCE_S * CASES_PER_PROCESS)
        for line in progress.read_text().splitlines() if progress.exists() else ():
            tally.add(json.loads(line))
        at = spec["end"]
        if done.returncode or reports(log):
            begun = json.loads((work / "current").read_text()) if (work / "current").exists() else {"kind": kind}
            what = "\n".join([f"exit code {done.returncode}", *reports(log), done.stderr[-3000:]])
            tally.add({**begun, "wrong": [what], "outcomes": []})
            at = begun.get("number", at - 1) + 1
    print(f"{kind}, {seal}, seed {seed}: {cases} cases, {tally.num_wrong} wrong; {tally.shown()}", flush=True)
    return tally.described()


class Tally:
    """Counts of the outcomes, and the failures by their text without numbers, with the first case of each."""

    def __init__(self) -> None:
        self.num_wrong, self.outcomes = 0, Counter[str]()
        self.wrong: dict[str, tuple[int, str, dict[str, Any]]] = {}

    def add(self, line: dict[str, Any]) -> None:
        self.outcomes.update(line["outcomes"])
        self.num_wrong += bool(line["wrong"])
        for text in line["wrong"]:
            key = re.sub(r"\d+|/\S+", "#", text)[:300]
            count, first, case = self.wrong.get(key, (0, text, line))
            self.wrong[key] = (count + 1, first, case)

    def shown(self) -> str:
        return ", ".join(f"{name} in {count}" for name, count in sorted(self.outcomes.items()))

    def described(self) -> list[str]:
        return [f"{count} times: {text}\n  {replay(case)}" for count, text, case in self.wrong.values()]


def replay(case: dict[str, Any]) -> str:
    return f"python tests/sanitize.py address --replay {shlex.quote(case.get('mutation', '?'))} {case['kind']}"


# ---- threads ----


def threads(made: Build, work: Path, *, seconds: float, seed: int, kinds: tuple[str, ...] = ()) -> list[str]:
    """Run eight threads on one table after another; return errors and the reports that tsan.supp does not explain."""
    log, spec = work / "log", {"seconds": seconds, "seed": seed, "place": str(work), "kinds": kinds}
    done = made.run("sanitize_threads.py", [json.dumps(spec)], log, 600 + 20 * seconds)
    print(done.stdout, end="", flush=True)
    return [*reports(log), *([f"exit code {done.returncode}\n{done.stderr[-4000:]}"] if done.returncode else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=FLAGS)
    parser.add_argument("--cases", type=int, default=20_000, help="resealed, and as many of bytes")
    parser.add_argument("--minutes", type=float, default=10.0, help="of threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", nargs=2, metavar=("MUTATION", "KIND"), help="one case")
    parser.add_argument("--build", type=Path, metavar="DIR", help="where the build is, or is made and left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sanitize-", dir=PLACE) as directory:
        work = Path(directory, "work")
        work.mkdir()
        try:
            made = build(options.sanitizer, options.build or Path(directory, "build"))
        except Unavailable as reason:
            print(f"skipped: {reason}")
            return
        if options.replay:
            found = replay_case(made, work, *options.replay)
        elif options.sanitizer == "address":
            found = fuzz(made, work, cases=options.cases, seed=options.seed)
        else:
            found = threads(made, work, seconds=60 * options.minutes, seed=options.seed)
    for wrong in found:
        print(f"\n{wrong}")
    sys.exit(1 if found else 0)


def replay_case(made: Build, work: Path, mutation: str, kind: str) -> list[str]:
    spec = {"kind": kind, "place": str(work), "mutation": mutation, "patience_s": PATIENCE_S}
    done = made.run("sanitize_fuzz.py", [json.dumps(spec)], work / "log", 10 * PATIENCE_S)
    print(done.stdout, done.stderr, *reports(work / "log"), sep="\n")
    return [f"exit code {done.returncode}"] if done.returncode else []


if __name__ == "__main__":
    main()
