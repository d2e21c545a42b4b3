"""The coupling's network: start, broadcasting, errors."""

import pytest
import torch

from pvae.nn import CouplingNet


def awake(net: CouplingNet) -> CouplingNet:
    """Give the last layer weights other than zero."""
    torch.nn.init.normal_(net.mlp.out.weight)
    return net.double()


def test_starts_at_zero() -> None:
    net = CouplingNet(4, context_dim=3)
    for out in net(torch.randn(5, 4), torch.randn(5, 3)):
        assert torch.equal(out, torch.zeros(5, 4))


def test_context_and_latents_broadcast_both_ways() -> None:
    net = awake(CouplingNet(4, context_dim=3))
    z, context = torch.randn(7, 1, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    pairs = zip(net(z, context), net(z.expand(7, 5, 4), context.expand(7, 5, 3)), strict=True)
    for broadcast, expanded in pairs:
        assert broadcast.shape == (7, 5, 4)
        torch.testing.assert_close(broadcast, expanded)


def test_is_one_network_of_the_concatenation() -> None:
    net = awake(CouplingNet(2, context_dim=3, hidden=5, activation="tanh"))
    z, context = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    assert net.from_context is not None
    weight = torch.cat([net.from_z.weight, net.from_context.weight], dim=1)
    h = torch.tanh(torch.cat([z, context], dim=1) @ weight.T + net.from_z.bias)
    middle, bias, last, last_bias = net.mlp.parameters()
    expected = torch.tanh(h @ middle.T + bias) @ last.T + last_bias
    torch.testing.assert_close(torch.cat(net(z, context), dim=1), expected)


def test_without_context() -> None:
    shift, log_scale = awake(CouplingNet(2))(torch.zeros(0, 2, dtype=torch.float64))
    assert shift.shape == log_scale.shape == (0, 2)


def test_gradients_reach_every_parameter() -> None:
    net = awake(CouplingNet(4, context_dim=3))
    torch.cat(net(torch.randn(5, 4).double(), torch.randn(5, 3).double())).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_errors() -> None:
    with pytest.raises(ValueError, match="context must have context_dim = 3 entries, got None"):
        CouplingNet(2, 3)(torch.zeros(2))
    with pytest.raises(ValueError, match=r"context must have context_dim = 0 entries, got \(3,\)"):
        CouplingNet(2)(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"context must have shape \(\*batch, 3\), got \(4,\)"):
        CouplingNet(2, 3)(torch.zeros(2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"z must have shape \(\*batch, 2\), got \(5,\)"):
        CouplingNet(2)(torch.zeros(5))
    with pytest.raises(ValueError, match="context_dim must be positive, got -1"):
        CouplingNet(2, -1)
