"""Activations by name."""

from torch import nn

__all__ = ["activation_layer"]

# F.glu is left out on purpose: it cannot be differentiated in reverse over forward mode (see gated.py).
_LAYERS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def activation_layer(activation: str) -> nn.Module:
    """Return a new activation layer.

    Args:
        activation: One of relu, tanh, silu, elu, gelu, softplus.

    Raises:
        ValueError: If the name is not one of these.
    """
    if activation not in _LAYERS:
        raise ValueError(f"activation must be one of {', '.join(_LAYERS)}, got {activation!r}")
    return _LAYERS[activation]()
