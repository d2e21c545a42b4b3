"""Targets behind a flow: exact for maps whose determinant is known, learned by likelihood alone."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, Transform, constraints

from pvae.alignment import FlowTarget, Target, align
from pvae.inference import ELBO
from pvae.priors import CouplingFlow, ZukoFlow

from .programs import BATCH, NUM_DATA, Density, arguments, density, programs

pytestmark = pytest.mark.usefixtures("float64")

INDEX = torch.arange(BATCH) + 7


class Matrix(Transform):
    """u -> A u + b."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.shift

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet.expand(x.shape[:-1])


class Affine(nn.Module):
    """An affine flow."""

    def __init__(self, dim: int = 2, identity: bool = False) -> None:
        super().__init__()
        start = torch.eye(dim)
        self.matrix = nn.Parameter(start if identity else start + 0.4 * torch.randn(dim, dim))
        self.shift = nn.Parameter(torch.zeros(dim) if identity else torch.randn(dim))

    def condition(self, context: Tensor | None) -> Transform:
        return Matrix(self.matrix, self.shift)


class Scaling(nn.Module):
    """A flow of one coordinate at a time, composed of two."""

    def condition(self, context: Tensor | None) -> Transform:
        return ComposeTransform([AffineTransform(0.3, 3.0), AffineTransform(-1.0, 0.5)])


def unit_density() -> Density:
    rho = density()
    rho.embedding = (rho.embedding - rho.embedding.mean(0)) / rho.embedding.std(0, correction=0)
    return rho


def test_the_identity_makes_it_direct() -> None:
    model, guide = programs("normal")
    parts = []
    for kind, flow in (("direct", None), ("flow", Affine(identity=True))):
        aligned = align(model, guide, unit_density(), kind=kind, flow=flow, offset=0.4, gamma=1.0)  # type: ignore[arg-type]
        aligned.model.on_batch(INDEX)
        torch.manual_seed(0)
        parts.append(ELBO().terms(*aligned, *arguments(model, INDEX)).parts["align"])
    torch.testing.assert_close(parts[1], parts[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_units", [True, False])
def test_an_affine_map_shifts_the_target_by_its_log_determinant(in_units: bool) -> None:
    rho, flow = density(), Affine()
    target = FlowTarget(rho, flow, in_units=in_units)
    shift = torch.linalg.slogdet(flow.matrix.detach()).logabsdet
    if in_units:
        # The map from u itself first divides by its standard deviations.
        shift = shift - rho.embedding.std(0, correction=0).log().sum()
    torch.testing.assert_close(target(None)[0], rho.log_density - shift, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(target(INDEX)[0], (rho.log_density - shift)[INDEX], rtol=1e-11, atol=1e-11)
    assert torch.equal(target(INDEX)[1], Target(rho)(INDEX)[1])


def test_elementwise_parts_count_every_coordinate() -> None:
    target = FlowTarget(unit_density(), Scaling())
    torch.testing.assert_close(target.log_det(), torch.full((NUM_DATA,), 2 * math.log(1.5)))


@pytest.mark.parametrize(
    "make", [lambda: CouplingFlow(2, 3, hidden=6), lambda: ZukoFlow(2, 0, "NSF", 1, (6,)), None]
)
def test_log_det_is_that_of_the_jacobian(make: Any) -> None:
    torch.manual_seed(1)
    rho = density()
    target = FlowTarget(rho, make() if make else None)
    with torch.no_grad():
        for parameter in target.flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shift, scale = rho.embedding.mean(0), rho.embedding.std(0, correction=0)
    transform = target.flow.condition(None)
    for i in (0, 5, 21):
        jacobian = torch.autograd.functional.jacobian(
            lambda u: transform((u - shift) / scale), rho.embedding[i]
        )
        wanted = torch.linalg.slogdet(jacobian).logabsdet
        assert target.log_det(torch.tensor([i])).item() == pytest.approx(wanted.item(), abs=1e-9)


@pytest.mark.parametrize("in_units", [True, False])
def test_log_det_at_new_embeddings_is_that_of_the_jacobian(in_units: bool) -> None:
    torch.manual_seed(2)
    rho = density()
    target = FlowTarget(rho, CouplingFlow(2, 3, hidden=6), in_units=in_units)
    with torch.no_grad():
        for parameter in target.flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shift, scale = rho.embedding.mean(0), rho.embedding.std(0, correction=0)
    transform, new = target.flow.condition(None), torch.randn(3, 2) * 4
    units = 0.0 if in_units else scale.log().sum().item()  # which the released code leaves out
    for u, ours in zip(new, target.log_det_at(new), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform((v - shift) / scale), u)
        wanted = torch.linalg.slogdet(jacobian).logabsdet.item() + units
        assert ours.item() == pytest.approx(wanted, abs=1e-9)
    torch.testing.assert_close(target.log_det_at(rho.embedding), target.log_det(), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"u must have shape \(M, 2\), got \(4, 3\)"):
        target.log_det_at(torch.randn(4, 3))


@pytest.mark.parametrize("prior", ["normal", "vamp", "flow"])
@pytest.mark.filterwarnings("ignore:a flow takes up the scale")
def test_its_step_is_that_of_its_likelihood_and_moves_nobody_else(prior: str) -> None:
    model, guide = programs(prior)
    aligned = align(model, guide, density(), kind="flow", flow=Affine(), flow_lr=0.01)
    target: Any = aligned.aligner.target
    for parameter in [*model.parameters(), *guide.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.clone() for p in [*model.parameters(), *guide.parameters()]]
    args = arguments(model, INDEX)
    twin = Affine()
    twin.load_state_dict(target.flow.state_dict())
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for step in range(3):
        aligned.model.on_step(args, INDEX, step, 10)
        optimizer.zero_grad()
        u = density().embedding
        u = ((u - u.mean(0)) / u.std(0, correction=0))[INDEX]
        z = u @ twin.matrix.T + twin.shift
        p = model.prior(*args[1:])  # type: ignore[operator]
        loss = -(p.log_prob(z).mean() + torch.linalg.slogdet(twin.matrix).logabsdet)
        loss.backward(inputs=list(twin.parameters()))
        optimizer.step()
    torch.testing.assert_close(target.flow.matrix, twin.matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target.flow.shift, twin.shift, rtol=1e-10, atol=1e-10)
    for parameter, old in zip([*model.parameters(), *guide.parameters()], before, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(parameter.grad, torch.ones_like(parameter))  # type: ignore[arg-type]
    assert all(p.grad is None and not p.requires_grad for p in target.flow.parameters())


def test_a_flow_that_is_right_gives_the_priors_own_log_density() -> None:
    # u ~ N(m, S^2) and g the whitening map: log p(u) - log |det| is log p_Z(g(u)) for every datum.
    u = torch.randn(30, 2) * torch.tensor([3.0, 0.2]) + 5
    p = dist.Normal(u.mean(0), u.std(0, correction=0)).to_event(1)
    target = FlowTarget(Density(p.log_prob(u), torch.ones(30), u), Affine(identity=True))
    standard = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    wanted = standard.log_prob((u - u.mean(0)) / u.std(0, correction=0))
    torch.testing.assert_close(target(None)[0], wanted, rtol=1e-10, atol=1e-10)


def test_training_learns_the_density_of_the_embedding() -> None:
    torch.manual_seed(0)
    half = torch.randn(400, 2) * torch.tensor([0.5, 2.0])
    u = torch.cat([half + 3, half - 3])
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)),
        dist.Normal(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), torch.tensor([0.5, 2.0])).to_event(1),
    )
    rho = mixture.log_prob(u)
    target = FlowTarget(Density(rho, torch.ones(800), u), CouplingFlow(2, 4, hidden=16), lr=1e-2)
    prior = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)

    def gap() -> float:
        with torch.no_grad():
            z, log_det = target._image(target.u)
            return float((rho - prior.log_prob(z) - log_det).mean())

    start = gap()
    for step in range(150):
        target.step(prior, torch.randint(800, (200,)), first=step == 0)
    assert gap() < 0.25 * start


def test_pretraining_happens_once_before_the_first_step() -> None:
    steps = {}
    for pretrain in (0, 5):
        aligned = align(*programs(), density(), kind="flow", pretrain_steps=pretrain)
        args = arguments(aligned.model, INDEX)
        for step in range(3):
            aligned.model.on_step(args, INDEX, step, 10)
        state = aligned.model.training_state()
        steps[pretrain] = float(state["target.optimizer.0.step"])
    assert steps == {0: 3, 5: 8}


def test_the_log_determinant_is_what_the_targets_lack() -> None:
    rho = density()
    aligned = align(*programs(), rho, kind="flow", flow=Affine(), offset=0.7)
    target: Any = aligned.aligner.target
    torch.testing.assert_close(aligned.log_det(), target.log_det())
    torch.testing.assert_close(aligned.targets(), rho.log_density - target.log_det() - 0.7)
    torch.testing.assert_close(aligned.log_det_at(rho.embedding), aligned.log_det())
    direct = align(*programs(), rho)
    assert (direct.log_det() == 0).all()
    assert torch.equal(direct.log_det_at(rho.embedding[:3]), torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"embedding": None}, {}, "needs a target with an embedding"),
        (
            {"embedding": torch.randn(NUM_DATA, 3)},
            {},
            r"embedding of the latent's shape \(2,\), got \(3,\): fit the",
        ),
        ({"embedding": torch.randn(NUM_DATA - 1, 2)}, {}, r"must be finite, shape \(40, d\), got \(39, 2\)"),
        ({"embedding": torch.ones(NUM_DATA, 2)}, {}, "must vary in every column"),
        ({}, {"flow": CouplingFlow(3)}, "flow must have z_dim = 2, the size of the embedding, got 3"),
        ({}, {"flow_lr": 0.0}, "flow_lr must be positive, got 0"),
        ({}, {"pretrain_steps": -1}, "pretrain_steps must not be negative, got -1"),
        ({}, {"offset": "entropy"}, "a flow matches the entropies by itself"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    rho = density()
    for name, value in change.items():
        setattr(rho, name, value)
    with pytest.raises(ValueError, match=said):
        align(*programs(), rho, kind="flow", **settings)


def test_a_conditional_prior_is_not_trained_for_without_labels() -> None:
    with pytest.raises(ValueError, match="pretrain_steps must be 0 for a conditional prior"):
        align(*programs("flow"), density(), kind="flow", pretrain_steps=3)


def test_a_prior_with_parameters_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="free to drift: use kind='direct'"):
        align(*programs("gmm"), density(), kind="flow")
