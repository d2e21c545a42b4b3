"""SBC, coverage and the aggregate check on guides whose faults are known."""

import json
import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import aggregate_calibration, simulation_based_calibration
from pvae.evaluation.ranks import holm, rank_counts, uniform_p_values
from pvae.testing import LinearGaussianVAE
from pvae.testing.linear_gaussian import LinearGaussianGuide
from tests.inference.programs import LinearGuide, LinearModel

from .programs import Encoding, Latent, Layers
from .traces import everything

SBC = simulation_based_calibration


@pytest.fixture(scope="module")
def exact() -> LinearGaussianVAE:
    return LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5)


def wrong(exact: LinearGaussianVAE, scale: float = 1.0, shift: float = 0.0) -> LinearGaussianGuide:
    """The exact guide, narrower or off by ``shift`` posterior standard deviations."""
    guide = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5).exact_guide
    with torch.no_grad():
        guide.bias.add_(shift * (guide.scale @ guide.scale.T).diagonal().sqrt())
        guide.scale.mul_(scale)
    return guide


def x_of(exact: LinearGaussianVAE, num: int = 50) -> Tensor:
    torch.manual_seed(1)
    return exact.model.sample(num)


def test_p_values_of_the_exact_guide_are_uniform_over_seeds(exact: LinearGaussianVAE) -> None:
    x = x_of(exact)
    found = [
        SBC(exact.model, exact.exact_guide, x, num_simulations=100, num_draws=39, seed=seed)
        for seed in range(60)
    ]
    for q in range(3):
        for name in ("p_values", "chi_square_p_values", "symmetry_p_values"):
            p = [float(getattr(one, name)[q]) for one in found]
            assert stats.kstest(p, "uniform").pvalue > 0.001, (q, name)
    # With Holm's correction no more than 1 % of the guides is accused, of 60 hardly one.
    assert sum(not one.holds for one in found) <= 3


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (0.8, 0.0, "whose draws are too narrow"),
        (1.25, 0.0, "whose draws are too wide"),
        (1.0, 0.3, "whose draws lie too high"),
        (1.0, -0.3, "whose draws lie too low"),
    ],
)
def test_a_guide_a_fifth_too_narrow_or_shifted_is_rejected(
    exact: LinearGaussianVAE, scale: float, shift: float, words: str
) -> None:
    found = SBC(exact.model, wrong(exact, scale, shift), x_of(exact), num_simulations=600)
    assert not found.holds
    assert found.p_value < 0.005
    assert found.chi_square_p_value < 0.005
    assert "departs (p = " in str(found)
    assert words in str(found)
    assert "z[" in str(found)
    if shift:
        assert (found.shift[:2].sign() == -math.copysign(1, shift)).all()
        assert (found.symmetry_p_values[:2] < 0.05).all()
    else:
        assert ((found.spread[:2] > 1) == (scale < 1)).all()
        assert (found.symmetry_p_values[:2] > 0.005).all()
        assert not found.coverage().inside[:2].any()


def test_coverage_of_the_exact_guide_lies_in_its_band(exact: LinearGaussianVAE) -> None:
    found = SBC(exact.model, exact.exact_guide, x_of(exact), num_simulations=500)
    curve = found.coverage()
    assert found.holds
    assert "no departure found" in str(found)
    assert curve.inside.all()
    assert curve.names == ("z[0]", "z[1]", "log p(x, z)")
    assert curve.nominal[0] == pytest.approx(0.02)
    assert curve.nominal[-1] == 1
    assert (curve.empirical[:, -1] == 1).all()
    assert (curve.empirical.diff(dim=-1) >= 0).all()
    assert (curve.low <= curve.empirical).all()
    assert (curve.empirical <= curve.high).all()
    # Counted from the ranks: the 90 % interval reaches from the 5th smallest to the 5th largest of 99.
    at = int((curve.nominal - 0.9).abs().argmin())
    inside = ((found.ranks >= 5) & (found.ranks <= 94)).double().mean(0)
    torch.testing.assert_close(curve.empirical[:, at], inside)
    assert curve.at(0.9).value == pytest.approx(inside[:2].mean().item())
    hits = round(500 * inside[0].item())
    reference = stats.binomtest(hits, 500).proportion_ci(0.95, method="exact")
    assert curve.low[0, at] == pytest.approx(reference.low)
    assert curve.high[0, at] == pytest.approx(reference.high)
    assert curve.at(0.9).low < 0.9 < curve.at(0.9).high
    assert curve.at(0.5).low < 0.5 < curve.at(0.5).high


def test_coverage_of_a_narrow_guide_is_what_normal_tables_say(exact: LinearGaussianVAE) -> None:
    curve = SBC(exact.model, wrong(exact, 0.8), x_of(exact), num_simulations=2000).coverage()
    for level in (0.5, 0.9):
        expected = 2 * stats.norm.cdf(0.8 * stats.norm.ppf(0.5 + level / 2)) - 1
        assert curve.at(level).value == pytest.approx(expected, abs=0.025)
    assert "90 % intervals cover 8" in str(curve)


def test_a_guide_that_ignores_the_data_is_seen_by_the_joint_alone() -> None:
    # q(z | x) = p(z): every latent has uniform ranks by itself.
    found = SBC(Latent(), Encoding(gain=0.0, scale=1.0), torch.randn(30, 3), num_simulations=400)
    assert (found.p_adjusted[:3] > 0.01).all()
    assert found.p_adjusted[3] < 0.001
    assert not found.holds
    assert "most in log p(x, z) alone, not in any latent number by itself" in str(found)
    assert aggregate_calibration(Latent(), Encoding(gain=0.0, scale=1.0), torch.randn(300, 3)).holds


def test_importance_weights_mend_a_wide_guide(exact: LinearGaussianVAE) -> None:
    guide = wrong(exact, 1.5, 0.5)
    x = x_of(exact)
    assert not SBC(exact.model, guide, x, num_simulations=400, num_draws=39).holds
    mended = SBC(exact.model, guide, x, num_simulations=400, num_draws=39, num_proposals=200)
    assert mended.holds
    assert "the guide corrected by 200 weights" in str(mended)
    assert mended.num_proposals == 200


def test_corrected_draws_follow_the_weights() -> None:
    # z is 0 or 1; the guide gives each one half, the posterior odds are known.
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(x.new_full((), 0.5)))

    x = torch.randn(20)
    assert not SBC(model, guide, x, num_simulations=600, num_draws=19).holds
    assert SBC(model, guide, x, num_simulations=600, num_draws=19, num_proposals=100).holds


def test_contexts_are_those_of_the_data() -> None:
    y = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(10)

    class Exact(torch.nn.Module):
        """The posterior of ``Latent(label_weight=2)``: z ~ N(2 y, I), x ~ N(z, I / 4)."""

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                loc = (4 * x + 2 * y.unsqueeze(-1)) / 5
                pyro.sample("z", dist.Normal(loc, 0.2**0.5).to_event(1))

    model = Latent(label_weight=2.0)
    assert SBC(model, Exact(), torch.zeros(40, 3), y, num_simulations=300).holds
    found = aggregate_calibration(model, Exact(), 2 * y.unsqueeze(-1) + 1.25**0.5 * torch.randn(40, 3), y)
    assert found.holds
    # Under the contexts of others the aggregate is far off.
    far = aggregate_calibration(model, Exact(), 2 * y.unsqueeze(-1) + torch.randn(40, 3), y.flip(0).roll(1))
    assert not far.holds


def test_several_sites_stand_side_by_side() -> None:
    found = SBC(Layers(), Layers(guide=True), torch.randn(30, 3), num_simulations=200)
    assert found.names == ("z_2[0]", "z_2[1]", "z_1[0]", "log p(x, z)")
    assert found.ranks.shape == (200, 4)
    assert not found.holds


def test_the_aggregate_of_the_exact_guide_is_the_prior(exact: LinearGaussianVAE) -> None:
    torch.manual_seed(5)
    x = exact.model.sample(600)
    found = aggregate_calibration(exact.model, exact.exact_guide, x)
    assert found.holds
    assert found.names == ("z[0]", "z[1]", "log p(z)")
    assert found.kind == "aggregate"
    assert found.ranks.shape == (600, 3)
    assert "aggregate posterior against the prior on 600 data: no departure found" in str(found)
    assert found.to_dict()["coverage"] is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((0.0, 2.0), "whose draws are too wide"),
        ((0.0, 0.2), "whose draws are too narrow"),
        ((1.0, 1.0), "whose draws lie too high"),
        ((-1.0, 1.0), "whose draws lie too low"),
    ],
)
def test_an_aggregate_off_the_prior_is_described(data: tuple[float, float], words: str) -> None:
    torch.manual_seed(3)
    x = data[0] + data[1] * torch.randn(300, 3)
    found = aggregate_calibration(Latent(), Encoding(scale=0.2), x)
    assert not found.holds
    assert words in str(found)


def test_p_values_of_the_aggregate_are_uniform_over_seeds(exact: LinearGaussianVAE) -> None:
    p = []
    for seed in range(40):
        torch.manual_seed(seed)
        x = exact.model.sample(100)
        found = aggregate_calibration(exact.model, exact.exact_guide, x, num_draws=39, seed=seed)
        p.append(found.p_values)
    for column in torch.stack(p).T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 0.001


def test_figures_are_those_of_the_ranks(exact: LinearGaussianVAE) -> None:
    found = SBC(exact.model, exact.exact_guide, x_of(exact), num_simulations=120, num_draws=59)
    assert found.num_bins == 20
    counts = rank_counts(found.ranks, 59)
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.p_values, uniform_p_values(counts))
    torch.testing.assert_close(found.p_adjusted, holm(found.p_values))
    assert found.p_value == float(found.p_adjusted.min())
    assert found.histogram.sum(-1).tolist() == [120] * 3
    assert found.ecdf.shape == (3, 59)
    low, high = found.ecdf_band
    assert (low <= (torch.arange(59) + 1) / 60).all()
    assert (high >= (torch.arange(59) + 1) / 60).all()
    assert found.histogram_band[0].shape == (20,)
    torch.testing.assert_close(found.pit, (found.ranks.double() + 0.5) / 60)
    # Uniform ranks have a spread of one exactly.
    even = replace(found, ranks=torch.arange(60).repeat(3, 1).T)
    torch.testing.assert_close(even.spread, torch.ones(3).double())
    torch.testing.assert_close(even.shift, torch.zeros(3).double(), rtol=0, atol=1e-12)
    few = SBC(exact.model, exact.exact_guide, x_of(exact), num_simulations=50, num_draws=59)
    assert few.num_bins == 10


def test_draws_depend_on_the_seed_alone(exact: LinearGaussianVAE) -> None:
    x = x_of(exact)
    a, b, c = (
        SBC(exact.model, exact.exact_guide, data, num_simulations=30, num_draws=19, seed=seed)
        for data, seed in ((x, 0), (x + 100, 0), (x, 1))
    )
    assert torch.equal(a.ranks, b.ranks)  # no value of x enters
    assert not torch.equal(a.ranks, c.ranks)


def test_it_leaves_no_trace() -> None:
    model, guide = LinearModel(), LinearGuide()
    optimizer = torch.optim.Adam(guide.parameters())
    guide.encoder(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    pyro.param("mine", torch.ones(2))
    x = torch.randn(30, 5)
    before = everything(model, guide, optimizer=optimizer)
    SBC(model, guide, x, num_simulations=20, num_draws=9, num_proposals=2)
    aggregate_calibration(model, guide, x, num_draws=9)
    assert everything(model, guide, optimizer=optimizer) == before


def test_it_goes_into_json() -> None:
    split = from_tensors(torch.randn(30, 3), name="noise").train
    found = SBC(Latent(), Encoding(), split, num_simulations=30, num_draws=19)
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row["protocol"]["name"] == "noise"
    assert row["quantities"][0]["name"] == "z[0]"
    assert row["quantities"][3]["histogram"] == found.histogram[3].tolist()
    assert row["coverage"]["names"] == list(found.names)
    assert row["p_value"] == found.p_value
    assert "\n" not in str(found)
    bare = json.loads(json.dumps(found.coverage(num_bootstrap=0).to_dict(), allow_nan=False))
    assert bare["pooled_low"] == [None] * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_simulations": 19}, "num_simulations must be at least 20, got 19"),
        ({"num_draws": 2}, "num_draws must be at least 3, got 2"),
        ({"num_draws": 100}, r"num_draws \+ 1 must have a divisor of 2 to 20, got num_draws 100"),
        ({"num_proposals": 0}, "num_proposals must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SBC(LinearModel(), LinearGuide(), torch.randn(4, 5), **arguments)


def test_too_few_data_have_no_aggregate() -> None:
    with pytest.raises(ValueError, match="num_data must be at least 20, got 4"):
        aggregate_calibration(LinearModel(), LinearGuide(), torch.randn(4, 5))
