"""The C loops of native.c, compiled on first use. Without a compiler they are skipped.

They are compiled for the instruction set whose kernels hashemb uses, so that both are limited by the same machine.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import numpy.typing as npt

from bench.harness import Skip
from hashemb._runtime import get_isa

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

ISA_FLAGS = {"baseline": ["-march=x86-64"], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}
SOURCE = pathlib.Path(__file__).with_name("native.c")
FLAGS = ["-O3", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]


@functools.cache
def shared_object() -> ctypes.CDLL:
    """Compile and load the loops; raise `Skip` without a compiler or if the loops don't support the CPU."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Skip("no C compiler for the roofline loops")
    if os.uname().machine != "x86_64":
        raise Skip("the roofline loops are written for x86-64")
    with tempfile.TemporaryDirectory(prefix="hashemb-bench-") as directory:
        target = os.path.join(directory, "native.so")
        command = [compiler, *FLAGS, *ISA_FLAGS[get_isa()], str(SOURCE), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        loaded = ctypes.CDLL(target)
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.bench_sum.restype = ctypes.c_double
    loaded.bench_sum.argtypes = [pointer, i64, i32]
    loaded.bench_gather.argtypes = [pointer, i64, pointer, i64, pointer, i32, i32, i32, i32]
    loaded.bench_update.argtypes = [
        pointer, pointer, i64, i64, pointer, pointer, i64, pointer, ctypes.c_float, i32, i32,
    ]  # fmt: skip
    return loaded


def consume(values: Floats, num_threads: int) -> float:
    """Read every value once and return the sum: the least that the next layer of a model would do."""
    try:
        native = shared_object()
    except Skip:
        return float(values.sum())
    return float(native.bench_sum(values.ctypes.data, values.size, num_threads))


def gather(
    weight: Array, rows: Rows, out: Floats, *, ahead: int, nontemporal: bool, far: bool, num_threads: int
) -> None:
    """Compute ``out[i] = weight[rows[i]]``, prefetching `ahead` rows ahead; with `far`, into the second-level cache."""
    shared_object().bench_gather(
        weight.ctypes.data, weight.shape[1], rows.ctypes.data, rows.size, out.ctypes.data, ahead, nontemporal,
        far, num_threads,
    )  # fmt: skip


def update(
    weight: Array,
    state: Array,
    rows: Rows,
    order: Rows | None,
    grads: Floats,
    *,
    scale: float,
    ahead: int,
    num_threads: int,
) -> None:
    """Add ``scale * grads[order[i]]`` to row ``rows[i]`` of weight and state. Rows must be distinct."""
    shared_object().bench_update(
        weight.ctypes.data, state.ctypes.data, weight.shape[1], 1 if state.ndim == 1 else state.shape[1],
        rows.ctypes.data, 0 if order is None else order.ctypes.data, rows.size, grads.ctypes.data, scale, ahead,
        num_threads,
    )  # fmt: skip
