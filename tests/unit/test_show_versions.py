"""`show_versions` prints what is in use, also if it was forced or if the machine provides little information."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import hashemb
from hashemb import _packages, _runtime


def fields(text: str) -> dict[str, str]:
    """Return the printed values by name: names take up 26 columns."""
    return {line[:26].strip(): line[27:] for line in text.splitlines()}


def test_what_is_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHEMB_ISA", raising=False)
    monkeypatch.setenv("HASHEMB_NUM_THREADS", "7")
    before = hashemb.get_num_threads()
    hashemb.set_num_threads(3)
    try:
        hashemb.show_versions()
    finally:
        hashemb.set_num_threads(before)
    shown = fields(capsys.readouterr().out)
    assert shown["hashemb"] == hashemb.__version__
    assert shown["python"].split()[0] == platform.python_version()
    assert shown["numpy"] == np.__version__
    assert shown["system"].startswith(f"Linux {platform.release()}")
    assert shown["CPUs usable"] == f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    assert shown["page size"] == f"{os.sysconf('SC_PAGE_SIZE')} bytes"
    assert shown["instruction set"] == f"{_runtime.get_isa()} (this CPU runs {', '.join(_runtime.available_isas())})"
    assert (shown["threads"], shown["HASHEMB_ISA"], shown["HASHEMB_NUM_THREADS"]) == ("3", "not set", "7")


@pytest.mark.parametrize("isa", _runtime.available_isas())
def test_a_forced_instruction_set_is_the_one_shown(isa: str) -> None:
    """In addition, no optional package is imported for its version."""
    extras = {name.replace("scikit-learn", "sklearn") for name in _packages._EXTRAS}
    program = (
        "import sys, hashemb; known = set(sys.modules); hashemb.show_versions(); "
        f"print('imported'.ljust(26), sorted({extras} & (set(sys.modules) - known)))"
    )
    environment = {**os.environ, "HASHEMB_ISA": isa, "HASHEMB_NUM_THREADS": "2"}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    shown = fields(child.stdout)
    assert shown["instruction set"].split()[0] == shown["HASHEMB_ISA"] == isa
    assert shown["threads"] == shown["HASHEMB_NUM_THREADS"] == "2"
    assert shown["imported"] == "[]"


def test_where_little_is_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, /sys and package metadata, the rest is still printed."""
    monkeypatch.setattr(_packages, "_read", lambda path: "")
    monkeypatch.setattr(_packages, "_installed", lambda package: None)
    hashemb.show_versions()
    shown = fields(capsys.readouterr().out)
    assert shown["numpy"] == "not installed"
    assert shown["CPU"] == (platform.processor() or "unknown")
    assert shown["huge pages"] == shown["huge pages of tmpfs"] == "unknown"
    assert not set(_packages._EXTRAS) & set(shown)


@pytest.mark.parametrize(
    ("cpuinfo", "shown"),
    [
        ("model name\t: Zen 4\ncpu family\t: 25\nmodel\t: 17\n\nmodel name\t: x", "Zen 4 (cpu family 25, model 17)"),
        ("model name : S390", "S390"),
        ("processor : 0\nBogoMIPS : 48.00", platform.processor()),
    ],
)
def test_cpu_model(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, shown: str) -> None:
    monkeypatch.setattr(_packages, "_read", lambda path: cpuinfo)
    assert _packages._cpu_model() == shown


def test_files_and_packages_that_are_not_there() -> None:
    assert _packages._read("/proc/there is no such file") == ""
    assert _packages._installed("there-is-no-such-package") is None
    assert _packages._installed("numpy") == np.__version__
