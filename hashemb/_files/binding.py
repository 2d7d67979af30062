"""Creation of the core of an open table, from its arrays and from its constants in the form that the kernels use."""

from __future__ import annotations

import math

from hashemb import _core
from hashemb._files import format as _format
from hashemb._files.locks import after_fork_in_child
from hashemb._files.table_files import TableFiles

__all__ = ["bind_core"]

_DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
_OPTIMIZER_CODES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "ftrl": 3}
_INIT_CODES = {"zeros": 0, "uniform": 1, "normal": 2}


def bind_core(files: TableFiles) -> _core.Core:
    """Return the core of a table just opened, ready for `apply` if writable; close the table if that fails."""
    try:
        core = _make_core(files)
        if files.writable:
            files.join(core)
        return core
    except BaseException:
        files.close()
        raise


def _make_core(files: TableFiles) -> _core.Core:
    meta, arrays = files.meta, files.arrays
    states = [arrays[name] for name in meta.optimizer.state_files]
    width = getattr(meta.init, "scale", getattr(meta.init, "std", 0.0))
    scalars = {
        "dtype": _DTYPE_CODES[meta.dtype],
        "optimizer": _OPTIMIZER_CODES[meta.optimizer.kind],
        "init": _INIT_CODES[meta.init.kind],
        "block_shift": meta.block_rows.bit_length() - 1,
        "init_scale": width / math.sqrt(meta.num_hashes),
        "init_key": _format.init_key(meta.seed),
        "rounding_key": _format.rounding_key(meta.seed),
        "salts": _format.salts(meta.seed, meta.num_hashes),
        "eps": getattr(meta.optimizer, "eps", 0.0),
        "initial_accumulator": getattr(meta.optimizer, "initial_accumulator_value", 0.0),
        "beta": getattr(meta.optimizer, "beta", 0.0),
        "l1": getattr(meta.optimizer, "l1", 0.0),
        "l2": getattr(meta.optimizer, "l2", 0.0),
        "weight_decay": meta.optimizer.weight_decay,
        "tmpfs_fd": files.tmpfs_fd(),
    }
    bound = {
        "weight": arrays["weight"],
        "blocks": arrays["blocks"],
        "control": arrays["control"],
        "states": states,
        "paid": arrays.get("paid"),
    }
    core = _core.Core(bound, scalars, files.calls)
    after_fork_in_child(core)
    core.fault_ahead = not files.asks_for_huge_pages  # a fault maps 2 MiB, unless small pages are already there
    return core
