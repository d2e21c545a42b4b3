"""All that an evaluation must leave as it was."""

import random
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

__all__ = ["everything"]


def everything(*programs: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """Parameters, gradients, flags, optimiser, param store and generators, in what ``==`` compares."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    parameters = [p for program in programs for p in program.parameters()]
    buffers = [b.tolist() for program in programs for b in program.buffers()]
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return [
        [p.detach().numpy().tobytes() for p in parameters],
        [None if p.grad is None else p.grad.numpy().tobytes() for p in parameters],
        [p.requires_grad for p in parameters],
        buffers,
        [m.training for program in programs for m in program.modules()],
        {k: {n: t.tolist() for n, t in entries.items()} for k, entries in state.items()},
        {k: v.tolist() for k, v in pyro.get_param_store().items()},
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        random.getstate(),
        pyro.settings.get("validate_poutine"),
        torch.is_grad_enabled(),
    ]
