"""Scores under one interface: each is what it is named for, and false alarms keep their level."""

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import (
    OODScore,
    best_labels,
    compressed_bits,
    conformal_test,
    detect,
    familiar_data,
    fit_cloud,
    latent_scores,
    likelihood_regret,
    log_likelihood,
    ood_scores,
    pixel_levels,
    typicality,
)
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE

from .programs import Encoding, Latent
from .traces import everything

ALL: tuple[OODScore, ...] = get_args(OODScore)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(num: int, seed: int = 0) -> Tensor:
    return (draws(num, 1, 4, 4, seed=seed) > 0).float()


def image_programs() -> tuple[VAE, NormalGuide]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 4, 4), hidden=(8,)), Bernoulli())
    return model, NormalGuide(MLPEncoder((1, 4, 4), 2, hidden=(8,)))


def test_every_score_is_what_it_is_named_for() -> None:
    model, guide = image_programs()
    data = from_tensors(images(60), test=images(20, seed=1))
    found = ood_scores(
        model, guide, data.test, which=ALL, training=data.train, num_particles=40, num_steps=4, seed=3
    )
    assert tuple(found) == ALL
    bound = log_likelihood(model, guide, data.test, num_particles=40, seed=3)
    latent = latent_scores(model, guide, data.test, seed=3)
    training = log_likelihood(model, guide, data.train, num_particles=40, seed=3).log_prob
    encoder = guide.encoder
    with torch.no_grad():
        known, codes = (encoder(part.x)[0] for part in (data.train, data.test))
    expected = {
        "log_prob": -bound.log_prob,
        "elbo": -latent.elbo,
        "log_p": -latent.log_p_mean,
        "kl": latent.kl,
        "typicality": typicality(bound.log_prob, training),
        "regret": likelihood_regret(model, guide, data.test, num_steps=4, seed=3).regret,
        "mahalanobis": fit_cloud(known).distance(codes),
        "complexity": -bound.log_prob / math.log(2) - compressed_bits(*pixel_levels(data.test)),
    }
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=1e-5)
        assert found[name].dtype == torch.float64
    assert found.likelihood is not None
    assert torch.equal(found.likelihood.pareto_k, bound.pareto_k)
    assert found.num_data == 20
    assert "k-hat" in str(found)


def test_the_same_from_training_data_that_were_scored_before() -> None:
    oracle = LinearGaussianVAE(x_dim=3, z_dim=2)
    torch.manual_seed(2)
    training, x = oracle.model.sample(50), oracle.model.sample(9)
    known = familiar_data(oracle.model, oracle.exact_guide, training, num_particles=10)
    which: tuple[OODScore, ...] = ("typicality", "mahalanobis")
    once, again = (
        ood_scores(oracle.model, oracle.exact_guide, x, which=which, training=t, num_particles=10)
        for t in (training, known)
    )
    for name in which:
        assert torch.equal(once[name], again[name])
    exact = (oracle.log_prob(x) - oracle.log_prob(training).mean()).abs()
    torch.testing.assert_close(once["typicality"], exact)


def test_complexity_takes_the_part_of_the_image_out_of_the_score() -> None:
    # A model of pixels alone: every image of as many ones is as likely, and noise is dearer to compress.
    noise = (torch.rand(40, 1, 28, 28) > 0.5).float()
    plain = torch.zeros(40, 1, 28, 28)
    plain[:, :, :14] = 1
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), MLPDecoder(2, (1, 28, 28), hidden=(4,)), Bernoulli())
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    guide = NormalGuide(MLPEncoder((1, 28, 28), 2, hidden=(4,)))
    found = [
        ood_scores(model, guide, each, which=("log_prob", "complexity"), num_particles=50)
        for each in (noise, plain)
    ]
    assert found[0]["log_prob"].mean() == pytest.approx(found[1]["log_prob"].mean(), abs=0.5)
    assert float(found[0]["complexity"].mean()) < 0 < float(found[1]["complexity"].mean())


def test_areas_are_scikit_learns_and_false_alarms_those_of_the_conformal_test(float64: None) -> None:
    model, guide = Latent(), Encoding(0.8, 0.0, 0.4)
    training, inside = 2.0 * draws(300, 3, seed=5), 2.0 * draws(201, 3)
    outside, other = 4.0 * draws(80, 3, seed=1), 2.0 * draws(200, 3, seed=2)
    which: tuple[OODScore, ...] = ("elbo", "log_p", "mahalanobis", "log_prob", "typicality")
    known = familiar_data(model, guide, training, which=which, num_particles=30)
    scores = [
        ood_scores(model, guide, x, which=which, training=known, num_particles=30)
        for x in (inside, outside, other)
    ]
    found = detect(scores[0], scores[1], scores[2], num_bootstrap=50)
    label = np.repeat([0, 1], [201, 80])
    for name, detector in found.detectors.items():
        both = torch.cat([scores[0][name], scores[1][name]]).numpy()
        assert detector.auroc.value == pytest.approx(roc_auc_score(label, both), abs=1e-12)
        expected = conformal_test(scores[2][name], scores[0][name], scores[1][name])
        assert detector.conformal.levels == expected.levels
        assert all(level.holds for level in expected.levels), name
        for level in expected.levels:  # within the binomial bounds
            assert level.false_alarms.low <= level.alpha <= level.false_alarms.high
        assert detector.delta > 0
    assert found.detectors[found.best].auroc.value > 0.7
    assert found.calibration == "200 data of another sample"
    halves = detect(scores[0], scores[1], num_bootstrap=0)
    assert halves.detectors["elbo"].conformal.num_calibration == 100
    assert len(halves.detectors["elbo"].conformal.p_inside) == 101


def test_false_alarms_have_their_rate_over_many_samples() -> None:
    rates = []
    for seed in range(80):
        inside, strange = ({"score": draws(num, seed=i)} for num, i in ((120, seed), (5, 1000 + seed)))
        found = detect(inside, strange, levels=[0.1], num_bootstrap=0, seed=seed)
        rates.append(found.detectors["score"].conformal.levels[0].false_alarms.value)
    assert np.mean(rates) == pytest.approx(6 / 61, abs=4 * float(np.std(rates)) / math.sqrt(80))
    assert scipy.stats.sem(rates) < 0.01


def test_a_drift_and_few_calibration_data_are_said() -> None:
    inside, outside = {"score": 3 * draws(100).abs()}, {"score": draws(30, seed=1)}
    found = detect(inside, outside, {"score": draws(50, seed=2).abs()}, num_bootstrap=0)
    text = str(found)
    assert "more false alarms than chance explains, for score" in text
    assert "(!)" in text
    assert "No p-value is below 1/51" in text
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["khat_share"] == {"inside": None, "outside": None}


def test_high_k_hats_are_said(float64: None) -> None:
    model, guide, x = Latent(), Encoding(0.1, 0.0, 0.05), draws(60, 3)
    scores = [ood_scores(model, guide, each, which=("log_prob",), num_particles=100) for each in (x, 3 * x)]
    found = detect(scores[0], scores[1], num_bootstrap=0)
    assert found.khat_share[0] > 0.5
    assert "k-hat of log p(x) is high for" in str(found)
    assert "DefensiveGuide" in str(scores[0])


def test_under_a_conditional_model_the_best_label_can_be_taken(float64: None) -> None:
    y = torch.arange(30) % 3
    x = 4 * y.unsqueeze(-1) + 0.3 * draws(30, 3)
    model, guide, labels = Latent(label_weight=4.0), Encoding(), torch.tensor([0, 1, 2])
    which: tuple[OODScore, ...] = ("elbo", "mahalanobis")
    found = ood_scores(model, guide, x, which=which, labels=labels, training=x)
    assert found.labelled
    own = best_labels(model, guide, x, labels)
    assert torch.equal(own, y)
    given = ood_scores(model, guide, x, own, which=("elbo",))
    assert torch.equal(found["elbo"], given["elbo"])
    assert not given.labelled
    with pytest.raises(ValueError, match="y and labels must not both be given"):
        ood_scores(model, guide, x, y, which=("elbo",), labels=labels)
    plain = ood_scores(Latent(), guide, x, which=("elbo",), labels=labels)
    assert not plain.labelled


def test_it_changes_nothing_and_follows_its_seed() -> None:
    model, guide = image_programs()
    guide.train()
    x = images(12)
    before = everything(model, guide)
    how: dict[str, Any] = {"which": ALL, "training": images(30, seed=1), "num_steps": 2, "num_particles": 5}
    first = ood_scores(model, guide, x, **how)
    assert everything(model, guide) == before
    torch.manual_seed(4)
    assert ood_scores(model, guide, x, **how).to_dict() == first.to_dict()
    assert ood_scores(model, guide, x, seed=1, **how).to_dict() != first.to_dict()
    record = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert record["per_datum"]["kl"] == first["kl"].tolist()
    assert len(first) == len(ALL)


def test_bad_arguments_are_named(float64: None) -> None:
    model, guide, x = Latent(), Encoding(), draws(6, 3)
    with pytest.raises(ValueError, match=r"which must name some of log_prob, .*, got odd"):
        ood_scores(model, guide, x, which=("odd",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"which must name some of .*, got none"):
        ood_scores(model, guide, x, which=())
    with pytest.raises(ValueError, match="training must be given for 'typicality'"):
        ood_scores(model, guide, x)
    known = familiar_data(model, guide, x, num_particles=5)
    with pytest.raises(ValueError, match="training must be scored with 9 particles as x is, got 5 particles"):
        ood_scores(model, guide, x, which=("typicality",), training=known, num_particles=9)
    bare = familiar_data(model, guide, x, which=("typicality",), num_particles=5)
    with pytest.raises(ValueError, match="training must hold codes for 'mahalanobis'"):
        ood_scores(model, guide, x, which=("mahalanobis",), training=bare)
    with pytest.raises(ValueError, match="complexity needs levels"):
        ood_scores(model, guide, x, which=("complexity",), num_particles=2)
    with pytest.raises(ValueError, match=r"outside must have the scores \['a'\], got \['b'\]"):
        detect({"a": x[:, 0]}, {"b": x[:, 0]})
    with pytest.raises(ValueError, match="outside must have scores of one number of data, at least 2"):
        detect({"a": x[:, 0]}, {"a": x[:1, 0]})
