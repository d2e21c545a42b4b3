"""Seeds derived from what a draw is for: no two draws share a stream, none depends on the order of calls."""

import hashlib

import torch
from torch import Tensor

__all__ = ["derive_seed", "epoch_order"]


def derive_seed(*key: int | str) -> int:
    """Return a 63-bit seed that is a pure function of ``key``, the same on every machine and Python."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Return the order in which an epoch visits ``n`` data.

    Args:
        n: Number of data.
        seed: Seed of the run.
        epoch: Number of the epoch.
        shuffle: Whether to permute; otherwise the order is ``0 ... n - 1``.

    Returns:
        Positions, shape ``(n,)``, int64, on the CPU: a pure function of ``(n, seed, epoch, shuffle)``, so an
        epoch can be entered in the middle without replaying what came before.
    """
    if not shuffle:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed("order", seed, epoch)))
