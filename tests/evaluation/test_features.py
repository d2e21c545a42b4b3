"""The classifier: that it learns in seconds, leaves nothing behind, and comes back from its file."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from pvae.data import Data, from_tensors, load
from pvae.evaluation import LabelClassifier, fit_classifier, frechet_distance
from pvae.evaluation.features import _one_against_rest


@pytest.fixture(scope="module")
def digits() -> tuple[Data, LabelClassifier]:
    data = load("digits", binarize="none")
    return data, fit_classifier(data.train, data.valid, progress=False)


@pytest.fixture(scope="module")
def sprites() -> tuple[Data, LabelClassifier]:
    data = load("sprites", num_train=3000, num_test=500, valid=300)
    return data, fit_classifier(data.train, data.valid, width=8, epochs=10, progress=False)


def test_it_learns_classes(digits: tuple[Data, LabelClassifier]) -> None:
    data, classifier = digits
    found = classifier.accuracy(data.test)
    assert found.overall > 0.95
    assert found.auc > 0.995
    assert data.test.y is not None
    said = classifier.predict(data.test.x)
    assert said.dtype == torch.int64
    assert float((said == data.test.y).double().mean()) == pytest.approx(found.overall)


def test_it_learns_attributes(sprites: tuple[Data, LabelClassifier]) -> None:
    data, classifier = sprites
    found = classifier.accuracy(data.test)
    assert found.overall > 0.97
    assert found.exact > 0.8
    assert found.per_label.shape == (10,)
    assert set(classifier.predict(data.test.x).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(classifier.predict(data.test.x), (classifier.log_odds(data.test.x) > 0).float())


def test_it_learns_from_flat_data() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.randn(600, 5, generator=generator) + 100 + 4 * torch.nn.functional.one_hot(y, 5)
    data = from_tensors(x, y=y, name="three")
    classifier = fit_classifier(data.train, epochs=30, progress=False)
    # Half the distance of two means is 2.8: the best rule errs on about 0.5 %.
    assert classifier.accuracy(data.train).overall > 0.97
    assert classifier.features(x).shape == (600, 64)


def test_features_do_not_depend_on_batches(digits: tuple[Data, LabelClassifier]) -> None:
    data, classifier = digits
    classifier.train()
    many = data.train.x[:1200]
    features = classifier.features(many)
    assert classifier.training
    assert features.shape == (1200, 64)
    assert not features.requires_grad
    torch.testing.assert_close(features[1100:1101], classifier.features(many[1100:1101]))
    assert (features >= 0).all()  # after a rectifier
    classifier.eval()
    torch.testing.assert_close(classifier.head(features), classifier(many))


def test_the_proxy_tells_noise_from_data(digits: tuple[Data, LabelClassifier]) -> None:
    data, classifier = digits
    real = classifier.features(data.test.x)
    train = frechet_distance(classifier.features(data.train.x[:300]), real)
    noise = frechet_distance(classifier.features(torch.rand(300, 1, 8, 8)), real)
    assert noise > 5 * train > 0


def test_gradients_pass_through_the_bare_network() -> None:
    x = torch.rand(4, 1, 9, 7, requires_grad=True)
    classifier = LabelClassifier((1, 9, 7), "attributes", 3)
    classifier(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "shape"), [("class", (2, 16, 16)), ("attributes", (7,)), ("class", (4, 3))])
def test_a_file_brings_it_back(kind: Literal["class", "attributes"], shape: Any, tmp_path: Path) -> None:
    classifier = LabelClassifier(shape, kind, 5, feature_dim=12, width=4)
    classifier(torch.randn(30, *shape))  # moves the running means
    path = classifier.save(tmp_path / "new" / "classifier.safetensors")
    again = LabelClassifier.load(path)
    x = torch.randn(6, *shape)
    assert torch.equal(again.log_odds(x), classifier.log_odds(x))
    assert torch.equal(again.features(x), classifier.features(x))
    assert again.features(x).shape == (6, 12)
    assert not again.training


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="path must hold a classifier written by save"):
        LabelClassifier.load(path)
    config = json.dumps({"x_shape": [3], "kind": ["x" * 3000], "size": 2})
    save_file({"x": torch.zeros(1)}, path, {"pvae.LabelClassifier": config})
    with pytest.raises(ValueError, match="holds no classifier as save writes it: kind must be") as caught:
        LabelClassifier.load(path)
    assert len(str(caught.value)) < 600


def test_training_follows_its_seed_and_leaves_the_generators() -> None:
    data = load("digits")
    train = data.train[:256]

    def state() -> list[Any]:
        numpy_state: Any = np.random.get_state()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()]

    before = state()
    first, same, other = (
        fit_classifier(train, epochs=1, seed=seed, width=4, progress=False) for seed in (1, 1, 2)
    )
    assert state() == before
    x = data.test.x[:5]
    assert torch.equal(first.log_odds(x), same.log_odds(x))
    assert not torch.equal(first.log_odds(x), other.log_odds(x))


def test_the_best_epoch_is_kept() -> None:
    data = load("digits")
    train, y = data.train[:100], data.train.y
    assert y is not None
    # Validation labels that training contradicts ever more: the first epoch is the best.
    wrong = from_tensors(train.x, y=(y[:100] + 1) % 10, name="wrong").train
    kept = fit_classifier(train, wrong, epochs=20, batch_size=50, progress=False)
    last = fit_classifier(train, epochs=20, batch_size=50, progress=False)
    losses = [nn.functional.cross_entropy(c(wrong.x), (y[:100] + 1) % 10).item() for c in (kept, last)]
    assert losses[0] < losses[1] - 0.5


def test_log_odds_are_of_one_class_against_the_rest() -> None:
    logits = 3 * torch.randn(50, 4, dtype=torch.float64)
    p = logits.softmax(-1)
    torch.testing.assert_close(_one_against_rest(logits), (p / (1 - p)).log())
    # Where a probability rounds to one, its logarithm of odds is still exact.
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    torch.testing.assert_close(_one_against_rest(sure)[0, 0], torch.tensor(60 - 0.6931472))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((((1, 8, 8)), "words", 3), "kind must be 'class' or 'attributes', got 'words'"),
        ((((1, 8, 8)), "class", 0), "must be positive"),
        (((), "class", 3), "must be positive"),
    ],
)
def test_bad_classifiers_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelClassifier(*arguments)


def test_bad_data_are_named() -> None:
    classifier = LabelClassifier((1, 8, 8), "class", 3)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 8, 8\), got \(2, 1, 9, 9\)"):
        classifier.features(torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match="y must be given"):
        classifier.accuracy(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="train must have labels"):
        fit_classifier(from_tensors(torch.rand(9, 4), name="bare").train)
    with pytest.raises(ValueError, match="epochs must be positive, got 0"):
        fit_classifier(load("digits").train, epochs=0)
