"""Data in blocks that are seeded one by one, so that no estimate depends on how the data are batched."""

import torch
from torch import Tensor

__all__ = ["BLOCK", "BLOCK_NUMBERS", "PASS_ROWS", "block_of", "block_seed", "rows_per_pass"]

# Data whose draws come from one seeding. Fixed, as the draws depend on it.
BLOCK = 32
# Most latent numbers drawn in one block (64 MiB of floats); a larger latent has smaller blocks.
BLOCK_NUMBERS = 2**24
# Numbers of x in one pass of the decoder: 1,000 to 5,000 rows of 784 are fastest on a CPU.
_PASS_NUMBERS = {"cpu": 2**21, "gpu": 2**25}
PASS_ROWS = {"cpu": 4096, "gpu": 2**16}


def block_of(x: Tensor, y: Tensor | None, start: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Cut ``size`` data, repeating the last one past the end: the draws of a block then never depend on N."""
    index = torch.arange(start, start + size, device=x.device).clamp_(max=len(x) - 1)
    return x[index], None if y is None else y[index]


def block_seed(seed: int, block: int) -> int:
    """Give each of a million blocks a seed of its own."""
    return (seed * 1_000_003 + block) % 2**63


def rows_per_pass(x: Tensor) -> int:
    """How many rows like those of ``x`` one pass of the decoder takes, within a few megabytes."""
    kind = "cpu" if x.device.type == "cpu" else "gpu"
    return max(1, min(PASS_ROWS[kind], _PASS_NUMBERS[kind] // x[0].numel()))
