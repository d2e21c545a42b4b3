"""Predictive checks: planted misfits, honest p-values, and figures counted by hand."""

import json
import math
from typing import Any

import pyro
import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import predictive_check
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE
from tests.inference.programs import LinearGuide, LinearModel

from .programs import Encoding, Latent, Layers
from .traces import everything


@pytest.fixture(scope="module")
def exact() -> LinearGaussianVAE:
    return LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5)


def sample(exact: LinearGaussianVAE, num: int = 200, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return exact.model.sample(num)


def test_the_models_own_data_pass(exact: LinearGaussianVAE) -> None:
    found = predictive_check(exact.model, exact.exact_guide, sample(exact))
    assert set(found.posterior) == set(found.prior) == {"mean", "variance", "sparsity", "max", "mass"}
    assert found.misfits("posterior") == found.misfits("prior") == []
    assert "posterior predictive: no misfit found. prior predictive: no misfit found" in str(found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: 1.5 * x, "variance"),
        (lambda x: x + 1.0, "mean"),
        (lambda x: torch.where(torch.rand_like(x) < 0.05, 0.0, x), "sparsity"),
        (lambda x: torch.where(torch.arange(len(x)).unsqueeze(-1) == 7, 40.0, x), "max"),
    ],
)
def test_planted_misfits_are_flagged(exact: LinearGaussianVAE, change: Any, named: str) -> None:
    found = predictive_check(exact.model, exact.exact_guide, change(sample(exact)))
    assert named in found.misfits("prior")
    assert named in str(found)
    assert found.prior[named].p_value == pytest.approx(2 / 300)


def test_a_decoder_with_too_little_noise_is_flagged_by_the_posterior(exact: LinearGaussianVAE) -> None:
    x = sample(exact)
    noisy = x + 1.0 * torch.randn_like(x)
    found = predictive_check(
        exact.model,
        exact.exact_guide,
        noisy,
        statistics={"residual": lambda x: (x - x.mean(-1, keepdim=True)).square().sum(-1)},
    )
    assert found.misfits("posterior") == ["residual"]
    assert found.posterior["residual"].rank_p_value < 2e-3
    ranks = found.posterior["residual"].ranks
    assert ranks is not None
    assert (ranks > 284).double().mean() > 0.15  # of uniform ones 5 %


def test_prior_p_values_are_uniform_and_posterior_ones_conservative(exact: LinearGaussianVAE) -> None:
    ours: dict[str, list[float]] = {name: [] for name in ("p", "ranks", "posterior", "posterior ranks")}
    for seed in range(60):
        found = predictive_check(
            exact.model,
            exact.exact_guide,
            sample(exact, 50, seed),
            statistics={"mass": lambda x: x.sum(-1)},
            num_replicates=79,
            seed=seed,
        )
        ours["p"].append(found.prior["mass"].p_above)
        ours["ranks"].append(found.prior["mass"].rank_p_value)
        ours["posterior"].append(found.posterior["mass"].p_above)
        ours["posterior ranks"].append(found.posterior["mass"].rank_p_value)
    assert stats.kstest(ours["p"], "uniform").pvalue > 0.001
    assert stats.kstest(ours["ranks"], "uniform").pvalue > 0.001
    assert torch.tensor(ours["posterior"]).std() < 0.25  # of a uniform one: 0.29
    assert min(ours["posterior ranks"]) > 0.05


def test_statistics_are_counted_by_hand(exact: LinearGaussianVAE) -> None:
    x = sample(exact, 40)
    seen: list[Tensor] = []

    def largest(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.amax(-1)

    found = predictive_check(
        exact.model,
        exact.exact_guide,
        x,
        statistics={"largest": largest, "count": lambda x: 3.0},
        num_replicates=119,
    )
    data, replicas = seen[0], torch.stack(seen[1:])
    assert torch.equal(data, x)
    assert replicas.shape == (238, 40, 4)
    for source, part in ((found.posterior, replicas[:119]), (found.prior, replicas[119:])):
        one = source["largest"]
        assert one.observed == pytest.approx(x.amax(-1).mean().item())
        torch.testing.assert_close(one.replicated, part.amax(-1).mean(-1))
        above = int((part.amax(-1).mean(-1) >= one.observed).sum())
        assert one.p_above == (1 + above) / 120
        assert one.p_value == pytest.approx(2 * min(1 + above, 120 - above) / 120)
        assert one.ranks is not None
        assert torch.equal(one.ranks, (part.amax(-1) < x.amax(-1)).sum(0))
        assert one.ecdf is not None
        torch.testing.assert_close(
            one.ecdf, torch.stack([(one.ranks <= k).double().mean() for k in range(119)])
        )
        # A constant is no misfit, and one number has no ranks.
        assert source["count"].p_value == 1
        assert source["count"].ranks is None
        assert source["count"].ecdf is None
        assert source["count"].ecdf_band is None
        assert math.isnan(source["count"].rank_p_value)
    assert found.prior["largest"].ecdf_band is not None
    assert found.posterior["largest"].ecdf_band is None  # its ranks need not be uniform
    # Given the datum, replications resemble it; samples of the prior do not.
    distance = (replicas - x).square().mean((1, 2))
    assert distance[:119].max() < distance[119:].min()


def test_binary_images_have_sensible_defaults() -> None:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    guide = Encoding16()
    x = model.sample(100)
    fair = predictive_check(model, guide, x)
    assert fair.prior["max"].p_value == 1
    assert fair.prior["sparsity"].observed == pytest.approx((x == 0).double().mean().item())
    assert fair.prior["mass"].observed == pytest.approx(x.sum((1, 2, 3)).mean().item())
    assert fair.misfits("prior") == []
    sparse = predictive_check(model, guide, x * (torch.rand_like(x) < 0.5))
    assert {"sparsity", "mass", "mean"} <= set(sparse.misfits("prior"))


class Encoding16(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))


def test_labels_and_several_sites_work() -> None:
    y = torch.arange(40) % 2
    split = from_tensors(4.0 * y.unsqueeze(-1) + torch.randn(40, 3), y=y, name="pairs").train
    found = predictive_check(Latent(label_weight=4.0), Encoding(), split)
    assert found.prior["mean"].interval.value == pytest.approx(2.0, abs=0.3)
    assert found.protocol is not None
    ladder = predictive_check(Layers(), Layers(guide=True), torch.randn(30, 3), num_replicates=239)
    assert ladder.num_replicates == 239


def test_chunks_of_replications_change_no_figure_but_the_noise(
    exact: LinearGaussianVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sample(exact, 60)
    one = predictive_check(exact.model, exact.exact_guide, x)
    monkeypatch.setitem(predictive_check.__globals__, "_NUMBERS", 2000)
    monkeypatch.setitem(predictive_check.__globals__, "_ROWS", 25)
    many = predictive_check(exact.model, exact.exact_guide, x)
    assert many.posterior["mass"].observed == one.posterior["mass"].observed
    assert len(many.posterior["mass"].replicated.unique()) == 299
    for a, b in zip(many.posterior.values(), one.posterior.values(), strict=True):
        spread = b.replicated.std() + 1e-12
        assert (a.replicated.mean() - b.replicated.mean()).abs() < 6 * spread / 299**0.5 + 1e-9


def test_it_looks_at_part_of_the_data(exact: LinearGaussianVAE) -> None:
    x = sample(exact, 100)
    found = predictive_check(exact.model, exact.exact_guide, x, num_data=30, num_replicates=239)
    assert found.num_data == 30
    assert len(found.prior["mass"].ranks) == 30  # type: ignore[arg-type]


def test_p_values_are_corrected_for_their_number(exact: LinearGaussianVAE) -> None:
    x = sample(exact) + 0.3
    found = predictive_check(exact.model, exact.exact_guide, x, statistics={"mass": lambda x: x.sum(-1)})
    one = found.prior["mass"]
    low, high = sorted((one.p_value, one.rank_p_value))
    assert found.p_adjusted("prior")["mass"] == pytest.approx(min(2 * low, 1.0, max(2 * low, high)))


def test_it_leaves_no_trace() -> None:
    model, guide = LinearModel(), LinearGuide()
    optimizer = torch.optim.Adam(guide.parameters())
    guide.encoder(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    pyro.param("mine", torch.ones(2))
    x = torch.randn(30, 5)
    before = everything(model, guide, optimizer=optimizer)
    predictive_check(model, guide, x)
    assert everything(model, guide, optimizer=optimizer) == before


def test_it_goes_into_tables_and_json(exact: LinearGaussianVAE) -> None:
    found = predictive_check(exact.model, exact.exact_guide, sample(exact, 30), num_replicates=239)
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row["posterior"]["mean"]["rank_p_value"] is None
    assert row["prior"]["mass"]["rank_p_value"] == found.prior["mass"].rank_p_value
    assert row["misfits"]["prior"] == found.misfits("prior")
    table = found.to_markdown().splitlines()
    assert len(table) == 2 + 2 * 5
    assert table[2].startswith("| mean | ")
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": {}}, "statistics must name at least one function, got none"),
        ({"num_replicates": 238}, "num_replicates must be at least 239 for these statistics, got 238"),
        ({"num_data": 10}, "num_data must be at least 20, got 10"),
        (
            {"statistics": {"pixels": lambda x: x}},
            r"statistic 'pixels' must return shape \(\) or \(30,\), got \(30, 5\)",
        ),
        ({"statistics": {"odd": lambda x: x.sum() * math.nan}}, "statistic 'odd' must not be NaN"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictive_check(LinearModel(), LinearGuide(), torch.randn(30, 5), **arguments)
