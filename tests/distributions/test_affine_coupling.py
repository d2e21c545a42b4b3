"""The coupling against autograd, quadrature and its own inverse; and the traps of cached transforms."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineCoupling as PyroCoupling
from torch import Tensor

from pvae.distributions import AffineCoupling
from pvae.nn import CouplingNet
from tests.distributions.tracing import assert_traceable

MASK = torch.tensor([True, False, True, False, False])


def awake_net(z_dim: int = 5, context_dim: int = 0, size: float = 0.5) -> CouplingNet:
    net = CouplingNet(z_dim, context_dim, hidden=8).double()
    torch.nn.init.normal_(net.mlp.out.weight, std=size)
    torch.nn.init.normal_(net.mlp.out.bias, std=size)
    return net


@pytest.mark.parametrize("bound", [2.0, 0.1, None])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_log_det_equals_the_autograd_jacobian(bound: float | None, context_dim: int) -> None:
    context = torch.randn(context_dim, dtype=torch.float64) if context_dim else None
    coupling = AffineCoupling(awake_net(context_dim=context_dim), MASK, context, bound=bound)
    for z in torch.randn(5, 5, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(coupling, z)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        log_det = coupling.log_abs_det_jacobian(z, coupling(z))
        assert log_det.shape == ()
        torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-12)
        assert torch.equal(coupling(z)[MASK], z[MASK])


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (0,)])
def test_inverse(shape: tuple[int, ...]) -> None:
    coupling = AffineCoupling(awake_net(), MASK)
    z = torch.randn(*shape, 5, dtype=torch.float64)
    torch.testing.assert_close(coupling.inv(coupling(z)), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(coupling(coupling.inv(z)), z, rtol=0, atol=1e-12)
    y = coupling(z)
    log_det = coupling.log_abs_det_jacobian(z, y)
    assert log_det.shape == shape
    torch.testing.assert_close(coupling.inv.log_abs_det_jacobian(y, z), -log_det)


def test_equals_pyros_coupling_on_a_contiguous_mask() -> None:
    net = awake_net(4)

    def hypernet(kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = net(torch.cat([kept, torch.zeros_like(kept)], -1))
        return shift[..., 2:], log_scale[..., 2:]

    theirs = PyroCoupling(2, hypernet, log_scale_min_clip=-50.0, log_scale_max_clip=50.0)
    ours = AffineCoupling(net, torch.tensor([True, True, False, False]), bound=None)
    z = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs(z))
    torch.testing.assert_close(
        ours.log_abs_det_jacobian(z, ours(z)), theirs.log_abs_det_jacobian(z, theirs(z))
    )


def test_starts_as_the_identity() -> None:
    coupling = AffineCoupling(CouplingNet(5, 3), MASK, torch.randn(4, 3))
    z = torch.randn(4, 5)
    assert torch.equal(coupling(z), z)
    assert torch.equal(coupling.log_abs_det_jacobian(z, z), torch.zeros(4))


def test_density_integrates_to_one_and_samples_follow_it() -> None:
    nets = [awake_net(2, size=0.3), awake_net(2, size=0.3)]
    masks = torch.tensor([[True, False], [False, True]])
    base = dist.Normal(torch.zeros(2).double(), torch.ones(2).double()).to_event(1)
    flow = dist.TransformedDistribution(
        base, [AffineCoupling(n, m) for n, m in zip(nets, masks, strict=True)]
    )
    axis = torch.linspace(-20, 20, 501, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
        z = flow.sample(torch.Size([20000]))
    cell = (axis[1] - axis[0]).item() ** 2
    assert density.sum().item() * cell == pytest.approx(1.0, abs=1e-6)
    moment = (density.unsqueeze(-1) * grid).sum((0, 1)) * cell
    second = (density.unsqueeze(-1) * grid.square()).sum((0, 1)) * cell
    error = (second - moment.square()).sqrt() / math.sqrt(20000)
    assert ((z.mean(0) - moment).abs() < 4 * error).all()
    assert (z.square().mean(0) / second - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("z_batch", "context_batch"), [((7, 4), (4,)), ((4,), (7, 4)), ((), (4,)), ((4,), ()), ((7, 1), (1, 4))]
)
def test_latents_and_context_broadcast_both_ways(
    z_batch: tuple[int, ...], context_batch: tuple[int, ...]
) -> None:
    net = awake_net(context_dim=3)
    z, context = torch.randn(*z_batch, 5).double(), torch.randn(*context_batch, 3).double()
    batch = torch.broadcast_shapes(z_batch, context_batch)
    coupling = AffineCoupling(net, MASK, context)
    expanded = AffineCoupling(net, MASK, context.expand(*batch, 3))
    wide = z.expand(*batch, 5)
    y = coupling(z)
    assert y.shape == coupling.forward_shape(z.shape) == (*batch, 5)
    torch.testing.assert_close(y, expanded(wide))
    log_det = coupling.log_abs_det_jacobian(z, y)
    assert log_det.shape == batch
    torch.testing.assert_close(log_det, expanded.log_abs_det_jacobian(wide, y))
    torch.testing.assert_close(coupling.inv(y), wide)


def test_transformed_distribution_has_the_contexts_batch_shape() -> None:
    base = dist.Normal(torch.zeros(5).double(), torch.ones(5).double()).to_event(1)
    context = torch.randn(4, 3).double()
    flow = dist.TransformedDistribution(base, [AffineCoupling(awake_net(context_dim=3), MASK, context)])
    assert (flow.batch_shape, flow.event_shape) == ((4,), (5,))
    z = flow.rsample(torch.Size([6]))
    assert z.shape == (6, 4, 5)
    assert flow.log_prob(z).shape == (6, 4)
    assert flow.expand(torch.Size([2, 4])).sample().shape == (2, 4, 5)


def test_nothing_is_cached() -> None:
    # A cache keyed by the identity of z would return the value before the step.
    net = awake_net()
    coupling = AffineCoupling(net, MASK)
    z = torch.randn(3, 5).double()
    before, before_det = coupling(z), coupling.log_abs_det_jacobian(z, z)
    with torch.no_grad():
        net.mlp.out.bias.add_(1.0)
    assert not torch.allclose(coupling(z), before)
    assert not torch.allclose(coupling.log_abs_det_jacobian(z, z), before_det)
    torch.testing.assert_close(coupling.inv(coupling(z)), z)


def test_with_cache_and_composition() -> None:
    coupling = AffineCoupling(awake_net(), MASK)
    assert coupling.with_cache() is coupling
    z = torch.randn(3, 5).double()
    composed = torch.distributions.ComposeTransform([coupling, coupling.inv]).with_cache()
    torch.testing.assert_close(composed(z), z)


def test_deepcopy_has_parameters_of_its_own() -> None:
    net = awake_net(context_dim=3)
    context = net.from_z(torch.randn(4, 5).double())[:, :3]
    assert context.requires_grad
    assert not context.is_leaf
    coupling = AffineCoupling(net, MASK, context)
    z = torch.randn(4, 5).double()
    inverse = coupling.inv  # held: the transform keeps a weak reference to it
    twin = copy.deepcopy(coupling)
    assert torch.equal(twin(z), coupling(z))
    with torch.no_grad():
        net.mlp.out.bias.add_(1.0)
    assert not torch.allclose(twin(z), coupling(z))
    torch.testing.assert_close(twin.inv(twin(z)), z)
    torch.testing.assert_close(inverse(coupling(z)), z)


def test_log_scale_is_bounded() -> None:
    net = awake_net(size=1e6)
    z = torch.randn(10, 5).double()
    log_det = AffineCoupling(net, MASK, bound=2.0).log_abs_det_jacobian(z, z)
    assert (log_det.abs() <= 3 * 2.0).all()
    assert log_det.abs().max() > 3 * 0.5
    unbounded = AffineCoupling(net, MASK, bound=None).log_abs_det_jacobian(z, z)
    assert unbounded.abs().max() > 1e3


def test_gradients() -> None:
    net = awake_net(context_dim=3)
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def outputs(z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coupling = AffineCoupling(net, MASK, context)
        return coupling(z), coupling.inv(z), coupling.log_abs_det_jacobian(z, z)

    assert torch.autograd.gradcheck(outputs, (z, context))


def test_traceable() -> None:
    net = awake_net(context_dim=3).float()

    def log_prob(z: Tensor, loc: Tensor, context: Tensor) -> Tensor:
        base = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
        couplings = [AffineCoupling(net, MASK, context), AffineCoupling(net, ~MASK, context)]
        return dist.TransformedDistribution(base, couplings).log_prob(z)

    inputs = [(torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3)) for _ in range(2)]
    for tensor in inputs[0]:
        tensor.requires_grad_()
    assert_traceable(log_prob, *inputs)


def test_errors() -> None:
    net = awake_net()
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch\.float32"):
        AffineCoupling(net, torch.ones(5))
    with pytest.raises(ValueError, match=r"mask must have shape \(z_dim,\), got \(1, 5\)"):
        AffineCoupling(net, MASK.unsqueeze(0))
    with pytest.raises(ValueError, match=r"bound must be positive or None, got 0\.0"):
        AffineCoupling(net, MASK, bound=0.0)
    with pytest.raises(ValueError, match=r"z must have event_shape \(5,\), got shape \(3, 4\)"):
        AffineCoupling(net, MASK).forward_shape(torch.Size([3, 4]))
