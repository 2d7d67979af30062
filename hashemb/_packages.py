"""Other packages: import optional ones on demand, and list the versions of all, with the machine, for bug reports.

The list is read from /proc, /sys and the metadata of installed packages; it imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

from hashemb import _runtime
from hashemb._version import __version__
from hashemb.errors import MissingExtraError

__all__ = ["is_a", "require", "show_versions"]

_REQUIRED = ("numpy", "scipy", "mmh3")
_EXTRAS = ("pandas", "polars", "pyarrow", "scikit-learn", "torch", "ray", "typer", "rich")
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/"


def require(module: str, extra: str = "ctr") -> Any:
    """Import and return `module`, or raise `MissingExtraError` naming its package and `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], extra) from error


def is_a(value: Any, package: str, *names: str) -> bool:
    """Return whether a class of `value` has one of these names in the package, which need not be imported."""
    return any(c.__name__ in names and c.__module__.partition(".")[0] == package for c in type(value).__mro__)


def show_versions() -> None:
    """Print versions, machine and settings, to include in a bug report or with a timing.

    The output lists versions of hashemb, Python, the required packages and the installed optional ones (none is
    imported); kernel and C library; processor, the CPUs that this process may use, page size, transparent huge pages
    (``enabled`` for memory, ``shmem_enabled`` for tmpfs); the instruction set of the kernels in use, and those that
    this CPU supports; the number of threads per call; and the environment variables that set these.

    Examples
    --------
    >>> import hashemb
    >>> hashemb.show_versions()
    hashemb                    ...
    python                     ...
    instruction set            ...
    """
    for name, value in [*_software(), *_machine(), *_settings()]:
        print(f"{name:<26} {value}")


def _software() -> list[tuple[str, str]]:
    libc = " ".join(part for part in platform.libc_ver() if part)
    return [
        ("hashemb", __version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        *((name, _installed(name) or "not installed") for name in _REQUIRED),
        *((name, version) for name in _EXTRAS if (version := _installed(name))),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("C library", libc or "unknown"),
    ]


def _machine() -> list[tuple[str, str]]:
    return [
        ("CPU", _cpu_model() or "unknown"),
        ("CPUs usable", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"),
        ("page size", f"{os.sysconf('SC_PAGE_SIZE')} bytes"),
        ("huge pages", _read(f"{_HUGE_PAGES}enabled") or "unknown"),
        ("huge pages of tmpfs", _read(f"{_HUGE_PAGES}shmem_enabled") or "unknown"),
    ]


def _settings() -> list[tuple[str, str]]:
    names = ("HASHEMB_ISA", "HASHEMB_NUM_THREADS")
    return [
        ("instruction set", f"{_runtime.get_isa()} (this CPU runs {', '.join(_runtime.available_isas())})"),
        ("threads", str(_runtime.get_num_threads())),
        *((name, os.environ.get(name, "not set")) for name in names),
    ]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Return the name and numbers of the first processor in /proc/cpuinfo, which some architectures lack."""
    first = _read("/proc/cpuinfo").partition("\n\n")[0]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in facts:
        return platform.processor()
    numbers = [f"{name} {facts[name]}" for name in ("cpu family", "model", "stepping") if name in facts]
    return " ".join([facts["model name"], *([f"({', '.join(numbers)})"] if numbers else [])])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:  # the kernel or the container has no such file
        return ""
