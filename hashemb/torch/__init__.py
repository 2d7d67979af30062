"""PyTorch modules whose parameters are the rows of a table: autograd computes gradients, the table applies the updates.

The modules need the extra: ``pip install 'hashemb[torch]'``. See docs/start/torch.md.
"""

from hashemb.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("torch", "torch") from error

from hashemb.torch._modules import Embedding, EmbeddingBag
from hashemb.torch._optimizer import TableOptimizer

__all__ = ["Embedding", "EmbeddingBag", "TableOptimizer"]
