"""zuko's flows as plug-ins: right in any batch shape, and torch left as it was."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.distributions import AffineCoupling, FlowNormal
from pvae.nn import CouplingNet, LabelEmbedding, LabelSpace
from pvae.priors import ConditionalFlowPrior, ZukoFlow
from tests.distributions.tracing import assert_traceable

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ["BPF", "MAF", "NICE", "NSF"]


def make(name: str = "NSF", z_dim: int = 2, context_dim: int = 3, **options: Any) -> ZukoFlow:
    torch.manual_seed(0)
    return ZukoFlow(z_dim, context_dim, name, transforms=2, hidden=(8,), **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_every_flow_is_a_normalised_density(name: str, context_dim: int) -> None:
    flow = make(name, context_dim=context_dim)
    context = torch.randn(context_dim) if context_dim else None
    p = FlowNormal(torch.tensor([0.5, -0.3]), torch.tensor([0.8, 1.2]), flow.condition(context))
    axis = torch.arange(-10, 10, 0.1)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        density = p.log_prob(grid).exp()
        assert density.sum().item() * 0.1**2 == pytest.approx(1, abs=5e-3)
        z = p.sample((4000,))
        mean = (density.unsqueeze(-1) * grid).sum((0, 1)) * 0.1**2
        assert ((z.mean(0) - mean).abs() < 4.5 * z.std(0) / 4000**0.5 + 5e-3).all()
        # An autoregressive layer is undone to rounding, a polynomial to the tolerance of its bisection.
        again = flow.condition(context).inv(flow.condition(context)(z))
        torch.testing.assert_close(again, z, rtol=0, atol=1e-4 if name == "BPF" else 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_log_determinant_and_broadcasting(name: str) -> None:
    flow, context = make(name, z_dim=4), torch.randn(5, 3)
    for z in (torch.randn(4), torch.randn(5, 4), torch.randn(6, 5, 4), torch.randn(6, 1, 4)):
        batch = torch.broadcast_shapes(z.shape[:-1], (5,))
        transform = flow.condition(context)
        u = transform(z)
        log_det = transform.log_abs_det_jacobian(z, u)
        assert u.shape == transform.forward_shape(z.shape) == transform.inverse_shape(z.shape) == (*batch, 4)
        assert log_det.shape == batch
        torch.testing.assert_close(transform.inv(u), z.expand(*batch, 4), rtol=0, atol=1e-5)
        one = flow.condition(context[2])
        point = z.expand(*batch, 4)[..., 2, :].reshape(-1, 4)[0]
        jacobian = torch.autograd.functional.jacobian(one, point)
        wanted = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[..., 2].flatten()[0], wanted, rtol=0, atol=1e-10)


def test_as_the_flow_of_a_prior() -> None:
    labels = LabelEmbedding(LabelSpace("class", 3), 8)
    prior = ConditionalFlowPrior(4, labels, make(z_dim=4, context_dim=8, bins=4, passes=2))
    y, z = torch.tensor([0, 1, 2]), torch.randn(2, 3, 4)
    assert prior(y).expand((2, 3)).rsample().shape == (2, 3, 4)
    before = prior(y).log_prob(z)
    assert before.shape == (2, 3)
    before.sum().backward()
    assert all(p.grad is not None for p in prior.parameters())
    twin, other = copy.deepcopy(prior), copy.deepcopy(prior)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1)
    assert torch.equal(twin(y).log_prob(z), before)
    assert not torch.allclose(prior(y).log_prob(z), before)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other(y).log_prob(z), prior(y).log_prob(z))
    with pytest.raises(ValueError, match="flow must have context_dim = 0, got 8"):
        ConditionalFlowPrior(4, labels, make(z_dim=4, context_dim=8), flow_context=False)


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_traceable(name: str) -> None:
    flow = make(name, z_dim=4).float()

    def log_prob(z: Tensor, context: Tensor) -> Tensor:
        zero = torch.zeros(4, dtype=torch.float32)
        return FlowNormal(zero, zero + 1, flow.condition(context)).log_prob(z)

    inputs = [(torch.randn(5, 4).float(), torch.randn(5, 3).float()) for _ in range(2)]
    for tensor in inputs[0]:
        tensor.requires_grad_()
    assert_traceable(log_prob, *inputs)


def test_with_zuko_loaded_every_other_transform_is_as_before() -> None:
    # zuko gives torch's base class a `call_and_ladj`, which must not shadow what a flow does itself.
    make()
    net = CouplingNet(4, 0, hidden=8)
    torch.nn.init.normal_(net.mlp.out.weight)
    coupling = AffineCoupling(net, torch.tensor([True, False, True, False]))
    z = torch.randn(3, 4)
    for flow in (coupling, coupling.inv, torch.distributions.AffineTransform(0.5, torch.tensor([2.0] * 4))):
        p = FlowNormal(torch.zeros(4), torch.ones(4), flow)
        wanted = -0.5 * flow(z).square().sum(-1) - 2 * torch.log(torch.tensor(2 * torch.pi))
        log_det = flow.log_abs_det_jacobian(z, flow(z))
        wanted = wanted + (log_det if log_det.ndim == 1 else log_det.sum(-1))
        torch.testing.assert_close(p.log_prob(z), wanted)


PROBE = """
import torch, pyro, pyro.distributions as dist
from torch.distributions import AffineTransform, Distribution
from pvae.priors import ZukoFlow
import sys
assert "zuko" not in sys.modules
pyro.enable_validation({validate})
ZukoFlow(2, 0, "MAF")
assert "zuko" in sys.modules
print(Distribution._validate_args, type(AffineTransform(0.0, 1.0).inv).__name__)
try:
    dist.Normal(0.0, -1.0)
    print("accepted")
except ValueError:
    print("refused")
"""


@pytest.mark.parametrize(("validate", "said"), [(True, "refused"), (False, "accepted")])
def test_validation_of_distributions_is_left_as_it_was(validate: bool, said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(validate=validate)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [str(validate), "_InverseTransform", said]


def test_missing_zuko_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.distributions.Distribution._validate_args
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"^ZukoFlow needs zuko: pip install 'pyro-pvae\[flows\]'$"):
        ZukoFlow(2)
    assert torch.distributions.Distribution._validate_args == before


def test_errors() -> None:
    with pytest.raises(ValueError, match="name must be one of BPF, MAF, NICE, NSF, got 'NCSF'"):
        ZukoFlow(2, name="NCSF")
    with pytest.raises(ValueError, match=r"z_dim must be at least 2, .* got 1, 0 and 3"):
        ZukoFlow(1)
    with pytest.raises(ValueError, match="context must have context_dim = 3 entries, got 0"):
        make().condition(None)
    with pytest.raises(ValueError, match="context must have context_dim = 0 entries, got 3"):
        make(context_dim=0).condition(torch.zeros(3))
