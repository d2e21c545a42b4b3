"""The coupling flow against autograd, its inverse, and the flows of Pyro and zuko with its weights."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform, ConditionalAffineCoupling
from pyro.nn import ConditionalDenseNN
from torch import Tensor, nn

from pvae.distributions import AffineCoupling, FlowNormal
from pvae.priors import CouplingFlow, ZukoFlow
from tests.distributions.tracing import assert_traceable

pytestmark = pytest.mark.usefixtures("float64")


def awake(flow: CouplingFlow, size: float = 0.4) -> CouplingFlow:
    net: Any
    for net in flow.nets:
        nn.init.normal_(net.mlp.out.weight, std=size)
        nn.init.normal_(net.mlp.out.bias, std=size)
    return flow


def log_det(flow: CouplingFlow, context: Tensor | None, z: Tensor) -> Tensor:
    transform = flow.condition(context)
    return transform.log_abs_det_jacobian(z, transform(z))


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "literal": {"num_flows": 1, "hidden": 16, "bound": None, "masks": "halves"},
    "three halves": {"num_flows": 3, "masks": "halves", "bound": 0.5},
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("z_dim", "context_dim"), [(2, 3), (5, 3), (4, 0)])
def test_inverse_and_log_determinant(preset: str, z_dim: int, context_dim: int) -> None:
    flow = awake(CouplingFlow(z_dim, context_dim=context_dim, **PRESETS[preset]))
    contexts = torch.randn(3, context_dim) if context_dim else [None] * 3
    for context in contexts:
        transform = flow.condition(context)
        z = torch.randn(4, z_dim)
        # Clones, which no cache knows.
        torch.testing.assert_close(transform.inv(transform(z).clone()), z, rtol=0, atol=1e-12)
        torch.testing.assert_close(transform(transform.inv(z).clone()), z, rtol=0, atol=1e-12)
        assert not torch.allclose(transform(z), z, atol=1e-3)
        ours = log_det(flow, context, z)
        for i in range(4):
            jacobian = torch.autograd.functional.jacobian(transform, z[i])
            torch.testing.assert_close(ours[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-12)


def test_the_context_matters_and_may_be_left_out() -> None:
    flow, z = awake(CouplingFlow(4, context_dim=3)), torch.randn(4)
    first, second = (flow.condition(torch.randn(3))(z) for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    assert awake(CouplingFlow(4)).condition(None)(z).shape == (4,)


def test_starts_as_the_identity_to_the_bit() -> None:
    flow, z = CouplingFlow(5, context_dim=3), torch.randn(6, 5)
    context = torch.randn(6, 3)
    assert torch.equal(flow.condition(context)(z), z)
    assert torch.equal(flow.condition(context).inv(z), z)
    assert torch.equal(log_det(flow, context, z), torch.zeros(6))
    p = FlowNormal(torch.zeros(6, 5), torch.ones(6, 5), flow.condition(context))
    assert torch.equal(p.log_prob(z), dist.Normal(torch.zeros(5), 1.0).to_event(1).log_prob(z))


@pytest.mark.parametrize(
    ("masks", "wanted"),
    [
        ("alternating", [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]),
        ("halves", [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]),
    ],
)
def test_masks_take_turns(masks: Any, wanted: list[list[int]]) -> None:
    flow = awake(CouplingFlow(5, num_flows=3, masks=masks))
    assert flow.masks.int().tolist() == wanted
    z = torch.randn(5)
    for part, kept in zip(flow.condition(None).parts, wanted, strict=True):
        assert isinstance(part, AffineCoupling)
        assert (part(z) == z).int().tolist() == kept


def test_bound_is_approached_and_none_is_none() -> None:
    z = torch.randn(200, 4)
    bounded = log_det(awake(CouplingFlow(4, num_flows=1, bound=0.7), 50.0), None, z)
    assert 0.99 * 2 * 0.7 < bounded.abs().max() <= 2 * 0.7
    assert log_det(awake(CouplingFlow(4, num_flows=1, bound=None), 50.0), None, z).abs().max() > 10


@pytest.mark.parametrize(
    ("z_batch", "context_batch"),
    [((3, 7), (7,)), ((7,), (3, 7)), ((), (7,)), ((7,), ()), ((3, 1), (1, 7)), ((1,), (1,)), ((0,), ())],
)
def test_latents_and_context_broadcast_both_ways(
    z_batch: tuple[int, ...], context_batch: tuple[int, ...]
) -> None:
    flow = awake(CouplingFlow(5, context_dim=3))
    z, context = torch.randn(*z_batch, 5), torch.randn(*context_batch, 3)
    batch = torch.broadcast_shapes(z_batch, context_batch)
    wide, same = z.expand(*batch, 5), flow.condition(context.expand(*batch, 3))
    u = flow.condition(context)(z)
    assert u.shape == (*batch, 5)
    torch.testing.assert_close(u, same(wide))
    torch.testing.assert_close(flow.condition(context).inv(z), same.inv(wide))
    torch.testing.assert_close(log_det(flow, context, z), log_det(flow, context.expand(*batch, 3), wide))


def test_equals_pyros_conditional_coupling() -> None:
    flow = awake(CouplingFlow(5, 1, 3, hidden=8, bound=None, masks="halves"), 0.2)
    net: Any = flow.nets[0]
    theirs = ConditionalDenseNN(2, 3, [8, 8], param_dims=[3, 3], nonlinearity=nn.SiLU())
    kept, moved = slice(0, 2), [2, 3, 4, 7, 8, 9]
    with torch.no_grad():
        first, second, last = theirs.layers
        first.weight.copy_(torch.cat([net.from_context.weight, net.from_z.weight[:, kept]], -1))
        first.bias.copy_(net.from_z.bias)
        second.load_state_dict(net.mlp.hidden[0].state_dict())
        last.weight.copy_(net.mlp.out.weight[moved])
        last.bias.copy_(net.mlp.out.bias[moved])
    z, context = torch.randn(6, 5), torch.randn(6, 3)
    pyros = ConditionalAffineCoupling(2, theirs).condition(context)
    torch.testing.assert_close(flow.condition(context)(z), pyros(z), rtol=0, atol=1e-13)
    base = dist.Normal(torch.randn(6, 5), 0.3 + torch.rand(6, 5))
    wanted = dist.TransformedDistribution(base.to_event(1), [pyros.inv]).log_prob(z)
    for transform in (flow.condition(context), ConditionalAffineCoupling(2, theirs).condition(context)):
        ours = FlowNormal(base.loc, base.scale, transform).log_prob(z)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("z_dim", "bound"), [(4, 2.0), (5, 2.0), (5, None)])
def test_equals_zukos_coupling_flow(z_dim: int, bound: float | None) -> None:
    def univariate(shift: Tensor, raw: Tensor) -> AffineTransform:
        return AffineTransform(shift, (raw if bound is None else bound * torch.tanh(raw / bound)).exp())

    flow = awake(CouplingFlow(z_dim, 4, 3, hidden=8, bound=bound), 0.2)
    theirs = ZukoFlow(
        z_dim, 3, "NICE", transforms=4, hidden=(8, 8), activation=nn.SiLU, univariate=univariate
    )
    import zuko  # after ZukoFlow, which keeps torch as it is

    for ours, mask, layer in zip(flow.nets, flow.masks, theirs.transform.transforms, strict=True):
        assert torch.equal(layer.mask, mask)
        net: Any = ours
        moved = (~mask).nonzero().squeeze(-1)
        # Theirs has shift and log-scale of one coordinate side by side, ours all shifts first.
        rows = torch.stack([moved, moved + z_dim], -1).flatten()
        with torch.no_grad():
            linear = [m for m in layer.hyper if hasattr(m, "weight")]
            linear[0].weight.copy_(torch.cat([net.from_z.weight[:, mask], net.from_context.weight], -1))
            linear[0].bias.copy_(net.from_z.bias)
            linear[1].load_state_dict(net.mlp.hidden[0].state_dict())
            linear[2].weight.copy_(net.mlp.out.weight[rows])
            linear[2].bias.copy_(net.mlp.out.bias[rows])
    z, context = torch.randn(6, z_dim), torch.randn(6, 3)
    loc, scale = torch.randn(6, z_dim), 0.3 + torch.rand(6, z_dim)
    base = zuko.distributions.DiagNormal(loc, scale)
    wanted = zuko.distributions.NormalizingFlow(theirs.transform(context), base).log_prob(z)
    for transform in (flow.condition(context), theirs.condition(context)):
        torch.testing.assert_close(FlowNormal(loc, scale, transform).log_prob(z), wanted, rtol=0, atol=1e-12)


def test_nothing_is_cached() -> None:
    flow, z = awake(CouplingFlow(4)), torch.randn(3, 4)
    p = FlowNormal(torch.zeros(4), torch.ones(4), flow.condition(None))
    before = p.log_prob(z)
    assert torch.equal(p.log_prob(z), before)
    awake(flow, 0.5)
    assert (p.log_prob(z) - before).abs().min() > 1e-6
    torch.testing.assert_close(p.log_prob(z), p.log_prob(z.clone()))


def test_a_used_flow_is_copied_and_its_state_restored() -> None:
    flow, z = awake(CouplingFlow(4, context_dim=3)), torch.randn(3, 4)
    context = nn.Linear(2, 3)(torch.randn(3, 2))  # inside a graph
    u = flow.condition(context)(z)
    flow.condition(context).inv(u).sum().backward()
    twin, other = copy.deepcopy(flow), CouplingFlow(4, context_dim=3)
    other.load_state_dict(flow.state_dict())
    for copied in (twin, other, copy.deepcopy(flow.inv).inv):
        assert torch.equal(copied.condition(context)(z), u)
    awake(flow, 0.5)
    assert torch.equal(twin.condition(context)(z), u)
    assert all(name.startswith("nets.") for name in flow.state_dict())


def test_every_parameter_has_a_gradient() -> None:
    flow = awake(CouplingFlow(4, context_dim=3))
    FlowNormal(torch.zeros(4), torch.ones(4), flow.condition(torch.randn(2, 3))).log_prob(
        torch.randn(2, 4)
    ).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())


def test_traceable() -> None:
    flow = awake(CouplingFlow(4, context_dim=3).float())

    def both(z: Tensor, context: Tensor) -> Tensor:
        transform = flow.condition(context)
        return transform(z) + transform.inv(z)

    inputs = [(torch.randn(4, 4).float(), torch.randn(4, 3).float()) for _ in range(2)]
    for tensor in inputs[0]:
        tensor.requires_grad_()
    assert_traceable(both, *inputs)


def test_errors() -> None:
    with pytest.raises(ValueError, match="a coupling needs at least two latent dimensions, got 1"):
        CouplingFlow(1)
    with pytest.raises(ValueError, match="num_flows must be positive, got 0"):
        CouplingFlow(4, num_flows=0)
    with pytest.raises(ValueError, match=r"bound must be positive or None, got -1\.0"):
        CouplingFlow(4, bound=-1.0)
    with pytest.raises(ValueError, match="masks must be 'alternating' or 'halves', got 'checkers'"):
        CouplingFlow(4, masks="checkers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden must be positive, got 0"):
        CouplingFlow(4, hidden=0)
    with pytest.raises(ValueError, match="context must have context_dim = 3 entries, got 0"):
        CouplingFlow(4, context_dim=3).condition(None)
    with pytest.raises(ValueError, match="context must have context_dim = 0 entries, got 2"):
        CouplingFlow(4).condition(torch.zeros(2))
