"""What an optimiser remembers, as named tensors that a file can hold, and back after a check."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["moments", "restore_moments"]

_PREFIX = "optimizer."
# Of torch's optimisers: what has the shape of its parameter. Fused steps run over it without a look.
_SHAPED = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size"),
}


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name the state of an optimiser: ``optimizer.<number of the parameter>.<key>``."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{_PREFIX}{i}.{key}": torch.as_tensor(value) for i, of in state.items() for key, value in of.items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up what :func:`moments` returned; other names are passed over.

    Raises:
        RuntimeError: If it is of other parameters, before anything is changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIX):
            continue
        number, _, key = name.removeprefix(_PREFIX).partition(".")
        if not key or not number.isdecimal() or int(number) >= len(parameters):
            raise RuntimeError(f"the optimiser has {len(parameters)} parameters, got a state {name}")
        wanted = parameters[int(number)].shape if key in _SHAPED else torch.Size(())
        if (key in _SHAPED or key == "step") and tensor.shape != wanted:
            raise RuntimeError(f"{name} must have shape {tuple(wanted)}, got {tuple(tensor.shape)}")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
