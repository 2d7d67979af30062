from typing import Any

import numpy as np
import numpy.typing as npt

__test__: dict[str, str]

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
