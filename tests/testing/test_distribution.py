"""Right distributions pass every check that applies; each kind of fault fails the one that names it."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.testing import ExactnessError, check_distribution
from tests.testing.faults import ForgetfulFlow

CONTINUOUS = (
    "shapes",
    "value gradient",
    "parameter gradients",
    "float32",
    "integrates to 1",
    "sampler follows density",
    "moments",
    "pathwise gradient",
)
DISCRETE = tuple(name for name in CONTINUOUS if name not in ("value gradient", "pathwise gradient"))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def normals(loc: Sequence[float], scale: Sequence[float]) -> dist.TorchDistribution:
    return dist.Normal(tensor(*loc), tensor(*scale)).to_event(1)


def mixture(*loc: Sequence[float]) -> dist.TorchDistribution:
    centres = tensor(*loc)  # type: ignore[arg-type]
    components = dist.Normal(centres, torch.full_like(centres, 0.3)).to_event(centres.ndim - 1)
    return dist.MixtureSameFamily(dist.Categorical(logits=torch.arange(3.0)), components)


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(tensor(1, -2), tensor(0.3, 20)),
        dist.StudentT(tensor(3), tensor(1), tensor(2)),
        dist.Gamma(tensor(0.7), tensor(2)),
        dist.Beta(tensor(0.7), tensor(2)),
        normals([1, 5], [0.1, 2]),
        dist.MultivariateNormal(tensor(0, 1), scale_tril=torch.tensor([[1.0, 0.0], [0.9, 0.3]]).double()),
        dist.MultivariateNormal(torch.zeros(4), covariance_matrix=torch.eye(4) + 0.5),
        dist.Dirichlet(tensor(2, 3, 0.8)),
        normals([0.0] * 12, [0.5] * 12),
    ],
    ids=lambda d: f"{type(d).__name__}{tuple(d.event_shape)}",
)
def test_a_right_continuous_distribution_passes(distribution: dist.TorchDistribution) -> None:
    assert check_distribution(distribution).applied == CONTINUOUS


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Bernoulli(logits=torch.randn(4)).to_event(1),
        dist.Categorical(logits=torch.randn(2, 5)),
        dist.OneHotCategorical(logits=torch.randn(4)),
        dist.Poisson(tensor(0.5, 30)),
        dist.NegativeBinomial(tensor(3), logits=tensor(0.5)),
    ],
    ids=lambda d: f"{type(d).__name__}{tuple(d.event_shape)}",
)
def test_a_right_discrete_distribution_passes(distribution: dist.TorchDistribution) -> None:
    applied = check_distribution(distribution).applied
    assert set(DISCRETE) - set(applied) <= {"moments"}
    assert set(applied) <= set(DISCRETE)


def test_a_density_without_moments_passes() -> None:
    report = check_distribution(dist.Cauchy(tensor(1), tensor(2)))
    assert "sampler follows density" in report.applied


def test_a_support_that_moves_with_its_parameters_passes() -> None:
    report = check_distribution(dist.Uniform, {"low": tensor(0.5), "high": tensor(2)})
    assert report.applied == CONTINUOUS[:-1]


@pytest.mark.parametrize(
    "distribution",
    [mixture([-2.0, 0.0, 3.0]), mixture([-2.0, 0.0], [1.0, 1.0], [3.0, -1.0])],
    ids=["one dimension", "two dimensions"],
)
def test_separated_modes_pass(distribution: dist.TorchDistribution) -> None:
    assert "integrates to 1" in check_distribution(distribution).applied


@pytest.mark.parametrize("dim", [2, 6])
def test_a_flow_passes_with_its_networks_inside(dim: int) -> None:
    flow = dist.TransformedDistribution(
        normals([0.0] * dim, [1.0] * dim),
        [transforms.affine_coupling(dim, hidden_dims=[8]), transforms.Permute(torch.arange(dim).flip(0))],
    )
    report = check_distribution(flow)
    assert "log-determinant" in report.applied
    found = next(outcome for outcome in report.outcomes if outcome.check == "parameter gradients")
    assert found.detail.startswith("6 tensors")  # two of the base, four of the network


@pytest.mark.parametrize("dim", [2, 4])
def test_a_hand_written_flow_passes_with_its_parameter(dim: int) -> None:
    report = check_distribution(
        lambda weight: ForgetfulFlow(weight, forgetful=False, dim=dim), {"weight": tensor(1, 0.7)}
    )
    assert "pathwise gradient" in report.applied


@pytest.mark.parametrize("dim", [2, 4, 6])
def test_a_sampler_that_ignores_its_inverse_is_named(dim: int) -> None:
    with pytest.raises(ExactnessError, match="draws") as caught:
        check_distribution(ForgetfulFlow(tensor(1, 0.7), forgetful=True, dim=dim))
    assert caught.value.check == "sampler follows density"


class Planted(dist.TorchDistribution):
    """A standard normal, or two, with one fault."""

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012
    support: Any = constraints.real
    has_rsample = True

    def __init__(
        self, scale: Tensor, fault: str = "", batch_shape: Sequence[int] = (), event_shape: Sequence[int] = ()
    ) -> None:
        self.scale, self.fault = scale, fault
        self.support = constraints.independent(constraints.real, len(event_shape))
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Planted":
        batch_shape = self.batch_shape if self.fault == "expand does nothing" else batch_shape
        return Planted(self.scale, self.fault, batch_shape, self.event_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.scale.dtype)
        if self.fault == "expand shares draws" and self.batch_shape:
            noise = noise[..., :1].expand(shape)
        if self.fault == "draws repeat" and sample_shape:
            noise = noise[:1, ...].expand(shape) if len(sample_shape) == 1 else noise[:1, :1].expand(shape)
        if self.fault == "wrong shape" and len(sample_shape) == 2:
            noise = noise.transpose(0, 1)
        if self.fault == "heavier tail":
            noise = noise * (1 + 0.05 * noise.square())
        if self.fault == "shifted draws":
            noise = noise + 0.1
        scale = self.scale.detach() if self.fault == "draws cut off" else self.scale
        half = scale if self.fault != "half the gradient" else (scale + scale.detach()) / 2
        return noise * half

    def log_prob(self, value: Tensor) -> Tensor:
        scale = self.scale
        if self.fault == "unnormalised":
            return self._sum(-0.5 * (value / scale).square())
        if self.fault == "value cut off":
            value = (value + value.detach()) / 2
        if self.fault == "scale cut off":
            scale = (scale + scale.detach()) / 2
        if self.fault == "everything cut off":
            scale = scale.detach()
        log_prob = -0.5 * (value / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        if self.fault == "batch mixed" and value.ndim > 1:
            log_prob = log_prob + 0.01 * (value.mean(0) - value)
        if self.fault == "precision lost":
            log_prob = (log_prob.to(torch.float32) + 1e4 - 1e4).to(log_prob.dtype)
        if self.fault == "single cancels" and value.dtype == torch.float32:
            log_prob = log_prob + 1e5 - 1e5
        if self.fault == "double inside":
            log_prob = log_prob.double()
        return self._sum(log_prob)

    @property
    def mean(self) -> Tensor:
        return torch.full(self._extended_shape(), 0.1 if self.fault == "wrong mean" else 0.0).double()

    @property
    def variance(self) -> Tensor:
        power = 1 if self.fault == "wrong variance" else 2
        return (self.scale**power).expand(self._extended_shape())

    def entropy(self) -> Tensor:
        entropy = (
            self.scale.log() + (0.5 if self.fault != "wrong entropy" else 0.4) + 0.5 * math.log(2 * math.pi)
        )
        return (entropy * math.prod(self.event_shape)).expand(self.batch_shape)

    def _sum(self, log_prob: Tensor) -> Tensor:
        return log_prob.sum(tuple(range(-len(self.event_shape), 0))) if self.event_shape else log_prob


@pytest.mark.parametrize("event_shape", [(), (2,), (3,)])
def test_the_planted_distribution_without_a_fault_passes(event_shape: tuple[int, ...]) -> None:
    report = check_distribution(lambda scale: Planted(scale, event_shape=event_shape), {"scale": tensor(0.5)})
    assert report.applied == CONTINUOUS


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("wrong shape", "shapes", r"must have shape \(2, 3\), got \(3, 2\)"),
        ("expand does nothing", "shapes", "expand must give batch_shape"),
        ("expand shares draws", "shapes", "elements made by expand share their draws"),
        ("draws repeat", "shapes", "draws of one sample_shape are equal"),
        ("batch mixed", "shapes", "from the stack of log_prob"),
        ("value cut off", "value gradient", "central differences give"),
        ("scale cut off", "parameter gradients", "in scale is"),
        ("everything cut off", "parameter gradients", "cut off from its 1 tensors"),
        ("single cancels", "float32", "in single precision"),
        ("double inside", "float32", "score in float32, got torch.float32 and torch.float64"),
        ("unnormalised", "integrates to 1", "quadrature gives 1.25331"),
        ("heavier tail", "sampler follows density", "chi-square of 20000 draws"),
        ("shifted draws", "sampler follows density", "chi-square of 20000 draws"),
        ("wrong mean", "moments", "mean is stated as 0.1 and is"),
        ("wrong variance", "moments", "variance is stated as 0.5 and is"),
        ("wrong entropy", "moments", "entropy is stated as"),
        ("half the gradient", "pathwise gradient", "through rsample is"),
    ],
)
def test_a_planted_fault_is_named(fault: str, check: str, said: str) -> None:
    with pytest.raises(ExactnessError, match=said) as caught:
        check_distribution(lambda scale: Planted(scale, fault), {"scale": tensor(0.5)})
    assert caught.value.check == check


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("unnormalised", "integrates to 1", "standard errors from 1"),
        ("heavier tail", "sampler follows density", "Stein's identity"),
        ("shifted draws", "sampler follows density", "Stein's identity"),
    ],
)
def test_a_planted_fault_is_named_in_three_dimensions(fault: str, check: str, said: str) -> None:
    with pytest.raises(ExactnessError, match=said) as caught:
        check_distribution(lambda scale: Planted(scale, fault, event_shape=(3,)), {"scale": tensor(0.5)})
    assert caught.value.check == check


class SwappedWeights(dist.MixtureSameFamily):
    """Draws the components with each other's weights, which no local identity can see."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        swapped = dist.Categorical(logits=self.mixture_distribution.logits.flip(-1))
        return dist.MixtureSameFamily(swapped, self.component_distribution).sample(sample_shape)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_modes_drawn_in_wrong_proportion_are_named(dim: int) -> None:
    centres = torch.tensor([-2.0, 2.0]).double().unsqueeze(-1).expand(2, dim)
    components = dist.Normal(centres, torch.full_like(centres, 0.4)).to_event(1)
    with pytest.raises(ExactnessError) as caught:
        check_distribution(SwappedWeights(dist.Categorical(logits=tensor(0, 0.3)), components))
    assert caught.value.check == "sampler follows density"


class Levels(dist.TorchDistribution):
    """A rounded logistic on the levels 0, 1/7, ..., 1."""

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012
    support: Any = constraints.unit_interval

    def __init__(self, loc: Tensor, closed: bool, batch_shape: Sequence[int] = ()) -> None:
        self.loc, self.closed = loc, closed
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Levels":
        return Levels(self.loc, self.closed, batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        u = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype)
        return (7 * (self.loc + 0.3 * u.logit())).round().clamp(0, 7) / 7

    def log_prob(self, value: Tensor) -> Tensor:
        upper, lower = (value + 0.5 / 7 - self.loc) / 0.3, (value - 0.5 / 7 - self.loc) / 0.3
        if not self.closed:
            upper = upper.masked_fill(value > 1 - 1e-3, math.inf)
            lower = lower.masked_fill(value < 1e-3, -math.inf)
        return (upper.sigmoid() - lower.sigmoid()).log()


def test_edge_bins_of_levels() -> None:
    values = torch.linspace(0, 1, 8, dtype=torch.float64)
    report = check_distribution(Levels(tensor(0.4), closed=False), values=values)
    assert {"integrates to 1", "sampler follows density"} <= set(report.applied)
    with pytest.raises(ExactnessError, match=r"its 8 values sum to 0\.") as caught:
        check_distribution(Levels(tensor(0.4), closed=True), values=values)
    assert caught.value.check == "integrates to 1"
    with pytest.raises(ExactnessError, match="none of the values of the support") as caught:
        check_distribution(Levels(tensor(0.4), closed=False), values=values[:4], skip=["integrates to 1"])
    assert caught.value.check == "sampler follows density"


class WrongSign(transforms.AffineTransform):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -super().log_abs_det_jacobian(x, y)


class WrongInverse(transforms.AffineTransform):
    def _inverse(self, y: Tensor) -> Tensor:
        return (y + self.loc) / self.scale


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (WrongSign(tensor(0.5), tensor(2)), r"transform 1 \(WrongSign\) gives log \|det J\| = -0.693"),
        (WrongInverse(tensor(0.5), tensor(2)), r"transform 1 \(WrongInverse\) is not undone by its inverse"),
    ],
)
def test_a_wrong_transform_is_named(transform: transforms.AffineTransform, said: str) -> None:
    flow = dist.TransformedDistribution(
        dist.Normal(tensor(0.3), tensor(1)), [transforms.TanhTransform(), transform]
    )
    with pytest.raises(ExactnessError, match=said) as caught:
        check_distribution(flow, skip=["shapes"])
    assert caught.value.check == "log-determinant"


def test_tensors_in_a_closure_are_found() -> None:
    matrix = torch.randn(3, 3, dtype=torch.float64)
    coupling = transforms.AffineCoupling(1, lambda x: (x @ matrix[:1, :2], 0.3 * (x @ matrix[1:2, :2])))
    flow = dist.TransformedDistribution(normals([0.0] * 3, [1.0] * 3), [coupling])
    outcomes = {outcome.check: outcome.detail for outcome in check_distribution(flow).outcomes}
    assert outcomes["parameter gradients"].startswith("3 tensors")


def test_reports_print_a_table() -> None:
    report = check_distribution(dist.Normal(tensor(0), tensor(1)), skip=["moments"])
    lines = str(report).splitlines()
    assert lines[0] == "Normal(batch (), event ())"
    assert len(lines) == 10
    assert any(line.split() == ["moments", "-", "skipped", "on", "request"] for line in lines)
    assert any(line.startswith("integrates to 1") and " holds " in line for line in lines)


def test_draws_are_seeded_and_generators_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (str(check_distribution(dist.Gamma(tensor(2), tensor(1)))) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses() -> None:
    normal = dist.Normal(tensor(0), tensor(1))
    with pytest.raises(ValueError, match=r"skip must name checks .* got \['shape'\]"):
        check_distribution(normal, skip=["shape"])
    with pytest.raises(ValueError, match="num_samples must be at least 1000, got 10"):
        check_distribution(normal, num_samples=10)
    with pytest.raises(ValueError, match="values must list the support of Independent"):
        check_distribution(dist.Bernoulli(logits=torch.zeros(20)).to_event(1))
