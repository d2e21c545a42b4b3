"""The exact answers of the kit's models against SciPy, brute force and stock Pyro."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from tests.oracles import (
    DiscreteModel,
    LinearGaussianVAE,
    QuadratureModel,
    discrete_log_prob,
    linear_gaussian_elbo,
    linear_gaussian_log_prob,
    quadrature_log_prob,
)

DIAGONAL = torch.tensor([0.3, 0.5, 0.8])


@pytest.mark.parametrize("scale", [0.5, DIAGONAL])
@pytest.mark.parametrize("y_dim", [0, 2])
def test_linear_gaussian_log_prob_is_scipys(scale: float | torch.Tensor, y_dim: int) -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=scale, y_dim=y_dim)
    y = torch.randn(7, y_dim, dtype=torch.float64) if y_dim else None
    x = oracle.model.sample(7, y)
    torch.testing.assert_close(
        oracle.log_prob(x, y), linear_gaussian_log_prob(oracle, x, y), rtol=0, atol=1e-11
    )


def test_linear_gaussian_log_prob_follows_the_parameters() -> None:
    oracle = LinearGaussianVAE()
    x = oracle.model.sample(5)
    with torch.no_grad():
        oracle.model.weight.mul_(1.5)
        oracle.model.log_scale.add_(0.2)
    torch.testing.assert_close(oracle.log_prob(x), linear_gaussian_log_prob(oracle, x), rtol=0, atol=1e-11)


def test_linear_gaussian_posterior_is_bayes() -> None:
    oracle = LinearGaussianVAE(scale=DIAGONAL)
    x, z = oracle.model.sample(4), torch.randn(4, 2, dtype=torch.float64)
    loc, covariance = oracle.posterior(x)
    posterior = torch.distributions.MultivariateNormal(loc, covariance)
    joint = oracle.model.prior().log_prob(z) + oracle.model.decode(z).log_prob(x)
    torch.testing.assert_close(posterior.log_prob(z) + oracle.log_prob(x), joint, rtol=0, atol=1e-11)


def test_linear_gaussian_elbo_term_by_term() -> None:
    oracle = LinearGaussianVAE(scale=DIAGONAL)
    x, loc = oracle.model.sample(4), torch.randn(4, 2, dtype=torch.float64)
    factor = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
    covariance = factor @ factor.T
    ours = oracle.elbo(loc, covariance, x)
    torch.testing.assert_close(ours, linear_gaussian_elbo(oracle, loc, covariance, x), rtol=0, atol=1e-11)
    torch.testing.assert_close(oracle.elbo(loc, covariance.expand(4, 2, 2), x), ours)


def test_mean_field_guide_has_the_highest_elbo_of_diagonal_ones() -> None:
    oracle = LinearGaussianVAE(x_dim=5, z_dim=3, scale=0.3)
    x = oracle.model.sample(6)
    best = oracle.guide_elbo(oracle.mean_field_guide, x)
    assert (best < oracle.log_prob(x)).all()
    for factor in (0.9, 1.1):
        assert (oracle.guide_elbo(oracle.widened_guide(factor), x) < best).all()


def test_elbo_is_tight_at_the_exact_posterior() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)
    elbo = -Trace_ELBO().loss(oracle.model, oracle.exact_guide, x)
    assert elbo == pytest.approx(oracle.log_prob(x).sum().item(), abs=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_dim": 0}, "must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"scale": torch.ones(2)}, r"scale must be positive, a number or of shape \(3,\)"),
        ({"weight": torch.ones(2, 2)}, "weight and bias must have shapes"),
    ],
)
def test_linear_gaussian_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearGaussianVAE(**arguments)  # type: ignore[arg-type]


def test_linear_gaussian_takes_parameters() -> None:
    weight, bias = torch.arange(6.0).reshape(3, 2), torch.tensor([1.0, 2.0, 3.0])
    oracle = LinearGaussianVAE(weight=weight, bias=bias)
    assert torch.equal(oracle.model.weight, weight.double())
    assert torch.equal(oracle.model.bias, bias.double())


def test_conditional_programs_ask_for_labels() -> None:
    oracle = LinearGaussianVAE(y_dim=2)
    x = torch.zeros(1, 3, dtype=torch.float64)
    for program in (oracle.model, oracle.exact_guide):
        with pytest.raises(ValueError, match=r"y must have shape \(B, 2\), got None"):
            program(x)


def test_discrete_log_prob_is_scipys_and_sums_to_one() -> None:
    oracle = DiscreteModel(num_states=5, x_dim=4)
    log_prob = oracle.log_prob(oracle.all_x)
    torch.testing.assert_close(log_prob, discrete_log_prob(oracle, oracle.all_x), rtol=0, atol=1e-12)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_discrete_elbo() -> None:
    oracle = DiscreteModel()
    x = oracle.all_x
    torch.testing.assert_close(oracle.elbo(oracle.exact_guide.table, x), oracle.log_prob(x))
    guide = oracle.imperfect_guide
    # Brute force: average log p(x, z) - log q(z | x) over the four states.
    log_q = guide.table.detach().log_softmax(-1)
    joint = oracle.log_posterior(x) + oracle.log_prob(x).unsqueeze(-1)
    torch.testing.assert_close(oracle.guide_elbo(guide, x), (log_q.exp() * (joint - log_q)).sum(-1))
    assert (oracle.guide_elbo(guide, x) < oracle.log_prob(x)).all()


def test_discrete_refuses() -> None:
    with pytest.raises(ValueError, match=r"x_dim in 1\.\.16"):
        DiscreteModel(x_dim=17)
    with pytest.raises(ValueError, match=r"table must have shape \(8, 4\), got \(2, 4\)"):
        DiscreteModel().guide(torch.zeros(2, 4))


def test_quadrature_log_prob_is_scipys() -> None:
    oracle = QuadratureModel()
    x = torch.tensor([[0.7, 0.2, -0.1]], dtype=torch.float64)
    torch.testing.assert_close(oracle.log_prob(x), quadrature_log_prob(oracle, x), rtol=0, atol=1e-6)


def test_quadrature_has_converged() -> None:
    x = QuadratureModel().model.sample(6)
    fine, coarse = (QuadratureModel(num_nodes=n).log_prob(x) for n in (801, 601))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-11)


def test_quadrature_elbo_by_monte_carlo() -> None:
    oracle = QuadratureModel()
    guide, x = oracle.imperfect_guide, oracle.model.sample(3)
    z = guide.posterior(x).sample((100_000,))
    terms = oracle.model.prior().log_prob(z) + oracle.model.decode(z).log_prob(x)
    terms = terms - guide.posterior(x).log_prob(z)
    error = terms.std(0) / len(terms) ** 0.5
    assert ((terms.mean(0) - oracle.guide_elbo(guide, x)).abs() < 5 * error).all()
    assert (oracle.guide_elbo(guide, x) < oracle.log_prob(x)).all()


def test_quadrature_refuses() -> None:
    with pytest.raises(ValueError, match="scale must be at least"):
        QuadratureModel(scale=0.01)


def test_programs_broadcast_over_particles() -> None:
    for oracle in (LinearGaussianVAE(), DiscreteModel(), QuadratureModel()):
        x = oracle.model.sample(4)
        with pyro.plate("particles", 3, dim=-2):
            q = poutine.trace(oracle.imperfect_guide).get_trace(x)
            p = poutine.trace(poutine.replay(oracle.model, q)).get_trace(x)
        for trace, names in ((q, {"z"}), (p, {"z", "x"})):
            trace.compute_log_prob()
            for name in names:
                assert trace.nodes[name]["log_prob"].shape == (3, 4)
                plates = {frame.name: frame.dim for frame in trace.nodes[name]["cond_indep_stack"]}
                assert plates == {"particles": -2, "data": -1}


def test_representations_name_the_model() -> None:
    oracles = (LinearGaussianVAE(scale=DIAGONAL, y_dim=1), DiscreteModel(), QuadratureModel())
    assert list(map(repr, oracles)) == [
        "LinearGaussianVAE(3 <- 2, diagonal noise, labels)",
        "DiscreteModel(4 states, 3 bits)",
        "QuadratureModel(3 <- 2, curved)",
    ]
