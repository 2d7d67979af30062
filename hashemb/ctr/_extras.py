"""Import optional packages when they are needed, with an error that names what to install."""

from __future__ import annotations

import importlib
from typing import Any

from hashemb.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, extra: str = "ctr") -> Any:
    """Import and return `module`, or raise `MissingExtraError` naming its package and `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], extra) from error
