"""TableOptimizer: one update of each table for all gradients since the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hashemb.torch._gradients import Gradients
from hashemb.torch._modules import TableModule

__all__ = ["TableOptimizer"]


class TableOptimizer(torch.optim.Optimizer):
    """Updates tables when told to, as the optimisers of torch do: `zero_grad`, any number of backward passes, `step`.

    All gradients since the last `zero_grad` or `step` become one update of each table, be they of several backward
    passes (accumulation), several look-ups or several modules on one table. Without it each backward pass is an update.

    Parameters
    ----------
    modules : torch.nn.Module or iterable of them
        Every `Embedding` and `EmbeddingBag` in them, at any depth. There is a group in `param_groups` for each table.

    Notes
    -----
    The arithmetic is the table's: its own optimiser, `EmbeddingTable.optimizer`. A group's "lr" starts as `table.lr`
    and, when a scheduler of torch changes it, is set for the table, so for all processes that have it open.

    While gradients wait, `parameters` gives the tensors that carry them: for `torch.nn.utils.clip_grad_norm_`, which
    sees the gradients of the vectors looked up, not sums over repeated keys. `torch.amp.GradScaler` works on them too.

    `step` raises what `EmbeddingTable.update` raises; the gradients of that table then stay until `zero_grad`.

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
            group["params"] = gradients.leaves  # one list: what waits is what clipping and loss scaling find
        self._rates = [group["lr"] for group in self.param_groups]

    def parameters(self) -> list[Tensor]:
        """The tensors whose `.grad` waits for `step`, in the order of their arrival."""
        return [leaf for gradients in self._gradients for leaf in gradients.leaves]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each table that has gradients. Returns what `closure` returns, if there is one."""
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
        """Forgets all gradients since the last `step`."""
        for gradients in self._gradients:
            gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """The groups' learning rates and what schedulers keep there. The tables' states are in their files."""
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.param_groups]
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; `ValueError` for another number of tables."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state is of {len(groups)} tables, this optimiser has {len(self.param_groups)}")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
