"""Fully connected networks: the formula, the initialisation, leading dimensions, errors."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch.nn import functional as F

from pvae.nn import MLP, GatedLinear
from tests.distributions.tracing import assert_traceable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "elu": F.elu,
    "gelu": F.gelu,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name: str) -> None:
    mlp = MLP(3, 2, hidden=(4, 5), activation=name).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = mlp.parameters()
    f = ACTIVATIONS[name]
    expected = f(f(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(mlp(x), expected)


def test_no_hidden_layer_is_a_linear_map() -> None:
    mlp = MLP(3, 2, hidden=()).double()
    weight, bias = mlp.parameters()
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), x @ weight.T + bias)


def test_gate() -> None:
    layer = GatedLinear(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in layer.parameters())
    value, gate = weight[:4] @ x.numpy().T, weight[4:] @ x.numpy().T
    expected = (value + bias[:4, None]) * special.expit(gate + bias[4:, None])
    torch.testing.assert_close(layer(x).detach(), torch.from_numpy(expected.T.copy()))


def test_gated_weights_start_as_in_the_vampprior() -> None:
    mlp = MLP(784, 300, hidden=(300, 300), gated=True)
    weights = [p for name, p in mlp.named_parameters() if name.endswith("weight")]
    assert [w.shape for w in weights] == [(600, 784), (600, 300), (300, 300)]
    for weight in weights:
        draws = weight.detach().flatten()[:5000].double().numpy()
        assert stats.kstest(draws, stats.norm(scale=math.sqrt(2 / weight.shape[1])).cdf).pvalue > 1e-3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(gated: bool, batch: tuple[int, ...]) -> None:
    mlp = MLP(5, 2, hidden=(4,), gated=gated).double()
    x = torch.randn(*batch, 5, dtype=torch.float64)
    y = mlp(x)
    assert y.shape == (*batch, 2)
    torch.testing.assert_close(y.reshape(-1, 2), mlp(x.reshape(-1, 5)))


@pytest.mark.parametrize("gated", [False, True])
def test_traceable(gated: bool) -> None:
    mlp = MLP(5, 2, hidden=(4,), gated=gated)
    assert_traceable(mlp, (torch.randn(3, 5, requires_grad=True),), (torch.randn(3, 5),))


def test_state_dict_round_trip_and_deepcopy() -> None:
    mlp, other = MLP(3, 2, gated=True), MLP(3, 2, gated=True)
    x = torch.randn(4, 3)
    assert not torch.equal(mlp(x), other(x))
    twin = copy.deepcopy(mlp)
    other.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp(x), other(x))
    assert torch.equal(mlp(x), twin(x))
    assert all(p is not q for p, q in zip(mlp.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "in_dim must be positive, got 0"),
        ({"in_dim": 2.0}, TypeError, "in_dim must be an int, got 2.0"),
        ({"out_dim": -1}, ValueError, "out_dim must be positive, got -1"),
        ({"out_dim": True}, TypeError, "out_dim must be an int, got True"),
        ({"hidden": 64}, TypeError, "hidden must be a sequence of ints, got 64"),
        ({"hidden": "64"}, TypeError, "hidden must be a sequence of ints, got '64'"),
        ({"hidden": (64, 0)}, ValueError, r"hidden must hold positive sizes, got \(64, 0\)"),
        ({"activation": "swish"}, ValueError, "activation must be one of relu, .* softplus, got 'swish'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP(**({"in_dim": 3, "out_dim": 2} | arguments))  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 3\), got \(4, 5\)"):
        MLP(3, 2)(torch.zeros(4, 5))
