from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

from hashemb._sharing import Calls, Saving

__test__: dict[str, str]

NEEDS_JOIN: int
NEEDS_ROOM: int
NEEDS_SAVING: int

@disjoint_base
class Plan:
    @property
    def step(self) -> int: ...
    @property
    def num_fresh(self) -> int: ...
    @property
    def fresh_blocks(self) -> npt.NDArray[np.uint64]: ...

@disjoint_base
class Core:
    asks_for_room: bool
    @property
    def in_flight(self) -> npt.NDArray[np.uint64] | None: ...
    def __new__(cls, arrays: dict[str, Any], scalars: dict[str, Any], calls: Calls) -> Self: ...
    def join(self, lock_fd: int, in_flight: npt.NDArray[np.uint64] | None = None) -> None: ...
    def after_fork(self) -> None: ...
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
    ) -> Plan: ...
    def prefetch(self, keys: npt.NDArray[np.uint64], with_state: bool) -> None: ...
    @property
    def fault_ahead(self) -> bool: ...
    @fault_ahead.setter
    def fault_ahead(self, wanted: bool) -> None: ...
    @property
    def is_asking(self) -> bool: ...
    def apply(self, plan: Plan, exact: bool, saving: Saving | None = None, has_room: bool = False) -> int: ...

def populate_blocks(array: npt.NDArray[Any], blocks: npt.NDArray[np.uint64], block_bytes: int) -> int: ...
