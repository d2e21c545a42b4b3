"""The denoisers: start, broadcasting, sizes, what they can tell apart, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.nn import MLPDenoiser, UNetDenoiser
from tests.distributions.tracing import host_syncs

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (2, 5, 4)


@pytest.fixture(params=["MLP", "U-Net"])
def net(request: pytest.FixtureRequest, float64: None) -> nn.Module:
    return MLPDenoiser(SHAPE, hidden=24) if request.param == "MLP" else UNetDenoiser(SHAPE, channels=8)


def awake(net: nn.Module) -> nn.Module:
    """Give the layers that start at zero other weights."""
    for parameter in net.parameters():
        if not parameter.abs().max() > 0:
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def test_starts_at_zero(net: nn.Module) -> None:
    y = torch.randn(3, *SHAPE)
    assert torch.equal(net(y, torch.randn(3)), torch.zeros_like(y))


def test_noise_levels_broadcast(net: nn.Module) -> None:
    awake(net)
    y, gamma = torch.randn(6, 3, *SHAPE), 5 * torch.randn(6, 1)
    wanted = torch.stack([torch.stack([net(y[i, j], gamma[i, 0]) for j in range(3)]) for i in range(6)])
    assert wanted.std() > 0.1
    torch.testing.assert_close(net(y, gamma), wanted)
    torch.testing.assert_close(net(y, gamma.expand(6, 3)), wanted)
    torch.testing.assert_close(net(y[:, 0], gamma[2, 0])[2], wanted[2, 0])
    assert net(torch.zeros(0, *SHAPE), torch.zeros(0)).shape == (0, *SHAPE)


def test_every_noise_level_of_a_schedule_is_another(net: nn.Module) -> None:
    # The paper's features of t in [0, 1] with periods up to 10,000 hardly differ.
    gamma = torch.linspace(-10, 7, 101)
    level: Any = net.level
    features = level(gamma)
    distance = torch.cdist(features, features) + torch.eye(101) * 9
    assert distance.min() > 0.01 * features.std()


def test_gradients_reach_every_parameter(net: nn.Module) -> None:
    awake(net)(torch.randn(4, *SHAPE), torch.randn(4)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias moves all logits of a query alike: it has no effect.
        assert parameter.grad.abs().max() > 0, name


def test_no_host_sync(net: nn.Module) -> None:
    y, gamma = torch.randn(4, *SHAPE), torch.randn(4)
    assert host_syncs(lambda: net(y, gamma).sum().backward()) == []


def test_sizes() -> None:
    def size(net: nn.Module) -> int:
        return sum(parameter.numel() for parameter in net.parameters())

    # What the small configuration of DVP-VAE and the authors' on MNIST have: 360 k and 47 k.
    assert size(MLPDenoiser((1, 7, 7))) == 359_473
    assert size(UNetDenoiser((1, 7, 7))) == 47_441


def test_the_mlp_takes_data_of_any_shape() -> None:
    for shape in ((6,), (2, 3), (1, 2, 3)):
        assert MLPDenoiser(shape, 8, 1)(torch.randn(5, *shape), torch.zeros(())).shape == (5, *shape)


def test_attention_mixes_positions() -> None:
    net = awake(UNetDenoiser((1, 9, 9), channels=16, blocks=1))
    y = torch.randn(1, 9, 9).requires_grad_()
    corner = net(y, torch.zeros(()))[0, 0, 0]
    (gradient,) = torch.autograd.grad(corner, y)
    assert gradient[0, -1, -1].abs() > 0


@pytest.mark.parametrize("kind", [MLPDenoiser, UNetDenoiser])
def test_dropout_acts_in_training_alone(kind: Any) -> None:
    net = awake(kind(SHAPE, 16, dropout=0.5))
    y, gamma = torch.randn(SHAPE), torch.zeros(())

    def twice() -> tuple[Tensor, Tensor]:
        return net(y, gamma), net(y, gamma)

    assert torch.equal(*twice())
    net.train()
    assert not torch.equal(*twice())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"y must have shape \(\*batch, 2, 5, 4\), got \(3, 5, 4\)"):
        UNetDenoiser(SHAPE)(torch.zeros(3, 5, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"y must have shape \(\*batch, 4\), got \(3, 5\)"):
        MLPDenoiser((4,))(torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ValueError, match=r"u_shape must have 3 entries, got \(4,\)"):
        UNetDenoiser((4,))
    with pytest.raises(ValueError, match="hidden must be positive, got 0"):
        MLPDenoiser((4,), hidden=0)
    with pytest.raises(TypeError, match=r"blocks must be an int, got 1\.5"):
        UNetDenoiser(SHAPE, blocks=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        MLPDenoiser((4,), dropout=1)
    with pytest.raises(ValueError, match=r"gamma_range must increase, got \(1.0, 1.0\)"):
        MLPDenoiser((4,), gamma_range=(1.0, 1.0))
