"""A normal behind a flow against SciPy and autograd's Jacobian, for every way a flow may be put together."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineCoupling as PyroCoupling
from pyro.distributions.transforms import LowerCholeskyAffine
from scipy import stats
from torch import Tensor, nn
from torch.distributions import transforms as T

from pvae.distributions import AffineCoupling, FlowNormal
from pvae.nn import CouplingNet
from tests.distributions.tracing import assert_traceable, host_syncs

pytestmark = pytest.mark.usefixtures("float64")

MASK = torch.tensor([True, False, True, False])
SCALE = torch.tensor([0.5, 2.0, -1.5, 1.0]).double()
SHIFT = torch.tensor([0.1, -1.0, 0.3, 2.0]).double()


class Counted(nn.Module):
    """A conditioner that counts its calls."""

    def __init__(self, context_dim: int = 0) -> None:
        super().__init__()
        self.net = CouplingNet(4, context_dim, hidden=8)
        nn.init.normal_(self.net.mlp.out.weight, std=0.5)
        self.calls = 0

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.net(z, context)


def couplings(context: Tensor | None = None) -> T.ComposeTransform:
    context_dim = 0 if context is None else context.shape[-1]
    masks = (MASK, ~MASK, MASK)
    return T.ComposeTransform([AffineCoupling(Counted(context_dim), mask, context) for mask in masks])


def lower() -> Tensor:
    return torch.randn(4, 4).tril(-1) + SCALE.abs().diag()


def pyro_coupling() -> PyroCoupling:
    return PyroCoupling(2, nn.Sequential(nn.Linear(2, 4), Halves()))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, -1)
        return first, second


FLOWS: dict[str, Callable[[], Any]] = {
    "couplings": couplings,
    "one coupling": lambda: couplings().parts[0],
    "inverse coupling": lambda: couplings().inv,
    "elementwise": lambda: T.AffineTransform(SHIFT, SCALE),
    "elementwise of vectors": lambda: T.AffineTransform(SHIFT, SCALE, event_dim=1),
    "independent": lambda: T.IndependentTransform(T.AffineTransform(SHIFT, SCALE), 1),
    "composed elementwise": lambda: T.ComposeTransform([T.AffineTransform(SHIFT, SCALE)] * 2),
    "mixed": lambda: T.ComposeTransform(
        [T.AffineTransform(SHIFT, SCALE), couplings(), LowerCholeskyAffine(SHIFT, lower())]
    ),
    "scalar factor": lambda: T.ComposeTransform([T.AffineTransform(0.0, 2.0), couplings().parts[0]]),
    "triangular": lambda: LowerCholeskyAffine(SHIFT, lower()),
    "Pyro's coupling": pyro_coupling,
    "identity": lambda: T.ComposeTransform([]),
}


@pytest.mark.parametrize("kind", FLOWS)
def test_density_is_that_of_the_image_times_the_jacobian(kind: str) -> None:
    flow, loc, scale = FLOWS[kind](), torch.randn(4), 0.3 + torch.rand(4)
    p = FlowNormal(loc, scale, flow)
    z = torch.randn(5, 4)
    log_prob = p.log_prob(z)
    assert log_prob.shape == (5,)
    for i in range(5):
        with torch.no_grad():
            base = stats.norm.logpdf(flow(z[i]).numpy(), loc.numpy(), scale.numpy()).sum()
        jacobian = torch.autograd.functional.jacobian(lambda value: flow(value.clone()), z[i])
        wanted = base + torch.linalg.slogdet(jacobian).logabsdet.item()
        assert log_prob[i].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", FLOWS)
def test_draws_are_the_inverse_image_of_the_bases(kind: str) -> None:
    flow = FLOWS[kind]()
    p = FlowNormal(torch.randn(3, 4), 0.3 + torch.rand(3, 4), flow)
    torch.manual_seed(1)
    z = p.rsample((6,))
    torch.manual_seed(1)
    u = p.loc + p.scale * torch.randn(6, 3, 4)
    assert z.shape == (6, 3, 4)
    torch.testing.assert_close(flow(z.clone()), u, rtol=0, atol=1e-11)
    assert p.sample().shape == (3, 4)
    assert not p.sample().requires_grad


def test_density_calls_each_network_once() -> None:
    flow: Any = couplings()
    FlowNormal(torch.zeros(4), torch.ones(4), flow).log_prob(torch.randn(3, 4))
    assert [part.net.calls for part in flow.parts] == [1, 1, 1]


def test_identity_leaves_the_normal_to_the_bit() -> None:
    flow = T.ComposeTransform(
        [AffineCoupling(CouplingNet(4, 2), m, torch.randn(5, 2)) for m in (MASK, ~MASK)]
    )
    loc, scale, z = torch.randn(5, 4), 0.3 + torch.rand(5, 4), torch.randn(7, 5, 4)
    wanted = dist.Normal(loc, scale).to_event(1)
    p = FlowNormal(loc, scale, flow)
    assert torch.equal(p.log_prob(z), wanted.log_prob(z))
    torch.manual_seed(1)
    draw = p.rsample()
    torch.manual_seed(1)
    assert torch.equal(draw, wanted.rsample())


def test_a_stale_cache_is_not_believed() -> None:
    flow = pyro_coupling()
    p, z = FlowNormal(torch.zeros(4), torch.ones(4), flow), torch.randn(3, 4)
    flow(z)  # now cached under the identity of z
    before = p.log_prob(z)
    with torch.no_grad():
        for parameter in flow.nn.parameters():
            parameter.add_(0.3)
    after = p.log_prob(z)
    assert (after - before).abs().min() > 1e-3
    torch.testing.assert_close(after, p.log_prob(z.clone()))


def test_the_flows_context_and_the_bases_batch_broadcast() -> None:
    context = torch.randn(5, 3)
    flow = couplings(context)
    narrow = FlowNormal(torch.zeros(4), torch.ones(4), flow)
    wide = FlowNormal(torch.zeros(2, 1, 4), torch.ones(4), flow)
    assert (narrow.batch_shape, narrow.event_shape) == ((5,), (4,))
    assert wide.batch_shape == (2, 5)
    assert wide.sample((3,)).shape == (3, 2, 5, 4)
    z = torch.randn(5, 4)
    assert narrow.log_prob(z[0]).shape == (5,)
    torch.testing.assert_close(wide.log_prob(z), narrow.log_prob(z).expand(2, 5))
    for i in range(5):
        alone = FlowNormal(torch.zeros(4), torch.ones(4), _at(flow, context[i]))
        torch.testing.assert_close(alone.log_prob(z[i]), narrow.log_prob(z)[i])


def _at(flow: Any, context: Tensor) -> T.ComposeTransform:
    """The same couplings for one row of the context."""
    return T.ComposeTransform([AffineCoupling(part.net, part.mask, context) for part in flow.parts])


def test_expand_keeps_the_class_and_draws_apart() -> None:
    p = FlowNormal(torch.zeros(5, 4), torch.ones(4), couplings(torch.randn(5, 3)))
    for wide in (p.expand((3, 5)), p.expand((1, 5)).expand((3, 5))):
        assert type(wide) is FlowNormal
        assert (wide.batch_shape, wide.event_shape) == ((3, 5), (4,))
        z = wide.rsample((2,))
        assert z.shape == (2, 3, 5, 4)
        assert not torch.allclose(z[0, 0], z[0, 1])
        torch.testing.assert_close(wide.log_prob(z), p.log_prob(z))
        assert wide._validate_args == p._validate_args

    class Mine(FlowNormal):
        pass

    assert type(Mine(torch.zeros(4), torch.ones(4), couplings()).expand((3,))) is Mine


def test_moments_without_a_closed_form_are_not_stated() -> None:
    p = FlowNormal(torch.zeros(4), torch.ones(4), couplings())
    with pytest.raises(NotImplementedError):
        _ = p.mean
    with pytest.raises(NotImplementedError):
        _ = p.variance


def test_gradients_reach_value_base_and_context() -> None:
    nets = [Counted(3) for _ in range(2)]

    def outputs(z: Tensor, loc: Tensor, raw: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        flow = T.ComposeTransform(
            [AffineCoupling(n, m, context) for n, m in zip(nets, (MASK, ~MASK), strict=True)]
        )
        torch.manual_seed(0)
        p = FlowNormal(loc, raw.exp(), flow, validate_args=False)
        return p.log_prob(z), p.rsample()

    inputs = [torch.randn(2, size, requires_grad=True) for size in (4, 4, 4, 3)]
    assert torch.autograd.gradcheck(outputs, tuple(inputs))


def test_traceable_and_free_of_host_syncs() -> None:
    nets = [Counted(3).float() for _ in range(2)]

    def make(loc: Tensor, scale: Tensor, context: Tensor) -> FlowNormal:
        flow = T.ComposeTransform(
            [AffineCoupling(n, m, context) for n, m in zip(nets, (MASK, ~MASK), strict=True)]
        )
        return FlowNormal(loc, scale, flow)

    def log_prob(z: Tensor, loc: Tensor, scale: Tensor, context: Tensor) -> Tensor:
        return make(loc, scale, context).expand((2, 6)).log_prob(z)

    inputs = [
        (
            torch.randn(2, 6, 4).float(),
            torch.randn(6, 4).float(),
            torch.rand(6, 4).float(),
            torch.randn(6, 3).float(),
        )
        for _ in range(2)
    ]
    for tensor in inputs[0]:
        tensor.requires_grad_()
    assert_traceable(log_prob, *inputs)
    assert host_syncs(lambda: make(*inputs[1][1:]).rsample((3,))) == []


def test_single_precision_stays_single() -> None:
    flow = T.ComposeTransform([AffineCoupling(Counted().float(), MASK)])
    p = FlowNormal(torch.zeros(4).float(), torch.ones(4).float(), flow)
    z = p.sample((3,))
    assert z.dtype == p.log_prob(z).dtype == torch.float32


def test_errors() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"loc must have shape \(\*batch, z_dim\), got \(\)"):
        FlowNormal(torch.tensor(0.0), torch.tensor(1.0), couplings())
    with pytest.raises(ValueError, match="flow must be a bijection of vectors, got AbsTransform"):
        FlowNormal(zero, one, T.AbsTransform())
    with pytest.raises(ValueError, match="flow must be a bijection of vectors, got AffineTransform"):
        FlowNormal(zero, one, T.AffineTransform(0.0, 1.0, event_dim=2))
    with pytest.raises(ValueError, match=r"z must have event_shape \(4,\), got shape \(3,\)"):
        FlowNormal(torch.zeros(3), torch.ones(3), couplings())
    with pytest.raises(ValueError, match="Expected parameter scale"):
        FlowNormal(zero, -one, couplings())
    with pytest.raises(ValueError, match="Expected value argument"):
        FlowNormal(zero, one, couplings()).log_prob(torch.full((4,), math.nan))
    with pytest.raises(ValueError, match="right-most size"):
        FlowNormal(zero, one, couplings()).log_prob(torch.zeros(3))
