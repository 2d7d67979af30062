"""TableOptimizer: update each table once for all gradients since the last update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hashemb.torch._gradients import Gradients
from hashemb.torch._modules import TableModule

__all__ = ["TableOptimizer"]


class TableOptimizer(torch.optim.Optimizer):
    """Updates tables on `step`, like the optimisers of torch: `zero_grad`, any number of backward passes, `step`.

    All gradients since the last `zero_grad` or `step` become one update of each table, whether they come from several
    backward passes (accumulation), several look-ups or several modules on one table. Without a `TableOptimizer`, each
    backward pass is an update.

    Parameters
    ----------
    modules : torch.nn.Module or iterable of them
        Modules whose `Embedding` and `EmbeddingBag` submodules, at any depth, are updated. `param_groups` has a group
        for each table.

    Notes
    -----
    The arithmetic is that of the table's own optimiser, `EmbeddingTable.optimizer`. A group's "lr" is initially
    `table.lr`; when a torch scheduler changes it, the table's learning rate changes for all processes that have it
    open.

    While gradients are pending, `parameters` returns the tensors that hold them, for `torch.nn.utils.clip_grad_norm_`.
    These are the gradients of the looked-up vectors, not sums over repeated keys. `torch.amp.GradScaler` supports them
    too.

    `step` raises the same errors as `EmbeddingTable.update`; the gradients of that table are then kept until
    `zero_grad`.

    Examples
    --------
    >>> import tempfile, hashemb, torch
    >>> from hashemb.torch import Embedding, TableOptimizer
    >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=2**20, embedding_dim=4)
    >>> embedding = Embedding(table)
    >>> optimizer = TableOptimizer(embedding)
    >>> for half in torch.tensor([[1, 2], [3, 4]]):
    ...     embedding(half).sum().backward()
    >>> optimizer.step()
    >>> table.step
    1
    >>> table.close()
    """

    def __init__(self, modules: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
        roots = [modules] if isinstance(modules, torch.nn.Module) else list(modules)
        found = {id(m): m for root in roots for m in root.modules() if isinstance(m, TableModule)}
        if not found:
            raise ValueError(f"there is no hashemb.torch.Embedding or EmbeddingBag in {roots}")
        self._gradients: list[Gradients] = []
        groups = []
        for table in {id(m.table): m.table for m in found.values()}.values():
            users, gradients = [m for m in found.values() if m.table is table], Gradients(table)
            for module in users:
                module._optimizer = gradients
            self._gradients.append(gradients)
            groups.append({"params": [module.anchor for module in users], "lr": table.lr})
        super().__init__(groups, {})
        for group, gradients in zip(self.param_groups, self._gradients, strict=True):
            group["params"] = gradients.leaves  # the list itself, for clipping and loss scaling
        self._rates = [group["lr"] for group in self.param_groups]

    def parameters(self) -> list[Tensor]:
        """Return the tensors whose `.grad` is pending until `step`, in order of arrival."""
        return [leaf for gradients in self._gradients for leaf in gradients.leaves]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each table that has gradients once. Return the result of `closure`, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, (group, gradients) in enumerate(zip(self.param_groups, self._gradients, strict=True)):
            if group["lr"] != self._rates[i]:
                gradients.table.lr = self._rates[i] = group["lr"]
            gradients.apply()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients since the last `step`."""
        for gradients in self._gradients:
            gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' learning rates and the values that schedulers store there; tables keep their own state."""
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.param_groups]
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; raise a ValueError if the number of tables differs."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state is of {len(groups)} tables, this optimiser has {len(self.param_groups)}")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
