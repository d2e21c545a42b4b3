"""Which networks are refused for their derivatives, and that every encoder of ours passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.nn import (
    ConvEncoder,
    Encoder,
    LabelEmbedding,
    LabelSpace,
    MLPEncoder,
    WhitenedEncoder,
    check_forward_mode,
)
from tests.nn.test_encoder import ENCODERS

pytestmark = pytest.mark.usefixtures("float64")

X_SHAPE = (1, 3, 4)


def whitened() -> WhitenedEncoder:
    encoder = WhitenedEncoder(MLPEncoder(X_SHAPE, 2, (6,), "silu"))
    encoder.set_(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    return encoder


def labels(kind: Any) -> LabelEmbedding:
    return LabelEmbedding(LabelSpace(kind, 3), 4)


EVERY: dict[str, tuple[Callable[[], Encoder], Tensor | None]] = {
    **{name: (make, None) for name, make in ENCODERS.items()},
    "whitened": (whitened, None),
    "mlp-class": (lambda: MLPEncoder(X_SHAPE, 2, (6,), "silu", labels=labels("class")), torch.tensor([0, 2])),
    "conv-attributes": (
        lambda: ConvEncoder(X_SHAPE, 2, (4,), 5, labels=labels("attributes")),
        torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).double(),
    ),
}


@pytest.mark.parametrize("kind", EVERY)
def test_every_encoder_of_ours_passes_and_its_location_is_that_of_both_heads(kind: str) -> None:
    make, y = EVERY[kind]
    encoder = make().double()
    check_forward_mode("encoder", encoder, lambda x: encoder.location(x, y), X_SHAPE)
    x = torch.randn(2, *X_SHAPE)
    torch.testing.assert_close(encoder.location(x, y), encoder(x, y)[0], rtol=1e-12, atol=1e-12)
    if y is not None:
        with pytest.raises(ValueError, match="y must be given"):
            encoder.location(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(5), r"net must not hold LayerNorm \(layer '1'\): PyTorch's gradient .* silently wrong"),
        (nn.BatchNorm1d(5), r"net must not hold BatchNorm1d \(layer '1'\): in training"),
        (nn.InstanceNorm1d(5), "net must not hold InstanceNorm1d"),
        (nn.Dropout(0.1), "net must not hold Dropout .* random mask"),
        (nn.GLU(), "net must not hold GLU"),
    ],
)
def test_layers_are_refused_by_name(layer: nn.Module, message: str) -> None:
    net = nn.Sequential(nn.Linear(3, 5), layer)
    with pytest.raises(ValueError, match=message):
        check_forward_mode("net", net)


def test_where_no_gradient_is_taken_layer_norm_is_right() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2))
    check_forward_mode("net", net, net, (3,), reverse=False)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        check_forward_mode("net", nn.BatchNorm1d(5), reverse=False)


class Hidden(nn.Module):
    """Layer normalisation that no list of modules shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.linear(x).tanh(), (5,))


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WithoutForwardMode.apply(x)


def test_a_wrong_gradient_is_found_where_no_layer_tells() -> None:
    net = nn.Sequential(Hidden(), nn.Linear(5, 2))
    with pytest.raises(
        ValueError, match=r"net must have a right gradient .* differ by [0-9.e+-]+ of its size"
    ):
        check_forward_mode("net", net, net, (3,))


def test_a_layer_without_forward_mode_is_named() -> None:
    net = nn.Sequential(nn.Linear(3, 5), Opaque(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="net must allow forward-mode derivatives, but layer '1' fails"):
        check_forward_mode("net", net, net, (3,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_check_draws_from_a_generator_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.SiLU())
    before = torch.get_rng_state()
    check_forward_mode("net", net, net, (3,))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters())
