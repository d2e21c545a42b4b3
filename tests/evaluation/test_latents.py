"""Draws and densities of latents against SciPy, one by one."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import latents
from pvae.inference.isolation import evaluating

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_posterior_draw_carries_its_densities(float64: None) -> None:
    x = draws(700, 3)  # more than one pass
    model, guide = Latent(), Encoding(0.5, 0.2, 0.7)
    with evaluating(model, guide):
        q = latents.draw_posterior(model, guide, x, None, ("z",), seed=0)
    z, x_ = q.z.numpy(), x.numpy()
    normal = scipy.stats.norm
    np.testing.assert_allclose(q.log_q, normal(0.5 * x_ + 0.2, 0.7).logpdf(z).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(q.log_p, normal.logpdf(z).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(q.log_x, normal(z, 0.5).logpdf(x_).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(q.square_error, ((z - x_) ** 2).mean(-1), rtol=1e-10)
    standard = (z - 0.5 * x_ - 0.2) / 0.7
    assert scipy.stats.kstest(standard.ravel(), "norm").pvalue > 1e-3


def test_prior_draws_are_runs_of_the_model_under_the_data_s_contexts(float64: None) -> None:
    x, y = draws(40, 3), (torch.arange(40) % 4).double()
    model = Latent(label_weight=10.0)
    with evaluating(model):
        p = latents.draw_prior(model, x, y, ("z",), 1000, seed=0, features=lambda x: 2 * x)
    assert p.rows.bincount().tolist() == [25] * 40
    standard = p.z - 10 * y[p.rows].unsqueeze(-1)
    assert scipy.stats.kstest(standard.numpy().ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(p.log_p, scipy.stats.norm.logpdf(standard.numpy()).sum(-1), rtol=1e-10)
    assert p.features is not None
    torch.testing.assert_close(p.features, 2 * p.z)


def test_several_sites_stand_side_by_side_from_the_top(float64: None) -> None:
    x = draws(30, 3)
    model, guide = Layers(), Layers(guide=True)
    with evaluating(model, guide):
        names = latents.latent_names(model, guide, x, None)
        q = latents.draw_posterior(model, guide, x, None, names, seed=0)
        mean, error = latents.means(guide, x, None, names, seed=0, num_draws=400)
    assert names == ("z_2", "z_1")
    z = q.z.numpy()
    assert q.z.shape == (30, 3)
    normal = scipy.stats.norm
    log_p = normal.logpdf(z[:, :2]).sum(-1) + normal(z[:, :2].sum(-1), 1).logpdf(z[:, 2])
    np.testing.assert_allclose(q.log_p, log_p, rtol=1e-10)
    # The lower mean hangs on draws of the upper latent: E z_1 = x_3 / 2 + (x_1 + x_2) / 2.
    exact = torch.cat([x[:, :2] / 2, x.sum(-1, keepdim=True) / 2], -1)
    torch.testing.assert_close(mean[:, :2], exact[:, :2])
    assert error[:, :2].max() < 1e-20
    spread = math.sqrt(0.5 / 400)  # of a sum of two draws with variance 1/4
    assert error[:, 2].sqrt().mean().item() == pytest.approx(spread, rel=0.1)
    assert ((mean - exact)[:, 2].abs() < 5 * spread).all()


def test_means_are_averages_of_draws_where_a_distribution_has_none(float64: None) -> None:
    class Meanless(dist.Normal):
        @property
        def mean(self) -> Tensor:
            raise NotImplementedError

        def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Meanless":
            return Meanless(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Meanless(x, torch.ones(())).to_event(1))

    x = draws(50, 2)
    mean, error = latents.means(guide, x, None, ("z",), seed=0, num_draws=200)
    assert error.mean().item() == pytest.approx(1 / 200, rel=0.1)
    assert scipy.stats.kstest(((mean - x) * math.sqrt(200)).numpy().ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("numbers", [2**22, 1000, 1])
def test_the_aggregate_is_the_mixture_written_out(
    float64: None, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    monkeypatch.setattr(latents, "_NUMBERS", numbers)
    x, z = draws(60, 2), draws(60, 2, seed=1)
    guide = Encoding(0.5, 0.2, 0.7).eval()
    group = torch.arange(60) % 7
    within, others = latents.log_aggregate(guide, {"z": z}, x, None, group)
    table = scipy.stats.norm(0.5 * x.numpy() + 0.2, 0.7).logpdf(z.numpy()[:, None]).sum(-1)
    for i in range(60):
        same = [j for j in range(60) if j % 7 == i % 7]
        rest = [j for j in range(60) if j != i]
        assert within[i].item() == pytest.approx(
            scipy.special.logsumexp(table[i, same]) - math.log(len(same))
        )
        assert others[i].item() == pytest.approx(scipy.special.logsumexp(table[i, rest]) - math.log(59))
    free, again = latents.log_aggregate(guide, {"z": z[:9]}, x, None)
    np.testing.assert_allclose(free, scipy.special.logsumexp(table[:9], -1) - math.log(60), rtol=1e-10)
    assert torch.equal(free, again)


def test_the_aggregate_of_several_sites_is_their_joint_one(float64: None) -> None:
    x, z = draws(20, 3), draws(5, 3, seed=1)
    values = {"z_2": z[:, :2], "z_1": z[:, 2]}
    found = latents.log_aggregate(Layers(guide=True), values, x, None)[0]
    normal, x_, z_ = scipy.stats.norm, x.numpy(), z.numpy()
    table = normal(x_[:, :2] / 2, 0.5).logpdf(z_[:, None, :2]).sum(-1)
    table = table + normal(x_[:, 2] / 2 + z_[:, None, :2].sum(-1), 0.5).logpdf(z_[:, None, 2])
    np.testing.assert_allclose(found, scipy.special.logsumexp(table, -1) - math.log(20), rtol=1e-10)
