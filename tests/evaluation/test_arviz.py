"""The export against the estimates that pvae itself gives, under the ArviZ that is installed and a stand-in
for the older one.
"""

import importlib.metadata
import json
import math
import sys
import types
import warnings
from typing import Any

import arviz_stats
import numpy as np
import pytest
import torch
import xarray
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import log_likelihood, to_arviz
from pvae.evaluation.blocks import rows_per_pass
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE

from .programs import Encoding, Latent, Layers
from .traces import everything

SMALL: dict[str, Any] = {"num_draws": 7, "num_particles": 5}


def oracle(num: int = 40) -> tuple[LinearGaussianVAE, Tensor]:
    torch.manual_seed(0)
    exact = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5)
    return exact, exact.model.sample(num)


def test_every_group_has_its_variables_and_dimensions() -> None:
    exact, x = oracle()
    tree = to_arviz(exact.model, exact.imperfect_guide, x, **SMALL)
    assert isinstance(tree, xarray.DataTree)
    found = {
        f"{group}/{name}": dict(zip(value.dims, value.shape, strict=True))
        for group in tree.children
        for name, value in tree[group].data_vars.items()
    }
    draws = {"chain": 1, "draw": 7}
    each = {**draws, "datum": 40}
    assert found == {
        "posterior/z": {**each, "z_dim_0": 2},
        "posterior_predictive/x": {**each, "x_dim_0": 4},
        "log_likelihood/x": each,
        "log_likelihood/marginal": each,
        "sample_stats/log_weight": each,
        **{
            f"sample_stats/{name}": {"datum": 40}
            for name in ("log_p_x", "elbo", "pareto_k", "ess", "log_p_x_error")
        },
        "prior/z": {**draws, "z_dim_0": 2},
        "prior_predictive/x": {**draws, "x_dim_0": 4},
        "observed_data/x": {"datum": 40, "x_dim_0": 4},
    }
    assert tree.attrs["num_particles"] == 5
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())


def test_values_are_those_of_the_densities_written_out() -> None:
    exact, x = oracle()
    guide = exact.imperfect_guide
    tree = to_arviz(exact.model, guide, x, num_particles=1, num_draws=50)
    z = torch.from_numpy(tree["posterior"]["z"].values)[0]
    model = exact.model
    with torch.no_grad():
        log_x = torch.distributions.Normal(z @ model.weight.T + model.bias, model.scale).log_prob(x).sum(-1)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_q = guide.posterior(x).log_prob(z)
    for group, name, value in (
        ("log_likelihood", "x", log_x),
        ("sample_stats", "log_weight", log_x + log_p - log_q),
        ("log_likelihood", "marginal", log_x + log_p - log_q),  # of one particle
    ):
        np.testing.assert_allclose(tree[group][name].values[0], value.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num", [1, 33, 40])
def test_the_certificate_is_that_of_log_likelihood(num: int) -> None:
    exact, x = oracle(num)
    tree = to_arviz(exact.model, exact.imperfect_guide, x, num_draws=20, num_particles=10, seed=3)
    same = log_likelihood(exact.model, exact.imperfect_guide, x, num_particles=200, seed=3)
    stats = tree["sample_stats"]
    for name, value in (
        ("log_p_x", same.log_prob),
        ("elbo", same.elbo_values),
        ("pareto_k", same.pareto_k),
        ("ess", same.ess),
        ("log_p_x_error", same.particle_error),
    ):
        np.testing.assert_allclose(stats[name].values, value.numpy(), rtol=1e-9, atol=1e-9)
    # The groups of particles make up all particles.
    marginal = torch.from_numpy(tree["log_likelihood"]["marginal"].values[0])
    together = marginal.logsumexp(0) - math.log(20)
    np.testing.assert_allclose(together.numpy(), same.log_prob.numpy(), rtol=1e-9)


def test_leave_one_out_of_marginals_is_the_log_score() -> None:
    exact, x = oracle(60)
    tree = to_arviz(exact.model, exact.imperfect_guide, x, num_draws=200, num_particles=50)
    found = arviz_stats.loo(tree, var_name="marginal", pointwise=True)
    log_p = exact.log_prob(x)
    assert found.elpd <= float(tree["sample_stats"]["log_p_x"].sum())
    assert found.elpd == pytest.approx(float(log_p.sum()), abs=2.0)
    assert found.se == pytest.approx(float(log_p.std() * 60**0.5), rel=0.1)
    assert 0 <= found.p < 3
    np.testing.assert_allclose(found.elpd_i.values, log_p.numpy(), atol=0.2)


def test_leave_one_out_of_conditional_densities_says_that_it_is_unreliable() -> None:
    exact, x = oracle(20)
    tree = to_arviz(exact.model, exact.imperfect_guide, x, num_draws=200, num_particles=1)
    with pytest.warns(UserWarning, match="shape parameter of Pareto"):
        found = arviz_stats.loo(tree, var_name="x", pointwise=True)
    assert abs(found.elpd - float(exact.log_prob(x).sum())) > 20
    assert float(found.pareto_k.max()) > 1


def test_an_exact_guide_has_no_tail_to_fit() -> None:
    exact, x = oracle(5)
    tree = to_arviz(exact.model, exact.exact_guide, x, num_draws=50, num_particles=2)
    np.testing.assert_allclose(tree["sample_stats"]["log_p_x"].values, exact.log_prob(x).numpy(), rtol=1e-9)
    with pytest.raises(ValueError, match="All tail values are the same"):
        arviz_stats.loo(tree, var_name="marginal")


def test_the_summary_has_a_row_for_each_latent_and_the_posterior_means() -> None:
    exact, x = oracle(6)
    tree = to_arviz(exact.model, exact.exact_guide, x, num_draws=400, num_particles=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = arviz_stats.summary(tree, round_to="none")
    assert list(table.index[:3]) == ["z[0, 0]", "z[0, 1]", "z[1, 0]"]
    loc, covariance = exact.posterior(x)
    error = 4 * covariance.diagonal().sqrt() / 20
    assert ((torch.tensor(table["mean"].to_numpy()).reshape(6, 2) - loc).abs() < error).all()


def test_predictions_are_draws_or_means() -> None:
    exact, x = oracle(8)
    draws, means, none = (
        to_arviz(exact.model, exact.exact_guide, x, num_draws=500, num_particles=1, predictive=kind)
        for kind in ("draws", "means", None)
    )
    assert "posterior_predictive" not in none.children
    assert "prior_predictive" not in none.children
    z = means["posterior"]["z"].values
    expected = z @ exact.model.weight.detach().numpy().T + exact.model.bias.detach().numpy()
    np.testing.assert_allclose(means["posterior_predictive"]["x"].values, expected, rtol=1e-9)
    # The noise of scale 0.5 is what they differ by; the draws of z are the same.
    noise = draws["posterior_predictive"]["x"].values - expected
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    prior = means["prior"]["z"].values @ exact.model.weight.detach().numpy().T
    np.testing.assert_allclose(
        means["prior_predictive"]["x"].values, prior + exact.model.bias.detach().numpy(), rtol=1e-9
    )
    assert abs(means["prior"]["z"].values.mean()) < 0.15


def test_rows_are_found_again_in_the_data_set() -> None:
    torch.manual_seed(0)
    data = from_tensors(torch.randn(9, 5), test=torch.randn(90, 5), scale="real")
    model = VAE(StandardNormal(2), MLPDecoder(2, (5,)), Normal())
    guide = NormalGuide(MLPEncoder((5,), 2))
    split = data.test[torch.arange(80, 20, -1)]
    tree = to_arviz(model, guide, split, num_data=12, **SMALL)
    datum = tree["posterior"]["datum"].values
    assert len(set(datum)) == 12
    assert datum.min() > 20
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, data.test.x[torch.tensor(datum)].numpy())
    protocol = json.loads(tree.attrs["protocol"])
    assert protocol["hash"] == split.protocol.to_dict()["hash"]
    assert set(to_arviz(model, guide, split[:3], num_data=None, **SMALL)["posterior"]["datum"].values) == {
        80,
        79,
        78,
    }


def test_contexts_go_along() -> None:
    torch.manual_seed(0)
    y = torch.arange(30) % 2
    x = 6.0 * y.unsqueeze(-1) + torch.randn(30, 3)
    model, guide = Latent(label_weight=6.0), Encoding(scale=0.4)
    tree = to_arviz(model, guide, x, y, num_draws=60, num_particles=2)
    np.testing.assert_array_equal(tree["constant_data"]["y"].values, y.numpy())
    prior = tree["prior"]
    contexts = y[torch.tensor(prior["context"].values)].numpy()
    np.testing.assert_array_equal(prior["z"].values[0].mean(-1) > 3, contexts == 1)
    assert contexts.mean() == 0.5
    assert "context" not in tree["posterior"].coords


def test_several_latents_have_a_variable_each() -> None:
    x = torch.randn(10, 3)
    tree = to_arviz(Layers(), Layers(guide=True), x, **SMALL)
    assert tree["posterior"]["z_2"].shape == (1, 7, 10, 2)
    assert tree["posterior"]["z_1"].shape == (1, 7, 10)
    # In the model the lower one lies around the sum of the upper one.
    gap = to_arviz(Layers(), Layers(guide=True), x, num_draws=800, num_particles=1)["prior"]
    gap = gap["z_1"].values - gap["z_2"].values.sum(-1)
    assert abs(gap.mean()) < 0.15
    assert gap.std() == pytest.approx(1, rel=0.1)


def test_images_keep_their_dimensions_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4)), Bernoulli())
    guide = NormalGuide(MLPEncoder((1, 4, 4), 2))
    x = (torch.rand(9, 1, 4, 4) < 0.5).float()
    tree = to_arviz(model, guide, x, predictive="means", **SMALL)
    assert tree["posterior_predictive"]["x"].dims[-3:] == ("x_dim_0", "x_dim_1", "x_dim_2")
    monkeypatch.setitem(rows_per_pass.__globals__["PASS_ROWS"], "cpu", 11)
    chunked = to_arviz(model, guide, x, predictive="means", **SMALL)
    for group in tree.children:
        for name in tree[group].data_vars:
            np.testing.assert_allclose(
                chunked[group][name].values, tree[group][name].values, rtol=1e-5, atol=1e-6
            )


def test_it_is_reproducible_and_leaves_no_trace() -> None:
    exact, x = oracle(9)
    guide = exact.imperfect_guide
    exact.model.train()
    optimizer = torch.optim.Adam(exact.model.parameters())
    before = everything(exact.model, guide, optimizer=optimizer)
    tree = to_arviz(exact.model, guide, x, **SMALL)
    assert everything(exact.model, guide, optimizer=optimizer) == before
    assert tree.equals(to_arviz(exact.model, guide, x, **SMALL))
    assert not tree.equals(to_arviz(exact.model, guide, x, seed=1, **SMALL))


class InferenceData:
    """What the constructor of ``arviz.InferenceData`` 0.x asks for and makes of it."""

    def __init__(self, attrs: Any = None, **groups: Any) -> None:
        for name, dataset in groups.items():
            if not isinstance(dataset, xarray.Dataset):
                raise ValueError(f"Arguments to InferenceData must be xarray Datasets, got {name}")
            setattr(self, name, dataset)
        self.attrs = dict(attrs)
        self.groups = list(groups)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let ``arviz`` be installed in some version, or not at all."""

    def find(name: str) -> str:
        assert name == "arviz"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    fake = types.ModuleType("arviz")
    fake.InferenceData = InferenceData  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.setitem(sys.modules, "arviz", fake)


@pytest.mark.parametrize(
    ("version", "container", "kind"),
    [
        ("0.23.4", "auto", InferenceData),
        ("0.23.4", "inference_data", InferenceData),
        ("0.23.4", "datatree", xarray.DataTree),
        ("1.3.0", "auto", xarray.DataTree),
        (None, "auto", xarray.DataTree),
    ],
)
def test_the_container_is_that_of_the_installed_version(
    monkeypatch: pytest.MonkeyPatch, version: str | None, container: Any, kind: Any
) -> None:
    exact, x = oracle(5)
    tree = to_arviz(exact.model, exact.imperfect_guide, x, **SMALL)
    installed(monkeypatch, version)
    found = to_arviz(exact.model, exact.imperfect_guide, x, container=container, **SMALL)
    assert type(found) is kind
    assert found.attrs == tree.attrs
    assert list(found.children if kind is xarray.DataTree else found.groups) == list(tree.children)
    # Both lines of ArviZ look for the same names in a group, which is the same data set.
    for group in tree.children:
        other = found[group].to_dataset() if kind is xarray.DataTree else getattr(found, group)
        assert other.identical(tree[group].to_dataset())


@pytest.mark.parametrize(("version", "said"), [("1.3.0", "got 1.3.0"), (None, "got none")])
def test_inference_data_needs_the_older_line(
    monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    exact, x = oracle(5)
    installed(monkeypatch, version)
    with pytest.raises(ImportError, match=f"container 'inference_data' needs arviz below 1, {said}"):
        to_arviz(exact.model, exact.imperfect_guide, x, container="inference_data", **SMALL)


def test_without_xarray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, x = oracle(5)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"to_arviz needs xarray.*pip install 'pyro-pvae\[arviz\]'"):
        to_arviz(exact.model, exact.imperfect_guide, x, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws, num_particles and num_data must be positive, got 0, 25 and 500"),
        ({"predictive": "modes"}, "predictive must be 'draws', 'means' or None, got 'modes'"),
        ({"container": "netcdf"}, "container must be 'auto', 'datatree' or 'inference_data', got 'netcdf'"),
        (
            {"num_draws": 2**24},
            "posterior_predictive has at most 134217728 numbers, got 335544320: .*predictive=None",
        ),
        ({"num_draws": 2**25, "predictive": None}, "posterior has at most 134217728 numbers, got 335544320"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    exact, x = oracle(5)
    with pytest.raises(ValueError, match=message):
        to_arviz(exact.model, exact.imperfect_guide, x, **options)
