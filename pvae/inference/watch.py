"""Numbers gone wrong: gradient norms of the steps since the last look, and the state that was sound then."""

import torch
from torch import Tensor, nn

from .program import parameters_of

__all__ = ["Watch"]


class Watch:
    """Watches gradients and parameters of one run; nothing here waits for the device but :meth:`finding`.

    A norm per parameter is written down in each step: a handful of operations, which a gradient that is
    clipped needs anyway. They are looked at when the losses are, so what is wrong is known by its parameter
    and its step, also where the loss of that step was finite (a square root at zero). A norm that overflows
    counts: Adam keeps the squares of gradients, and past that never moves the parameter again.

    It keeps one copy of all parameters and buffers, made at each look that found nothing.

    Args:
        model: The model program.
        guide: The guide program.
        window: Number of steps between two looks, at most.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, window: int) -> None:
        named = parameters_of(model, guide)
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        held = {id(t): t for m in (model, guide) for t in (*m.parameters(), *m.buffers())}
        self._held = list(held.values())
        self._kept: list[Tensor] = []
        first = self._parameters[0]
        self._norms = torch.zeros(window, len(named), device=first.device, dtype=first.dtype)
        self._zero = torch.zeros((), device=first.device, dtype=first.dtype)

    def note(self, row: int | Tensor) -> Tensor:
        """Write down the norm of each gradient as those of a step since the last look.

        Args:
            row: Number of the step since then, as a tensor of shape ``(1,)`` where it must not be frozen.

        Returns:
            The norms of the gradients that there are, shape ``(n,)``; a parameter may have none.
        """
        gradients = [p.grad for p in self._parameters]
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        if isinstance(row, int) and len(norms) == len(gradients):
            return torch.stack(norms, out=self._norms[row])
        found = iter(norms)
        whole = torch.stack([self._zero if g is None else next(found) for g in gradients])
        if isinstance(row, int):
            self._norms[row] = whole
        else:
            self._norms.index_copy_(0, row, whole.unsqueeze(0))
        return torch.stack(norms)

    def finding(self, rows: int) -> tuple[int, str] | None:
        """Look at the first ``rows`` steps.

        Returns:
            The first step with a norm that is not finite, and what is to be said about it; ``None`` if there
            is none.
        """
        norms = self._norms[:rows].cpu()
        bad = ~norms.isfinite()
        if not bad.any():
            return None
        row = int(bad.any(1).nonzero()[0])
        columns = bad[row].nonzero().flatten().tolist()
        more = f" (and {len(columns) - 1} more)" if len(columns) > 1 else ""
        return row, f"the gradient norm of {self._names[columns[0]]}{more}"

    def unsound(self) -> str | None:
        """Name a parameter that is not finite now, if there is one."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self._parameters]))
        for column in (~norms.isfinite()).nonzero().flatten().tolist():
            # The norm of large numbers may overflow where the numbers do not.
            if not bool(self._parameters[column].isfinite().all()):
                return self._names[column]
        return None

    def keep(self) -> None:
        """Keep a copy of parameters and buffers as they are."""
        if not self._kept:
            self._kept = [torch.empty_like(tensor) for tensor in self._held]
        with torch.no_grad():
            torch._foreach_copy_(self._kept, self._held)

    @property
    def keeps(self) -> bool:
        """Whether there is a copy."""
        return bool(self._kept)

    def put_back(self) -> None:
        """Copy what was kept, if anything was, into the programs."""
        if self._kept:
            with torch.no_grad():
                torch._foreach_copy_(self._held, self._kept)
