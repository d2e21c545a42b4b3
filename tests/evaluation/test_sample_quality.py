"""Sample quality of models whose samples are known, with features that are the data themselves."""

import json
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.data import Data, from_tensors
from pvae.evaluation import fit_classifier, sample_quality
from pvae.evaluation.frechet import frechet_distance
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import MLPDecoder
from pvae.priors import StandardNormal
from pvae.testing import LinearGaussianVAE

from .programs import Latent, Layers
from .traces import everything


def gaussian(num: int = 1200, seed: int = 0) -> tuple[LinearGaussianVAE, Data]:
    torch.manual_seed(seed)
    exact = LinearGaussianVAE(x_dim=4, z_dim=2, scale=0.5)
    x = exact.model.sample(2 * num)
    return exact, from_tensors(x[:num], test=x[num:], scale="real")


def same(x: Tensor) -> Tensor:
    return x


def test_the_true_model_scores_as_training_data_do() -> None:
    exact, data = gaussian()
    found = sample_quality(exact.model, data, features=same)
    assert found.num_samples == 1200
    assert found.frechet.value < 3 * found.frechet_floor
    assert abs(found.kernel.value) < 3 * found.kernel.standard_error
    for name in ("precision", "recall", "coverage", "density"):
        ours, floor = (getattr(f, name) for f in (found.precision_recall, found.precision_recall_floor))
        assert ours == pytest.approx(floor, abs=0.08)
    assert found.copying == pytest.approx(1, abs=0.15)
    assert found.nearest.dtype == torch.float64


def test_a_shifted_model_is_as_far_as_its_shift() -> None:
    exact, data = gaussian()
    with torch.no_grad():
        exact.model.bias.add_(1.5)  # Frechet distance of equal covariances: 4 dimensions x 1.5^2
    found = sample_quality(exact.model, data, features=same, num_samples=1000)
    assert found.frechet.low < 9 + 1.0
    assert found.frechet.value == pytest.approx(9, rel=0.15)
    assert found.kernel.value > 5 * found.kernel.standard_error
    assert found.precision_recall.precision < 0.7 * found.precision_recall_floor.precision


def test_means_lack_the_noise() -> None:
    exact, data = gaussian()
    draws, means = (
        sample_quality(exact.model, data, features=same, values=kind) for kind in ("draws", "means")
    )
    assert means.frechet.value > 5 * draws.frechet.value
    assert means.shown == "means"


def test_copies_are_told_from_samples() -> None:
    _, data = gaussian(300)

    class Copies(nn.Module):
        """Draws training data, with hardly any noise."""

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            with pyro.plate("data", len(x)):
                rows = torch.randint(len(data.train), (len(x),))
                return pyro.sample("x", dist.Normal(data.train.x[rows], 1e-4).to_event(1), obs=x)

    found = sample_quality(Copies(), data, features=same)
    assert found.copying < 0.01
    assert found.precision_recall.precision > 0.7


def test_labels_of_the_test_data_are_the_contexts() -> None:
    torch.manual_seed(0)
    y = torch.arange(800) % 2
    x = 6.0 * y.unsqueeze(-1) + torch.randn(800, 3) * 1.25**0.5
    data = from_tensors(x[:400], test=x[400:], y={"train": y[:400], "test": y[400:]}, scale="real")
    right, wrong = (
        sample_quality(Latent(label_weight=weight), data, features=same) for weight in (6.0, -6.0)
    )
    assert right.frechet.value < 3 * right.frechet_floor < 1
    assert wrong.frechet.value > 10


def test_models_with_several_latents_go_through_their_traces() -> None:
    model, data = Layers(), from_tensors(torch.randn(60, 3), test=torch.randn(60, 3), scale="real")
    assert sample_quality(model, data, features=same, num_bootstrap=2).frechet.value > 0


def test_the_default_features_are_those_of_a_classifier_of_the_data() -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = (torch.rand(200, 1, 6, 6) < 0.2 + 0.6 * y.reshape(-1, 1, 1, 1)).float()
    labels = {"train": y[:120], "valid": y[120:140], "test": y[140:]}
    data = from_tensors(x[:120], valid=x[120:140], test=x[140:], y=labels)
    model = VAE(StandardNormal(2), MLPDecoder(2, data.x_shape), Bernoulli())
    quick: dict[str, Any] = {"num_samples": 60, "num_bootstrap": 0, "seed": 3}
    found = sample_quality(model, data, **quick)
    features = fit_classifier(data.train, data.valid, seed=3).features
    assert found.frechet.value == sample_quality(model, data, features=features, **quick).frechet.value
    assert found.extractor == "features of a classifier of these data"
    assert found.frechet.value > 3 * found.frechet_floor
    assert found.protocol is not None


def test_the_frechet_distance_is_biased_at_small_samples_and_the_kernel_distance_is_not() -> None:
    exact, data = gaussian(2000)
    frechet, kernel = zip(
        *[
            (found.frechet_floor, found.kernel_floor.value / found.kernel_floor.standard_error)
            for num in (50, 1000)
            for found in [sample_quality(exact.model, data, features=same, num_samples=num, num_bootstrap=0)]
        ],
        strict=True,
    )
    assert frechet[0] > 5 * frechet[1]
    assert max(abs(k) for k in kernel) < 3


def test_it_is_reproducible_and_leaves_no_trace() -> None:
    exact, data = gaussian(100)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    net = Net().train()
    exact.model.train()
    before = everything(exact.model, net)
    found = sample_quality(exact.model, data, features=net)
    assert everything(exact.model, net) == before
    again = sample_quality(exact.model, data, features=net)
    assert found.to_dict() == again.to_dict()
    assert found.to_dict() != sample_quality(exact.model, data, features=net, seed=1).to_dict()


def test_it_reads_and_writes() -> None:
    exact, data = gaussian(60)
    found = sample_quality(exact.model, data, features=same, num_bootstrap=0)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["frechet"]["low"] is None
    assert record["num_samples"] == 60
    assert len(record["per_datum"]["nearest"]) == 60
    assert "biased upwards" in str(found)
    assert "\n" not in str(found)
    assert found.to_markdown().splitlines()[0] == "| 60 draws, features given | samples | training data |"


def test_the_frechet_distance_is_that_of_the_features() -> None:
    exact, data = gaussian(80)
    found = sample_quality(exact.model, data, features=lambda x: x[:, :2] ** 2, num_bootstrap=0)
    expected = frechet_distance(data.train.x[:, :2] ** 2, data.test.x[:, :2] ** 2)
    assert found.frechet_floor == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 61, "features": same}, "num_samples must lie between 20 and 60"),
        ({"num_samples": 3, "features": same}, "num_samples must lie between 20 and 60"),
        ({"values": "modes"}, "values must be 'draws' or 'means', got 'modes'"),
        ({}, "features must be given: the data have no labels"),
        ({"features": lambda x: x.sum(-1)}, r"features must return shape \(60, F\), got \(60,\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    exact, data = gaussian(60)
    with pytest.raises(ValueError, match=message):
        sample_quality(exact.model, data, **options)


class Meanless(dist.Normal):
    @property
    def mean(self) -> Tensor:
        raise NotImplementedError

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return Meanless(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def test_what_has_no_mean_is_drawn() -> None:
    _, data = gaussian(60)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", Meanless(torch.zeros_like(x), torch.ones_like(x)).to_event(1), obs=x)

    assert sample_quality(model, data, features=same, num_bootstrap=0).frechet.value > 0
    with pytest.raises(ValueError, match="values must be 'draws' for a Independent, which has no mean"):
        sample_quality(model, data, features=same, values="means")


def test_only_a_data_set_has_a_floor() -> None:
    exact, data = gaussian(60)
    with pytest.raises(TypeError, match="data must be a data set with train and test parts, got Split"):
        sample_quality(exact.model, data.test, features=same)  # type: ignore[arg-type]
