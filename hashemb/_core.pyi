# What the compiled core offers to the rest of the package. Arguments are checked, but only for memory safety:
# the public functions that call these give the messages that a user should see.

from typing import Any

import numpy as np
from numpy.typing import NDArray

__test__: dict[str, str]

# ---- hashing ----

def hash_integers(
    raw: NDArray[np.uint8], width_bytes: int, is_signed: bool, seed: int, out: NDArray[np.uint64]
) -> None: ...
def hash_fixed_bytes(
    raw: NDArray[np.uint8], width_bytes: int, seed: int, out: NDArray[np.uint64]
) -> None: ...
def hash_fixed_ucs4(
    raw: NDArray[np.uint8], width_chars: int, seed: int, out: NDArray[np.uint64]
) -> None: ...
def hash_objects(
    values: list[Any] | tuple[Any, ...], seed: int, out: NDArray[np.uint64]
) -> None: ...
def hash_arrow_array(
    schema_capsule: object, array_capsule: object, seed: int, out: NDArray[np.uint64], unsupported: str
) -> None: ...
def hash_arrow_stream(
    stream_capsule: object, seed: int, out: NDArray[np.uint64], unsupported: str
) -> None: ...
