from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

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
        *,
        force_wide: bool = False,
    ) -> npt.NDArray[np.uint64]: ...
    def apply(self) -> None: ...

def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def get_isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
