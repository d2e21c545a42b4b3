"""What networks really compute, whether a program, a cut of one or a recorded graph runs them."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Products"]


class Products(TorchDispatchMode):
    """Counts the rows that go forwards through layers, each a linear one or a convolution with a bias.

    Args:
        *layers: The layers; ``counts[i]`` is the number of rows of the i-th.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.counts = [0] * len(layers)
        self._weights = [layer.weight.data_ptr() for layer in layers]  # type: ignore[operator]

    def __getitem__(self, layer: int) -> int:
        return self.counts[layer]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.addmm.default, aten.convolution.default):
            data, weight = (args[1], args[2]) if func is aten.addmm.default else (args[0], args[1])
            for number, pointer in enumerate(self._weights):
                if weight.data_ptr() == pointer:
                    self.counts[number] += len(data)
        return func(*args, **(kwargs or {}))
