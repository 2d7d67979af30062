from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self, disjoint_base

__test__: dict[str, str]
MAX_CRITEO_LINE_BYTES: int
FORMATS: tuple[str, ...]

@disjoint_base
class CriteoTokenizer:
    def __new__(
        cls,
        columns: list[tuple[int, int, bool]],
        num_keys: int,
        small: npt.NDArray[np.int16],
        first: npt.NDArray[np.int64],
        octave: npt.NDArray[np.int32],
    ) -> Self: ...
    def tokenize(
        self, text: bytes, labelled: bool
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64], npt.NDArray[np.int64], int]: ...

@disjoint_base
class FieldTable:
    def __new__(cls, limit: int) -> Self: ...
    def __len__(self) -> int: ...
    def append(self, name: bytes) -> None: ...

def tokenize_examples(
    text: bytes,
    format: str,
    fields: FieldTable,
    labels: dict[float, float] | None,
    max_line_bytes: int,
) -> tuple[tuple[Any, ...], npt.NDArray[np.int64], list[tuple[int, bytes]]]: ...
