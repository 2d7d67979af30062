import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

__test__: dict[str, str]

KINDS: dict[str, int]
BLOCK_EXAMPLES: int

@disjoint_base
class Maths:
    def __new__(cls, kind: str, dim: int, num_fields: int) -> Self: ...
    @property
    def residual(self) -> float: ...
    @property
    def pair_gradients(self) -> npt.NDArray[np.float64]: ...
    def start(self) -> None: ...
    def run(
        self,
        vectors: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
        *,
        bias: float,
        num_fields: int = 0,
        pair_weights: npt.NDArray[np.float32] | None = None,
        offsets: npt.NDArray[np.int64] | None = None,
        values: npt.NDArray[np.float32] | None = None,
        fields: npt.NDArray[np.int32] | None = None,
        index: npt.NDArray[np.int32] | None = None,
        labels: npt.NDArray[np.float32] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        gradients: npt.NDArray[np.float32] | None = None,
        logits: bool = False,
        num_threads: int = 1,
    ) -> None: ...

@disjoint_base
class DistinctKeys:
    def __new__(cls) -> Self: ...
    def find(
        self, keys: npt.NDArray[np.uint64], distinct: npt.NDArray[np.uint64], index: npt.NDArray[np.int32]
    ) -> int: ...

def add_scores(
    labels: npt.NDArray[np.float64],
    probabilities: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64] | None,
    histogram: npt.NDArray[np.float64],
    squares: npt.NDArray[np.float64] | None,
    *,
    logit_limit: float,
    eps: float,
) -> tuple[float, float] | None: ...
