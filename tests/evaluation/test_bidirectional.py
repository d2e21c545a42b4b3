"""Bounds from both sides: the upper one is one, the gap holds the shortfall and closes with steps."""

import json
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae.evaluation import bidirectional, tempering
from pvae.evaluation.hmc import Noise, transition
from pvae.evaluation.tempering import Annealer, betas_of
from pvae.guides import HVAEGuide
from pvae.inference.isolation import evaluating
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import HVAE
from pvae.nn import MLPEncoder, PairDecoder, PairEncoder
from pvae.priors import StandardNormal
from tests.evaluation.programs import Layers
from tests.evaluation.test_annealing import check_unbiased, layers_log_prob
from tests.inference.programs import LinearGuide, LinearModel
from tests.oracles import LinearGaussianVAE, QuadratureModel

pytestmark = pytest.mark.usefixtures("float64")


def simulated(model: Any, guide: Any, x: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The data and latents that ``bidirectional`` makes, by the same seeds."""
    with evaluating(model, guide):
        annealer = Annealer(
            model, guide, x, None, betas_of("linear", 1), simulate=True, batch_size=None, **settings
        )
        passes = list(annealer.passes())
    truth = [chains.truth for chains in passes if chains.truth is not None]
    return torch.cat([chains.path.x for chains in passes]), torch.cat(truth)


SETTINGS = {"num_chains": 16, "num_leapfrog": 2, "seed": 0}


@pytest.mark.parametrize(
    ("kind", "start"), [("linear", "prior"), ("curved", "guide"), ("curved", "prior"), ("layers", "guide")]
)
def test_the_bounds_enclose_and_the_gap_closes(kind: str, start: Any) -> None:
    model: Any
    guide: Any
    if kind == "layers":
        model, guide, like, log_prob = Layers(), Layers(guide=True), torch.zeros(32, 3), layers_log_prob
    else:
        oracle: Any = (
            LinearGaussianVAE(x_dim=5, z_dim=3, scale=0.5) if kind == "linear" else QuadratureModel(0.7)
        )
        model, guide, log_prob = oracle.model, oracle.imperfect_guide, oracle.log_prob
        like = torch.zeros(32, 5 if kind == "linear" else 3)
    gaps = []
    for num_steps in (5, 150 if kind == "curved" else 300):
        found = bidirectional(model, guide, like, num_steps=num_steps, start=start)
        x, _ = simulated(model, guide if start == "guide" else None, like, **SETTINGS)
        exact = log_prob(x)
        for left in (exact - found.lower, found.upper - exact):
            assert left.mean() > -3 * left.std() / math.sqrt(32)
        gaps.append(found.gap)
    assert gaps[1].abs().mean() < gaps[0].abs().mean()
    assert abs(gaps[1].mean()) < 0.05


@pytest.mark.parametrize("num_chains", [1, 3])
def test_inverse_weights_have_mean_one_over_p_of_x(num_chains: int) -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.8)
    like = torch.zeros(640, 3)
    found = bidirectional(oracle.model, oracle.imperfect_guide, like, num_steps=4, num_chains=num_chains)
    x, _ = simulated(
        oracle.model, oracle.imperfect_guide, like, num_chains=num_chains, num_leapfrog=2, seed=0
    )
    exact = oracle.log_prob(x)
    check_unbiased(exact - found.upper)
    check_unbiased(found.lower - exact)


def test_one_step_is_the_weight_at_the_truth() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)
    guide, like = oracle.imperfect_guide, torch.zeros(7, 3)
    found = bidirectional(oracle.model, guide, like, num_steps=1, num_chains=4)
    x, z = simulated(oracle.model, guide, like, num_chains=4, num_leapfrog=2, seed=0)
    log_q = torch.distributions.Normal(guide.loc(x), guide.scale).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + oracle.model.decode(z).log_prob(x)
    torch.testing.assert_close(found.upper, (log_p - log_q).detach())


def test_chains_go_back_the_way_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, Tensor]] = []

    def spied(density: Any, point: Any, beta: float, step: Tensor, *settings: Any) -> Any:
        found.append((beta, step))
        return transition(density, point, beta, step, *settings)

    monkeypatch.setattr(tempering, "transition", spied)
    bidirectional(LinearModel(), LinearGuide(), torch.zeros(3, 5), num_steps=5, num_chains=2)
    there, back = found[-8:-4], found[-4:]
    assert [beta for beta, _ in there] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    for (beta, step), (beta_back, step_back) in zip(there, reversed(back), strict=True):
        assert beta == beta_back
        assert torch.equal(step, step_back)


def test_everything_random_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    plain = torch.manual_seed

    def seeded(seed: int) -> Any:
        seeds.append(seed)
        return plain(seed)

    class Spied(Noise):
        def __init__(self, given: list[int], *settings: Any) -> None:
            seeds.extend(given)
            super().__init__(given, *settings)

    monkeypatch.setattr(torch, "manual_seed", seeded)
    monkeypatch.setattr(tempering, "Noise", Spied)
    bidirectional(LinearModel(), LinearGuide(), torch.zeros(70, 5), num_steps=2, num_chains=70, seed=5)
    # One at the door; for 3 blocks data, two sets of starts, steps, and 2 groups of chains there and back.
    assert len(seeds) == 1 + 3 * (1 + 2 + 1 + 4)
    assert len(set(seeds)) == len(seeds)


def test_the_data_are_draws_of_the_model() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5)
    x, z = simulated(
        oracle.model, oracle.exact_guide, torch.zeros(4000, 3), num_chains=1, num_leapfrog=1, seed=0
    )
    weight = oracle.model.weight.detach()
    torch.testing.assert_close(x.T.cov(), weight @ weight.T + 0.25 * torch.eye(3), rtol=0.1, atol=0.1)
    torch.testing.assert_close(z.T.cov(), torch.eye(2), rtol=0.1, atol=0.1)
    residual = x - z @ weight.T - oracle.model.bias.detach()
    assert residual.std().item() == pytest.approx(0.5, rel=0.03)


def test_it_is_conditional_where_the_model_is() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2, y_dim=2)
    y = 5 * torch.randn(6, 2)
    found = bidirectional(oracle.model, oracle.exact_guide, torch.zeros(6, 4), y, num_steps=5)
    # The exact posterior of each datum's own label: both bounds are exact.
    torch.testing.assert_close(found.lower, found.upper, rtol=0, atol=1e-8)
    assert "log p(x | y)" in str(found)
    assert found.to_dict()["conditional"]


def test_networks_on_binary_data() -> None:
    decoder, below = PairDecoder((3, 2), (12,), hidden=8), MLPEncoder((2,), 3, hidden=(8,))
    model = HVAE(StandardNormal(2), below, decoder, Bernoulli())
    guide = HVAEGuide(MLPEncoder((12,), 2, hidden=(8,)), PairEncoder((12,), 2, 3, hidden=8))
    found = bidirectional(model, guide, torch.zeros(12, 12), num_steps=50)
    assert abs(found.gap.mean()) < 0.2
    assert found.acceptance.min() > 0.3


def test_the_seed_decides_and_batches_do_not() -> None:
    model, guide, like = LinearModel(), LinearGuide(), torch.zeros(70, 5)
    a, b, c = (
        bidirectional(model, guide, like, num_steps=4, num_chains=2, seed=seed, batch_size=batch_size)
        for seed, batch_size in ((0, None), (0, 1), (1, None))
    )
    torch.testing.assert_close(a.lower, b.lower, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.upper, b.upper, rtol=0, atol=1e-9)
    assert (a.lower != c.lower).all()


def test_nothing_is_left_behind() -> None:
    model, guide = LinearModel().train(), LinearGuide().eval()
    pyro.param("mine", torch.ones(2))

    def everything() -> list[Any]:
        parameters = (*model.parameters(), *guide.parameters())
        return [
            [(p.tolist(), p.grad, p.requires_grad) for p in parameters],
            [m.training for m in (*model.modules(), *guide.modules())],
            {k: v.tolist() for k, v in pyro.get_param_store().items()},
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    before = everything()
    bidirectional(model, guide, torch.zeros(3, 5), num_steps=3, num_chains=2)
    assert everything() == before


def test_models_that_cannot_be_simulated_are_refused() -> None:
    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, :1])
            pyro.sample("w", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, 1:])

    def following(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            before = torch.cat([x[..., :1] * 0, x[..., :-1]], -1)
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + before, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"must observe x as it is, in one site, .* got 'x' and 'w'"):
        bidirectional(two, LinearGuide(), x)
    with pytest.raises(ValueError, match="model site 'x' must not depend on x itself"):
        bidirectional(following, LinearGuide(), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"start": "end"}, "start must be 'guide' or 'prior', got 'end'"),
        ({"num_steps": 0}, "num_steps must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bidirectional(LinearModel(), LinearGuide(), torch.randn(4, 5), **settings)


def test_it_prints_one_line_and_goes_into_json() -> None:
    found = bidirectional(LinearModel(), LinearGuide(), torch.randn(20, 5), num_steps=3, num_chains=2)
    line, gap = str(found), found.intervals["gap"]
    assert "\n" not in line
    assert line.startswith("on data simulated by this model the annealing run of 3 steps and 2 chains from")
    assert (
        f"by at most {gap.value:.3f} nats on average (95 % interval {gap.low:.3f} to {gap.high:.3f}" in line
    )
    assert line.endswith("of other data it proves nothing")
    assert gap.low < found.gap.mean() < gap.high
    assert gap.value == pytest.approx((found.upper - found.lower).mean().item())
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row["gap"]["value"] == gap.value
    assert row["simulated"]
    assert math.isfinite(row["acceptance"]["reverse"])
    still = bidirectional(LinearModel(), LinearGuide(), torch.randn(3, 5), num_steps=1, num_chains=2)
    assert still.to_dict()["acceptance"] == {"forward": None, "reverse": None}


def test_a_sigma_that_refits_itself_is_used_as_stored() -> None:
    model, guide = LinearModel(), LinearGuide()
    model.likelihood = Normal("batch")
    with pytest.raises(ValueError, match="must be measured before held-out data"):
        bidirectional(model, guide, torch.zeros(3, 5), num_steps=2)


def test_both_ways_carry_the_evidence_of_their_weights() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.3)
    x = torch.zeros(6, 3)
    fine, coarse = (
        bidirectional(oracle.model, oracle.imperfect_guide, x, num_steps=steps, num_chains=40, start="prior")
        for steps in (200, 2)
    )
    for found in (fine, coarse):
        assert found.ess.shape == found.pareto_k.shape == (2, 6)
        assert bool(((found.ess >= 1) & (found.ess <= 40 + 1e-9)).all())
    assert bool((fine.ess.mean(1) > coarse.ess.mean(1)).all())
    assert max(coarse.khat_shares) > 0.05
    assert "more steps narrow the gap" in str(coarse)
    row = coarse.to_dict()
    assert list(row["khat_share"].values()) == coarse.khat_shares
    assert row["ess"]["reverse"] == pytest.approx(coarse.ess[1].mean().item())
    few = bidirectional(oracle.model, oracle.imperfect_guide, x, num_steps=3, num_chains=4)
    assert few.to_dict()["khat_share"] == {"forward": None, "reverse": None}
