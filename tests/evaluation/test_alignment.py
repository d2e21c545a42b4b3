"""The alignment report on programs whose alignment is known, and closed forms of what it splits."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.evaluation import AlignmentReport, alignment_report, frechet_distance, log_likelihood
from pvae.evaluation.alignment_plot import principal_plane, worst_dimensions
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture
from pvae.testing import LinearGaussianVAE

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def report(model: Any, guide: Any, x: Any, y: Tensor | None = None, **settings: Any) -> AlignmentReport:
    if isinstance(x, Tensor) and x.dtype == torch.float64:
        model.double()  # data are taken to the precision of the model
    return alignment_report(model, guide, x, y, **{"num_bootstrap": 20, **settings})


_NARROW = 0.03
_WIDE = math.sqrt(1 - _NARROW**2)


@pytest.fixture(scope="module")
def aligned() -> AlignmentReport:
    """An encoder that tells all about x, and whose aggregate is the prior's N(0, 1)."""
    return report(Latent(), Encoding(scale=_NARROW), _WIDE * draws(1000, 3), num_bootstrap=200)


@pytest.fixture(scope="module")
def shifted() -> AlignmentReport:
    guide = Encoding(scale=_NARROW, shift=0.5)
    return report(Latent(), guide, _WIDE * draws(1000, 3), num_bootstrap=200)


def test_prior_samples_are_aligned(aligned: AlignmentReport) -> None:
    assert abs(aligned.c2st.value - 0.5) < 0.05
    assert aligned.mmd2.p_value > 0.02
    assert abs(aligned.mmd2.value) < 3e-3
    for measure in (aligned.mean_gap, aligned.log_std_ratio, aligned.correlation_gap, aligned.w2):
        assert measure.value < 3 * measure.null + 0.02 < 0.25
    assert aligned.holes.value < 0.03
    assert aligned.outside.value < 0.03
    assert aligned.active_units.value == 3
    # Posteriors that hardly overlap: three times log 33 nats of information are more than log 1000.
    assert aligned.saturated
    assert aligned.information_limit == pytest.approx(math.log(1000))
    assert 0.9 * math.log(1000) < aligned.mutual_information.value <= math.log(1000) + 1e-9
    # What the split calls a mismatch of the aggregate is none.
    assert aligned.kl_aggregate.value > 3


def test_a_shifted_copy_is_detected(shifted: AlignmentReport, aligned: AlignmentReport) -> None:
    assert shifted.c2st.low > 0.55
    assert abs(shifted.c2st.null - 0.5) < 0.05
    assert shifted.mmd2.p_value == pytest.approx(1 / 201)
    assert shifted.mmd2.low > 0 > shifted.mmd2.null - 0.003
    assert shifted.mean_gap.value == pytest.approx(0.5, abs=0.07)
    assert shifted.mean_gap.low < 0.5 < shifted.mean_gap.high
    assert shifted.w2.value == pytest.approx(3 * 0.25, abs=0.2)
    assert shifted.log_std_ratio.value < 0.07
    torch.testing.assert_close(shifted.mean_gaps, torch.full((3,), 0.5).double(), rtol=0, atol=0.1)


def test_nothing_in_it_hangs_on_the_scale_of_z() -> None:
    x = draws(300, 3)
    settings: dict[str, Any] = {"num_bootstrap": 0, "max_points": 100}
    unit = report(Latent(), Encoding(shift=0.5), x, **settings)
    wide = report(Latent(loc=7.0, scale=100.0), Encoding(100.0, 57.0, 10.0), x, **settings)
    for name in ("mean_gap", "log_std_ratio", "correlation_gap", "w2", "mmd2", "c2st", "rate", "holes"):
        assert getattr(wide, name).value == pytest.approx(getattr(unit, name).value, rel=1e-3), name
    assert wide.active_units.value == 3
    assert wide.prior_scales.mean().item() == pytest.approx(100, rel=0.05)


def test_a_collapsed_encoder_is_aligned_and_idle() -> None:
    found = report(Latent(), Encoding(gain=0.0, scale=1.0), draws(1000, 3), num_bootstrap=100)
    assert abs(found.c2st.value - 0.5) < 0.05
    assert found.mmd2.p_value > 0.02
    assert found.active_units.value == found.active_units.high == 0
    for measure in (found.rate, found.mutual_information, found.kl_aggregate):
        assert abs(measure.value) < 1e-6
    assert not found.saturated
    assert found.reconstruction_mse.value == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(("gain", "scale"), [(1.0, 0.8), (0.5, 0.5), (1.5, 1.5)])
def test_the_rate_splits_as_the_closed_form_does(gain: float, scale: float) -> None:
    x = draws(2000, 2)
    found = report(Latent(z_dim=2), Encoding(gain=gain, scale=scale), x, num_bootstrap=100, max_points=20)
    variance = gain**2 + scale**2
    information = math.log(variance / scale**2)  # twice half the logarithm
    aggregate = variance - 1 - math.log(variance)
    for measure, truth, slack in (
        (found.mutual_information, information, 0.02),
        (found.kl_aggregate, aggregate, 0.02),
        (found.rate, information + aggregate, 0.0),
    ):
        assert measure.low - slack < truth < measure.high + slack
    total = found.mutual_information.value + found.kl_aggregate.value
    assert found.rate.value == pytest.approx(total, rel=1e-12)
    assert not found.saturated
    assert found.log_std_ratio.value == pytest.approx(abs(math.log(variance)) / 2, abs=0.05)


def test_holes_are_seen_from_both_sides() -> None:
    x = 3 * torch.sign(draws(500, 2))
    islands = report(Latent(z_dim=2), Encoding(scale=0.1), x, num_bootstrap=100, max_points=100)
    assert islands.holes.value > 0.9
    narrow = report(Latent(z_dim=2), Encoding(gain=0.0, scale=0.1), x, max_points=100)
    assert narrow.holes.value > 0.9
    assert narrow.outside.value == 0
    wide = report(Latent(z_dim=2), Encoding(gain=0.0, scale=10.0), x, max_points=100)
    # Less than the density 4.6 nats below the mode, that is outside the radius 3.03.
    assert wide.outside.value == pytest.approx(math.exp(-0.5 * (-2 * math.log(0.01)) / 100), abs=0.02)
    assert wide.holes.value < 0.02


def test_elbo_and_reconstruction_are_those_of_the_programs() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2)
    x = oracle.model.sample(200)
    found = report(oracle.model, oracle.exact_guide, x, max_points=50)
    assert found.elbo.value == pytest.approx(oracle.log_prob(x).mean().item(), abs=1e-9)
    imperfect = report(oracle.model, oracle.imperfect_guide, x, max_points=50)
    reference = log_likelihood(oracle.model, oracle.imperfect_guide, x, num_particles=400).elbo
    assert imperfect.elbo.value == pytest.approx(reference, abs=0.2)
    # E |x - W z - b|^2 for a draw z of the posterior N(m, S).
    mean, covariance = oracle.posterior(x)
    weight, bias = oracle.model.weight.detach(), oracle.model.bias.detach()
    residual = (x - mean @ weight.T - bias).square().mean()
    spread = (weight @ covariance @ weight.T).diagonal().mean()
    assert found.reconstruction_mse.value == pytest.approx((residual + spread).item(), rel=0.15)


def test_a_conditional_model_is_compared_within_contexts() -> None:
    y = torch.arange(800) % 2
    x = 4 * y.double().unsqueeze(-1).expand(-1, 2)
    model = Latent(z_dim=2, label_weight=4.0)
    right = report(model, Encoding(scale=1.0), x, y, max_points=200)
    # The same aggregate, with every label's posterior at the other label's prior.
    wrong = report(model, Encoding(gain=-1.0, shift=4.0, scale=1.0), x, y, max_points=200)
    assert right.c2st_with_y is not None
    assert wrong.c2st_with_y is not None
    for found in (right, wrong):
        assert abs(found.c2st.value - 0.5) < 0.1
        assert found.information_limit == pytest.approx(math.log(400))
        # Within a context x is constant: no information, where the mixture of all would say log 2.
        assert abs(found.mutual_information.value) < 1e-6
    assert abs(right.c2st_with_y.value - 0.5) < 0.1
    assert wrong.c2st_with_y.value > 0.98
    assert abs(right.kl_aggregate.value) < 1e-6
    assert wrong.kl_aggregate.value == pytest.approx(16, rel=0.1)


def test_contexts_of_their_own_leave_the_split_without_a_say() -> None:
    y = draws(60)
    found = report(Latent(label_weight=1.0), Encoding(), draws(60, 3), y)
    assert found.information_limit == 0
    assert found.saturated


def test_latents_of_several_sites_are_compared_together() -> None:
    x = draws(300, 3)
    found = report(Layers(), Layers(guide=True), x, max_points=100)
    assert found.z_dim == 3
    # The scalar below has prior variance 1 + 2.
    assert found.prior_scales.square().tolist() == pytest.approx([1, 1, 3], rel=0.2)
    # Means x_1 / 2, x_2 / 2, (x_1 + x_2 + x_3) / 2, draws half as wide again.
    expected = torch.tensor([0.5, 0.5, (0.75 + 0.75) / 3]).double().log() / 2
    torch.testing.assert_close(found.log_std_ratios, expected, rtol=0, atol=0.15)
    assert found.active_units.value == 3


def test_codes_tell_the_same_space_from_the_same_moments(aligned: AlignmentReport) -> None:
    x = math.sqrt(0.99) * draws(300, 3)
    model, guide = Latent(), Encoding(scale=0.1)
    same = report(model, guide, x, codes=x, max_points=20)
    turned = report(model, guide, x, codes=x @ torch.linalg.qr(draws(3, 3, seed=2)).Q, max_points=20)
    other = report(model, guide, x, codes=draws(300, 3, seed=5), max_points=20)
    values = {
        name: [getattr(found, name).value for found in (same, turned, other)]
        for name in ("code_correlation", "code_r2", "code_cka", "code_rms")
    }
    assert values["code_correlation"][0] == pytest.approx(1)
    assert max(map(abs, values["code_correlation"][1:])) < 0.95
    assert values["code_r2"][:2] == pytest.approx([1, 1])
    assert values["code_cka"][:2] == pytest.approx([1, 1])
    assert abs(values["code_r2"][2]) < 0.05
    assert values["code_cka"][2] < 0.1
    assert values["code_rms"][0] < 1e-12 < 0.5 < values["code_rms"][1]
    assert same.code_correlations is not None
    narrower = report(model, guide, x, codes=x[:, :2], max_points=20)
    assert narrower.code_correlation is narrower.code_rms is None
    assert narrower.code_correlations is None
    assert narrower.code_r2 is not None
    assert aligned.code_r2 is None


def test_samples_are_compared_in_features() -> None:
    x, other = draws(200, 3), 2 * draws(150, 3, seed=1)
    seen: list[int] = []

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.9)

        def project(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.dropout(x[:, :2]) * 3

    net = Features()
    found = report(Latent(), Encoding(), x, features=net.project, max_points=20)
    assert found.frechet_proxy is not None
    assert net.training
    # Means of p(x | z) are z itself, so that the prior's features are 3 z.
    assert found.frechet_proxy.value == pytest.approx(
        frechet_distance(3 * found_prior(x), 3 * x[:, :2]), abs=1e-9
    )
    assert 0 < found.frechet_proxy.null < 1
    against = report(Latent(), Encoding(), x, features=net.project, reference=other, max_points=20)
    assert against.frechet_proxy is not None
    assert against.frechet_proxy.value > 10 * found.frechet_proxy.value
    assert max(seen) <= 500


def found_prior(x: Tensor) -> Tensor:
    """The prior draws of a report with seed 0, from another report's picture."""
    shown = report(Latent(), Encoding(), x, num_prior=200, max_points=1000)
    return shown.z_prior[:, :2]


def test_it_works_for_the_library_s_own_programs() -> None:
    model = VAE(GaussianMixture(3, 4), MLPDecoder(3, (1, 4, 4), hidden=(8,)), Bernoulli())
    guide = NormalGuide(MLPEncoder((1, 4, 4), 3, hidden=(8,)))
    split = from_tensors((torch.rand(60, 1, 4, 4) < 0.5).float(), name="bits").train
    found = report(model, guide, split, num_prior=90)
    assert found.protocol is not None
    assert found.num_prior == 90
    assert all(math.isfinite(m.value) for m in found.measures().values())


def test_it_leaves_the_programs_and_generators_and_follows_its_seed() -> None:
    model, guide, x = Latent(), Encoding(), draws(60, 3)
    guide.train()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    before = torch.get_rng_state(), numpy_state[1].tolist()
    first = report(model, guide, x).to_dict()
    assert torch.equal(torch.get_rng_state(), before[0])
    numpy_state = np.random.get_state()  # noqa: NPY002
    assert numpy_state[1].tolist() == before[1]
    assert guide.training
    assert model.noise.grad is None
    assert not pyro.get_param_store().keys()
    torch.randn(3)
    assert report(model, guide, x).to_dict() == first
    other = report(model, guide, x, seed=1).to_dict()
    assert other["measures"]["w2"] != first["measures"]["w2"]


def test_it_is_one_table_and_goes_into_json(shifted: AlignmentReport, aligned: AlignmentReport) -> None:
    row = json.loads(json.dumps(shifted.to_dict(), allow_nan=False))
    assert row["measures"]["c2st"]["value"] == shifted.c2st.value
    assert row["measures"]["elbo"]["null"] is None
    assert row["per_dimension"]["mean_gap"] == shifted.mean_gaps.tolist()
    lines = str(shifted).splitlines()
    assert len(lines) == 2 + len(shifted.measures()) == 2 + 14
    assert {line.count("|") for line in lines} == {6}
    assert any(line.startswith("| I(x; z), nats (saturated) |") for line in lines)
    assert any("(p = 0.005)" in line for line in lines)
    beside = shifted.to_markdown(reference=aligned).splitlines()
    assert beside[0].endswith("| reference |")
    assert beside[2].endswith(f"| {aligned.mean_gap.value:.3g} |")
    bare = report(Latent(), Encoding(), draws(30, 3), num_bootstrap=0)
    assert math.isnan(bare.c2st.low)
    assert " to " not in str(bare)


def test_the_picture_shows_both_samples(shifted: AlignmentReport, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = shifted.plot(tmp_path / "new" / "alignment.png", "a title")
    pixels = imread(path)
    assert pixels.shape[1] > pixels.shape[0] > 300
    orange = np.abs(pixels[..., :3] * 255 - (0xD9, 0x82, 0x2B)).max(-1) < 3
    assert orange.sum() > 100
    report(Latent(z_dim=1), Encoding(), draws(30, 1)).plot(tmp_path / "line.png")


def test_the_worst_dimensions_come_first() -> None:
    a, b = draws(500, 4), draws(500, 4, seed=1)
    scale = torch.tensor([1.0, 10.0, 1.0, 1.0]).double()
    a[:, 1] += 2  # a fifth of its scale
    a[:, 2] *= 3
    assert worst_dimensions(a, b, scale)[:2].tolist() == [2, 1]
    plane, other = principal_plane(a, b, scale)
    assert plane.shape == other.shape == (500, 2)
    centred = torch.cat([plane, other])
    assert (centred.T @ centred)[0, 1].abs() < 1e-8
    assert centred[:, 0].var() > centred[:, 1].var()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": torch.zeros(19, 3)}, "x must be at least 20, got 19"),
        ({"num_prior": 3}, "num_prior must be at least 20, got 3"),
        ({"max_points": 3}, "max_points must be at least 20, got 3"),
        ({"num_bootstrap": -1}, "num_bootstrap must not be negative, got -1"),
        ({"codes": torch.zeros(5, 3)}, r"codes must have shape \(30, e\), got \(5, 3\)"),
        ({"reference": torch.zeros(30, 3)}, "reference needs features"),
        ({"y": torch.zeros(4)}, "y must have one row for each of the 30 data, got 4"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(30, 3), **settings}
    with pytest.raises(ValueError, match=message):
        alignment_report(Latent(), Encoding(), **arguments)
