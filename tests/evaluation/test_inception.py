"""Inception's features: refused without weights, and torchvision's own with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvae.data import MissingData
from pvae.data._torchvision import inception_network
from pvae.evaluation import inception_features


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    torch.save(inception_network().state_dict(), path)
    yield path
    path.unlink()


def test_without_weights_it_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        MissingData, match=r"inception_v3_google-0cc3c7bd\.pth is not there: take the features of"
    ):
        inception_features()


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a file of torchvision's Inception v3, got"):
        inception_features(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="bounds must be ordered"):
        inception_features(tmp_path / "other.pth", bounds=(1.0, 0.0))


def test_with_weights_it_is_the_pooled_layer(weights: Path) -> None:
    before: Any = torch.get_rng_state()
    features = inception_features(weights, bounds=(0.0, 255.0))
    image = torch.rand(2, 1, 32, 32) * 255
    torch.set_rng_state(before)
    found = features(image)
    assert torch.equal(torch.get_rng_state(), before)
    # By hand: the network's input to its last layer.
    network = inception_network()
    network.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[torch.Tensor] = []
    network.fc.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    wide = torch.nn.functional.interpolate(image / 255, (299, 299), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        network.eval()(torch.stack([(wide[:, c] - mean[c]) / std[c] for c in range(3)], 1).float())
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1 or 3, H, W\), got \(2, 4\)"):
        features(torch.zeros(2, 4))
