"""A prior that is the aggregate posterior passes; planted faults are found, each by what should see it."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import alignment_report, find_holes, mutual_information, prior_match
from pvae.testing import LinearGaussianVAE

from .programs import Encoding, Latent, Layers
from .traces import everything


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FAST: dict[str, Any] = {"num_bootstrap": 0, "max_points": 100}


def test_an_exact_prior_passes_with_p_values_that_are_uniform(float64: None) -> None:
    p: dict[str, list[float]] = {}
    for seed in range(20):
        # z = 0.8 x + 0.6 e is of N(0, I).
        found = prior_match(Latent(2), Encoding(0.8, 0.0, 0.6), draws(50, 2, seed=seed), seed=seed, **FAST)
        for name, value in found.differs.items():
            p.setdefault(name, []).append(value)
    assert set(p) == {"MMD", "holes", "C2ST, logistic", "C2ST, mlp"}
    for name, values in p.items():
        assert scipy.stats.kstest(values, "uniform", alternative="greater").pvalue > 1e-3, name
        assert np.mean(values) < 0.75, name
    assert scipy.stats.kstest(p["MMD"], "uniform").pvalue > 1e-3


def test_w2_and_divergences_are_those_of_the_two_normals(float64: None) -> None:
    # z of N(0.5, 1.5^2 I) against N(0, I) in three dimensions.
    gain = math.sqrt(1.5**2 - 0.25)
    found = prior_match(Latent(), Encoding(gain, 0.5, 0.5), draws(800, 3), num_bootstrap=50, max_points=400)
    w2 = 3 * (0.5**2 + 0.5**2)
    kl = 3 * 0.5 * (1.5**2 + 0.5**2 - 1 - math.log(1.5**2))
    assert found.w2.low < w2 < found.w2.high
    assert found.w2.null < 0.05
    assert found.information.kl_low is not None
    assert found.information.kl_high is not None
    assert found.information.kl_low.low < kl < found.information.kl_high.high
    assert float(found.marginals.low.sum()) - 0.3 < kl < float(found.marginals.high.sum()) + 0.3
    assert found.mmd2.p_value == pytest.approx(1 / 101)
    assert found.mmd2.low > found.mmd2.null
    assert found.c2st["mlp"].p_value < 1e-3
    assert found.p_value < 0.01


def test_a_shift_is_seen_by_a_line_and_a_hole_by_neighbours(float64: None) -> None:
    shifted = prior_match(Latent(), Encoding(0.8, 0.7, 0.6), draws(300, 3), **FAST)
    assert shifted.c2st["logistic"].p_value < 1e-3
    x = draws(4000, 2)
    ring = x[x.norm(dim=1) > 1][:600]
    hole = prior_match(Latent(2), Encoding(1.0, 0.0, 0.02), ring, num_bootstrap=0)
    assert hole.holes.found
    assert 0.1 < hole.holes.mass.value < 1 - math.exp(-0.5)
    assert hole.c2st["logistic"].p_value > 1e-3
    assert hole.c2st["mlp"].p_value < 1e-3
    assert "of the prior in holes" in str(hole)


def test_one_implementation_stands_behind_it_and_the_other_reports(float64: None) -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2)
    torch.manual_seed(3)
    x = oracle.model.sample(120)
    found = prior_match(oracle.model, oracle.exact_guide, x, num_bootstrap=20)
    alone = mutual_information(oracle.model, oracle.exact_guide, x, num_bootstrap=20)
    assert alone == found.information
    other = alignment_report(oracle.model, oracle.exact_guide, x, num_bootstrap=0)
    assert other.rate.value == pytest.approx(found.information.low.value, abs=0.6)  # other draws
    assert found.activity.relative_count == round(other.active_units.value) == 2


def test_several_sites_stand_side_by_side(float64: None) -> None:
    found = prior_match(Layers(), Layers(guide=True), draws(300, 3), **FAST)
    assert found.activity.sites == {"z_2": 2, "z_1": 1}
    assert len(found.marginals.high) == 3
    assert found.p_value < 0.01  # its posterior's variance is half the prior's


def test_under_labels_a_mismatch_within_a_label_is_seen(float64: None) -> None:
    y = torch.arange(400) % 2
    # Codes of each label where the prior has those of the other: overall they match.
    x = 3.0 * (1 - y).unsqueeze(-1) + 0.8 * draws(400, 1)
    found = prior_match(Latent(1, label_weight=3.0), Encoding(1.0, 0.0, 0.6), x, y, num_bootstrap=0)
    assert found.mmd2.p_value > 0.01
    assert found.c2st["mlp"].p_value > 1e-3
    assert found.c2st_with_y is not None
    assert found.c2st_with_y.p_value < 1e-20
    assert found.p_value < 1e-15
    assert "with y" in found.to_markdown()


def test_kernels_are_passed_on(float64: None) -> None:
    x = draws(60, 3)
    found = [prior_match(Latent(), Encoding(), x, kernel=kernel, **FAST) for kernel in ("rbf", "imq")]
    assert found[0].mmd2 != found[1].mmd2
    assert "imq kernel" in found[1].to_markdown()


def test_it_changes_nothing_and_follows_its_seed() -> None:
    model, guide = Latent(), Encoding()
    data = from_tensors(draws(40, 3).float(), test=draws(40, 3, seed=1).float())
    guide.train()
    before = everything(model, guide)
    first = prior_match(model, guide, data.test, num_bootstrap=10)
    assert everything(model, guide) == before
    torch.manual_seed(9)
    again = prior_match(model, guide, data.test, num_bootstrap=10)
    assert first.to_dict() == again.to_dict()
    assert prior_match(model, guide, data.test, num_bootstrap=10, seed=1).to_dict() != first.to_dict()
    record = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert record["protocol"]["part"] == "test"
    assert record["p_value"] == first.p_value
    assert "\n" not in str(first)
    assert first.to_markdown().count("\n| ") == 6
    assert find_holes(draws(40, 3), draws(40, 3)).level == first.holes.level


def test_bad_arguments_are_named() -> None:
    model, guide, x = Latent(), Encoding(), draws(30, 3).float()
    with pytest.raises(ValueError, match="x must be at least 20, got 5"):
        prior_match(model, guide, x[:5])
    with pytest.raises(ValueError, match="num_prior must be at least 20, got 3"):
        prior_match(model, guide, x, num_prior=3)
    with pytest.raises(ValueError, match="num_bootstrap must not be negative"):
        prior_match(model, guide, x, num_bootstrap=-1)
    with pytest.raises(ValueError, match="kernel must be one of"):
        prior_match(model, guide, x, kernel="box")  # type: ignore[arg-type]
