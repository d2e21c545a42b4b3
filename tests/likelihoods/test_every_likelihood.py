"""What all likelihoods promise: shapes, units, supports, tracing, state."""

import copy
from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor

from pvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
)
from tests.distributions.tracing import assert_traceable, host_syncs

IMAGE, TABLE = (3, 2, 4), (6,)
CASES: dict[str, tuple[Callable[[], Likelihood], tuple[int, ...], tuple[int, ...]]] = {
    "bernoulli-image": (Bernoulli, IMAGE, IMAGE),
    "bernoulli-table": (Bernoulli, TABLE, TABLE),
    "continuous-bernoulli": (ContinuousBernoulli, IMAGE, IMAGE),
    "normal-fixed": (lambda: Normal(value=0.5), IMAGE, IMAGE),
    "normal-learned": (lambda: Normal("learned", value=0.5), TABLE, TABLE),
    "normal-channels-image": (lambda: Normal("learned", channels=3), IMAGE, IMAGE),
    "normal-channels-table": (lambda: Normal("learned", channels=6), TABLE, TABLE),
    "logistic-grey": (lambda: DiscretizedLogisticMixture(4, levels=17), (1, 2, 4), (12, 2, 4)),
    "logistic-rgb": (lambda: DiscretizedLogisticMixture(4, levels=256), IMAGE, (40, 2, 4)),
    "categorical-image": (lambda: Categorical(5), IMAGE, (15, 2, 4)),
    "categorical-table": (lambda: Categorical(5), TABLE, (30,)),
    "poisson": (Poisson, IMAGE, IMAGE),
    "negative-binomial-shared": (NegativeBinomial, TABLE, TABLE),
    "negative-binomial-predicted-image": (lambda: NegativeBinomial("predicted"), IMAGE, (6, 2, 4)),
    "negative-binomial-predicted-table": (lambda: NegativeBinomial("predicted"), TABLE, (12,)),
}
KINDS = {"binary", "unit", "count", "real"}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Likelihood, tuple[int, ...], tuple[int, ...]]:
    make, x_shape, param_shape = request.param
    return make(), x_shape, param_shape


Case = tuple[Likelihood, tuple[int, ...], tuple[int, ...]]


def test_param_shape(case: Case) -> None:
    likelihood, x_shape, param_shape = case
    assert likelihood.param_shape(x_shape) == param_shape
    assert likelihood.param_shape(list(x_shape)) == param_shape
    assert len(param_shape) == len(x_shape)


@pytest.mark.parametrize("batch", [(5,), (2, 5)])
def test_shapes(case: Case, batch: tuple[int, ...]) -> None:
    likelihood, x_shape, param_shape = case
    p = likelihood(torch.randn(*batch, *param_shape))
    assert (p.batch_shape, p.event_shape) == (batch, x_shape)
    x = p.sample()
    assert x.shape == p.mean.shape == (*batch, *x_shape)
    assert p.log_prob(x).shape == batch
    assert p.sample(torch.Size([3])).shape == (3, *batch, *x_shape)
    assert p.expand(torch.Size([4, *batch])).sample().shape == (4, *batch, *x_shape)


@pytest.mark.parametrize("batch", [(), (2, 3, 5), (0, 5)])
def test_told_the_event_dim_any_leading_dimensions_do(case: Case, batch: tuple[int, ...]) -> None:
    likelihood, x_shape, param_shape = case
    likelihood.event_dim = len(x_shape)
    with pyro.validation_enabled(False):
        p = likelihood(torch.randn(*batch, *param_shape))
        assert (p.batch_shape, p.event_shape) == (batch, x_shape)
        # PyTorch's sum over the event dimensions fails on a batch of none.
        assert 0 in batch or p.log_prob(p.sample()).shape == batch


def test_leading_dimensions_are_independent(case: Case) -> None:
    likelihood, _, param_shape = case
    likelihood, params = likelihood.double(), torch.randn(2, 5, *param_shape, dtype=torch.float64)
    x = likelihood(params).sample()
    torch.testing.assert_close(likelihood(params).log_prob(x)[1], likelihood(params[1]).log_prob(x[1]))


def test_draws_are_in_the_units_of_x(case: Case) -> None:
    likelihood, _, param_shape = case
    p = likelihood(torch.randn(4, *param_shape))
    x = p.sample(torch.Size([4000]))
    assert x.dtype == torch.float32
    likelihood.check(x[0])
    # The mean of an entry is that of its draws; for RGB logistics up to rounding and clipping.
    error = x.std(0) / 4000**0.5
    slack = 0.06 if isinstance(likelihood, DiscretizedLogisticMixture) and x.shape[-3] == 3 else 1e-4
    assert ((x.mean(0) - p.mean).abs() <= 5 * error + slack).all()


def test_gradients_reach_every_parameter_and_the_decoder(case: Case) -> None:
    likelihood, _, param_shape = case
    params = torch.randn(4, *param_shape, requires_grad=True)
    p = likelihood(params)
    p.log_prob(p.sample().detach()).sum().backward()
    assert params.grad is not None
    assert params.grad.isfinite().all()
    assert (params.grad != 0).float().mean() > 0.5
    for name, parameter in likelihood.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name


def test_extreme_decoder_outputs_give_finite_values_and_gradients(case: Case) -> None:
    likelihood, _, param_shape = case
    for size in (-1e4, 1e4):
        params = torch.full((2, *param_shape), size, requires_grad=True)
        with torch.no_grad():
            x = likelihood(torch.zeros(2, *param_shape)).sample()
        log_prob = likelihood(params).log_prob(x)
        (gradient,) = torch.autograd.grad(log_prob.sum(), params)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()


def test_traceable(case: Case) -> None:
    likelihood, _, param_shape = case
    parameters = dict(likelihood.named_parameters())

    def log_prob(params: Tensor, x: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(
            _LogProb(likelihood), {f"p.{k}": v for k, v in replaced.items()}, (params, x)
        )

    inputs = []
    for _ in range(2):
        params = torch.randn(3, *param_shape)
        x = likelihood(params).sample()
        inputs.append((params, x, *(p.detach() + 0.1 for p in parameters.values())))
    inputs[0][0].requires_grad_()
    for value in inputs[0][2:]:
        value.requires_grad_()
    assert_traceable(log_prob, *inputs)


class _LogProb(torch.nn.Module):
    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self.p = likelihood

    def forward(self, params: Tensor, x: Tensor) -> Tensor:
        return self.p(params).log_prob(x)


def test_sampling_does_not_synchronise(case: Case) -> None:
    likelihood, _, param_shape = case
    params = torch.randn(3, *param_shape)
    assert host_syncs(lambda: (likelihood(params).sample(), likelihood(params).mean)) == []


def test_state_dict_round_trip_and_deepcopy(case: Case) -> None:
    likelihood, _, param_shape = case
    params = torch.randn(3, *param_shape)
    other = copy.deepcopy(likelihood)
    for parameter in likelihood.parameters():
        parameter.data.add_(0.3)
    x = likelihood(params).sample()
    log_prob = likelihood(params).log_prob(x)
    if list(likelihood.parameters()):
        assert not torch.equal(other(params).log_prob(x), log_prob)
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(other(params).log_prob(x), log_prob)


def test_as_a_site_in_plates(case: Case) -> None:
    likelihood, x_shape, param_shape = case
    params = torch.randn(4, 5, *param_shape)

    def model(x: Tensor) -> None:
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            pyro.sample("x", likelihood(params), obs=x)

    x = likelihood(params[0]).sample()
    trace = pyro.poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, 5)
    assert trace.nodes["x"]["fn"].event_shape == x_shape


def test_values_are_kinds_of_protocols(case: Case) -> None:
    assert case[0].values
    assert case[0].values <= KINDS


def test_integer_data_are_refused(case: Case) -> None:
    with pytest.raises(TypeError, match=r"needs floating-point x, got torch\.uint8"):
        case[0].check(torch.zeros(2, *case[1], dtype=torch.uint8))


def test_nan_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"got .*nan"):
        case[0].check(torch.full((2, *case[1]), float("nan")))
    with pytest.raises(ValueError, match=r"got .*inf"):
        case[0].check(torch.full((2, *case[1]), float("inf")))


def test_too_many_dimensions_ask_for_the_event_dim() -> None:
    with pytest.raises(ValueError, match=r"Bernoulli\.event_dim must be set for params with 6 dimensions"):
        Bernoulli()(torch.zeros(1, 1, 1, 1, 1, 1))
