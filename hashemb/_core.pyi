from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

__test__: dict[str, str]

@disjoint_base
class Core:
    def __new__(cls, arrays: dict[str, Any], scalars: dict[str, Any]) -> Self: ...
    def lookup(
        self,
        keys: npt.NDArray[np.uint64],
        out: npt.NDArray[np.float32],
        offsets: npt.NDArray[np.int64] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        pooling: int = 0,
    ) -> None: ...
    def rows(self, keys: npt.NDArray[np.uint64], out: npt.NDArray[np.int64]) -> None: ...
    def plan(
        self,
        keys: npt.NDArray[np.uint64],
        grads: npt.NDArray[np.float32],
        offsets: npt.NDArray[np.int64] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        pooling: int = 0,
    ) -> npt.NDArray[np.uint64]: ...
    def apply(self) -> int: ...
    def apply_exact(self, lock_fd: int) -> int: ...
    def enter_gate(self, lock_fd: int) -> None: ...
    def leave_gate(self, lock_fd: int) -> None: ...

# ---- what processes share ----

LOCK_WRITERS: int
LOCK_GATE: int
LOCK_SNAPSHOT: int
STRIPE_BLOCKS: int

def lock(fd: int, kind: int, place: int, wait: bool) -> bool: ...
def close_gate(control: npt.NDArray[np.uint8], lock_fd: int) -> None: ...
def open_gate(control: npt.NDArray[np.uint8], lock_fd: int) -> None: ...
@disjoint_base
class Saving:
    def __new__(
        cls,
        files: list[tuple[npt.NDArray[Any], int, int]],
        blocks: npt.NDArray[np.uint32],
        control: npt.NDArray[np.uint8],
        target_blocks_fd: int,
        lock_fd: int,
        since: int,
        until: int,
        data_offset: int,
    ) -> Self: ...
    def save_stripes(self, begin: int, end: int) -> None: ...

def mark_blocks(
    marks: npt.NDArray[np.uint32], blocks: npt.NDArray[np.uint64], epoch: int, saving: Saving | None = None
) -> None: ...

def populate_blocks(array: npt.NDArray[Any], blocks: npt.NDArray[np.uint64], block_bytes: int) -> int: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def get_isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

# ---- hashing ----

def hash_integers(
    raw: npt.NDArray[np.uint8], width_bytes: int, is_signed: bool, seed: int, out: npt.NDArray[np.uint64]
) -> None: ...
def hash_fixed_bytes(
    raw: npt.NDArray[np.uint8], width_bytes: int, seed: int, out: npt.NDArray[np.uint64]
) -> None: ...
def hash_fixed_ucs4(
    raw: npt.NDArray[np.uint8], width_chars: int, seed: int, out: npt.NDArray[np.uint64]
) -> None: ...
def hash_objects(
    values: list[Any] | tuple[Any, ...], seed: int, out: npt.NDArray[np.uint64]
) -> None: ...
def hash_arrow_array(
    schema_capsule: object, array_capsule: object, seed: int, out: npt.NDArray[np.uint64], unsupported: str
) -> None: ...
def hash_arrow_stream(
    stream_capsule: object, seed: int, out: npt.NDArray[np.uint64], unsupported: str
) -> None: ...
