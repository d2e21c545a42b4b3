"""Data from elsewhere, where the scores of both samples are normal and everything about them is known."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import (
    best_labels,
    compare_scores,
    conformal_test,
    label_candidates,
    latent_scores,
    ood_report,
)

from .programs import Encoding, Latent


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_areas_and_differences_are_the_known_ones(float64: None) -> None:
    # One latent of N(0, 1), the code of x is x: log p at the mean is -x^2 / 2 up to a constant.
    inside, outside = draws(3000, 1), 2 * draws(2000, 1, seed=1)
    found = ood_report(Latent(1), Encoding(1.0, 0.0, 0.5), inside, outside, num_samples=4)
    # P(4 chi^2 > chi^2') for one degree of freedom each: (2 / pi) atan 2.
    area = found.detectors["log_p_mean"].auroc
    assert area.low < 2 / math.pi * math.atan(2) < area.high
    assert found.delta_s == pytest.approx(-(4 - 1) / 2, abs=4 * found.detectors["log_p_mean"].standard_error)
    assert found.detectors["log_p_mean"].standard_error == pytest.approx(
        math.hypot(math.sqrt(0.5 / 3000), 4 * math.sqrt(0.5 / 2000)), rel=0.1
    )
    # KL = (x^2 + sd^2 - 1) / 2 - log sd; entropy is that of N(x, 1/4) everywhere.
    assert found.delta_kl == pytest.approx(-found.delta_s, rel=1e-9)
    assert found.delta_entropy == pytest.approx(0, abs=1e-9)
    assert found.detectors["entropy"].auroc.value == pytest.approx(0.5, abs=1e-9)
    assert found.detectors["kl"].auroc.value == pytest.approx(area.value, abs=1e-12)


@pytest.mark.parametrize("particles", [None, 3])
def test_every_area_is_scikit_learns_of_the_signed_score(particles: int | None, float64: None) -> None:
    inside, outside = draws(80, 3), 1.5 * draws(60, 3, seed=1) + 0.3
    found = ood_report(
        Latent(), Encoding(0.8, 0.1, 0.4), inside, outside, num_bootstrap=0, num_particles=particles
    )
    names = ["log_p_mean", "log_p", "kl", "entropy", "elbo", *(["log_prob"] if particles else [])]
    assert list(found.detectors) == names
    label = np.repeat([0, 1], [80, 60])
    for name, detector in found.detectors.items():
        here, there = found.inside.columns()[name], found.outside.columns()[name]
        sign = 1 if name in ("kl", "entropy") else -1
        scores = sign * torch.cat([here, there]).numpy()
        assert detector.auroc.value == pytest.approx(roc_auc_score(label, scores), abs=1e-12)
        assert detector.delta == pytest.approx(float(there.mean() - here.mean()))
        error = math.hypot(scipy.stats.sem(here.numpy()), scipy.stats.sem(there.numpy()))
        assert detector.standard_error == pytest.approx(error)


def test_without_calibration_data_the_inside_is_cut_in_halves(float64: None) -> None:
    inside, outside = draws(101, 3), draws(40, 3, seed=1) + 4
    found = ood_report(Latent(), Encoding(), inside, outside, num_bootstrap=0)
    for detector in found.detectors.values():
        assert detector.conformal.num_calibration == 50
        assert len(detector.conformal.p_inside) == 51
    assert "50 of the inside data" in found.calibration
    known = ood_report(
        Latent(), Encoding(), inside, outside, calibration=draws(30, 3, seed=2), num_bootstrap=0
    )
    assert known.detectors["kl"].conformal.num_calibration == 30
    assert len(known.detectors["kl"].conformal.p_inside) == 101
    calibration = latent_scores(Latent(), Encoding(), draws(30, 3, seed=2), seed=2)
    expected = conformal_test(-calibration.elbo, -known.inside.elbo, -known.outside.elbo)
    assert torch.equal(known.detectors["elbo"].conformal.p_outside, expected.p_outside)
    assert known.detectors["elbo"].conformal.levels == expected.levels


def test_false_alarms_of_halves_are_what_they_promise(float64: None) -> None:
    rates = []
    for seed in range(60):
        scores = latent_scores(Latent(), Encoding(), draws(120, 3, seed=seed), num_samples=1)
        found = compare_scores(scores, scores, num_bootstrap=0, levels=[0.1], seed=seed)
        rates.append(found.detectors["log_p_mean"].conformal.levels[0].false_alarms.value)
    assert np.mean(rates) == pytest.approx(6 / 61, abs=4 * float(np.std(rates)) / math.sqrt(60))


def test_a_drift_within_the_inside_is_said(float64: None) -> None:
    found = ood_report(
        Latent(),
        Encoding(),
        1.4 * draws(400, 3),
        draws(50, 3),
        calibration=draws(400, 3, seed=1),
        num_bootstrap=0,
    )
    assert any("more false alarms than chance explains" in note for note in found.notes())
    assert "(!)" in found.to_markdown()
    quiet = ood_report(
        Latent(), Encoding(), draws(400, 3), draws(50, 3), calibration=draws(400, 3, seed=1), num_bootstrap=0
    )
    assert "(!)" not in quiet.to_markdown()


def test_under_a_conditional_model_all_data_get_their_best_label(float64: None) -> None:
    y = torch.arange(90) % 3
    x, other = 4 * y.unsqueeze(-1) + 0.3 * draws(90, 3), 6 + 0.3 * draws(40, 3, seed=1)
    model, guide = Latent(label_weight=4.0), Encoding()
    # Labels that data come with are not looked at: the ones here are wrong.
    data = from_tensors(x.float(), test=x.float(), y={"train": y, "test": (y + 1) % 3})
    found = ood_report(model, guide, data.test, other.float(), num_bootstrap=0)
    assert found.best_labels
    assert found.inside.conditional
    assert found.outside.conditional
    labels = torch.tensor([0, 1, 2])
    own = best_labels(model, guide, data.test, labels)
    assert torch.equal(own, y)
    assert torch.equal(found.inside.kl, latent_scores(model, guide, data.test, own).kl)
    assert found.detectors["log_p_mean"].auroc.value > 0.99  # 6 lies between the labels' 4 and 8
    assert any("label of highest ELBO" in note for note in found.notes())
    given = ood_report(model, guide, x.float(), other.float(), labels=labels, num_bootstrap=0)
    assert torch.equal(given.inside.kl, found.inside.kl)
    with pytest.raises(ValueError, match="labels must be given for a conditional model"):
        ood_report(model, guide, x, other)
    plain = ood_report(Latent(), guide, data.test, other.float(), num_bootstrap=0)
    assert not plain.best_labels
    assert not plain.inside.conditional


def test_candidates_are_the_most_frequent_labels() -> None:
    y = torch.tensor([3, 1, 1, 7, 1, 3])
    assert label_candidates(y).tolist() == [1, 3, 7]
    assert label_candidates(y, 2).tolist() == [1, 3]
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert label_candidates(rows).tolist() == [[0, 1], [1, 0]]


def test_discoveries_are_reported(float64: None) -> None:
    found = ood_report(
        Latent(), Encoding(), draws(200, 3), draws(100, 3, seed=1) + 5, fdr=0.1, num_bootstrap=0
    )
    assert found.detectors["kl"].conformal.discoveries >= 90
    assert any("false discovery rate of 0.1" in note for note in found.notes())


def test_few_calibration_data_are_said(float64: None) -> None:
    found = ood_report(Latent(), Encoding(), draws(40, 3), draws(10, 3), num_bootstrap=0)
    assert any("No p-value is below 1/21" in note for note in found.notes())


def test_what_it_says(float64: None) -> None:
    found = ood_report(Latent(), Encoding(), draws(40, 3), draws(30, 3, seed=1) + 2, num_bootstrap=20)
    record = json.loads(json.dumps(found.to_dict()))
    assert set(record["detectors"]) == set(found.detectors)
    assert record["detectors"]["kl"]["auroc"]["value"] == found.detectors["kl"].auroc.value
    assert len(record["outside"]["per_datum"]["kl"]) == 30
    lines = str(found).splitlines()
    assert "log p(z), z = E z | " in lines[2]
    assert sum(line.startswith("| ") for line in lines) == 2 * (2 + 5)
    assert "delta ELBO" in str(found)
    assert "40 data inside, 30 outside" in str(found)
    bare = ood_report(Latent(), Encoding(), draws(40, 3), draws(30, 3), num_bootstrap=0)
    assert json.loads(json.dumps(bare.to_dict()))["detectors"]["kl"]["auroc"]["low"] is None


def test_the_same_seed_gives_the_same_and_nothing_is_left_behind(float64: None) -> None:
    inside, outside = draws(40, 3), draws(30, 3, seed=1)
    before = torch.get_rng_state()
    first = ood_report(Latent(), Encoding(), inside, outside, num_bootstrap=20).to_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert ood_report(Latent(), Encoding(), inside, outside, num_bootstrap=20).to_dict() == first
    assert ood_report(Latent(), Encoding(), inside, outside, num_bootstrap=20, seed=1).to_dict() != first


def test_bad_arguments_are_refused(float64: None) -> None:
    model, guide, x = Latent(), Encoding(), draws(10, 3)
    with pytest.raises(ValueError, match=r"outside must have data of shape \(3,\), got \(2,\)"):
        ood_report(model, guide, x, x[:, :2])
    with pytest.raises(ValueError, match=r"calibration must have data of shape \(3,\)"):
        ood_report(model, guide, x, x, calibration=x[:, :2])
    with pytest.raises(TypeError, match="inside must be a tensor or a split"):
        ood_report(model, guide, x.numpy(), x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside must hold at least 2 data, got 1"):
        ood_report(model, guide, x, x[:1])
    one, two = latent_scores(model, guide, x, num_samples=1), latent_scores(model, guide, x, num_samples=2)
    with pytest.raises(
        ValueError, match="outside must be scored with the same num_samples as inside, 1, got 2"
    ):
        compare_scores(one, two)
    with pytest.raises(ValueError, match="num_bootstrap must not be negative"):
        compare_scores(one, one, num_bootstrap=-1)


def test_high_k_hats_of_the_bound_are_said(float64: None) -> None:
    guide = Encoding(0.1, 0.0, 0.05)
    found = ood_report(Latent(), guide, draws(40, 3), draws(20, 3), num_particles=60, num_bootstrap=0)
    assert found.inside.khat_share > 0.5
    assert any(note.startswith("k-hat of log p(x) is high for") for note in found.notes())
    without = ood_report(Latent(), guide, draws(40, 3), draws(20, 3), num_bootstrap=0)
    assert not any("k-hat" in note for note in without.notes())
