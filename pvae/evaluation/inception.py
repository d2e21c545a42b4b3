"""Features of Inception v3 where its weights are on disk (Szegedy et al. 2016, arXiv:1512.00567v3)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.data import MissingData
from pvae.data._torchvision import inception_network
from pvae.inference.isolation import evaluating, isolated_rng

from .features import FeatureExtractor

__all__ = ["inception_features"]

_FILE = "inception_v3_google-0cc3c7bd.pth"
_SIDE = 299
_ROWS = 50  # images in one pass
# Mean and standard deviation of ImageNet's channels, on [0, 1].
_LOC, _SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inception_features(
    path: str | Path | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    device: str | torch.device | None = None,
) -> FeatureExtractor:
    """Return the 2,048 pooled features of torchvision's Inception v3 as a function of images.

    Nothing is downloaded. Images are resized bilinearly to 299x299; of one channel three are made. The
    network of published FIDs is another port with other weights: values in these features are not to be
    compared with published ones.

    Args:
        path: File of the weights, as torchvision distributes them; by default the one in torch's cache.
        bounds: What the images' values are black and white at; values beyond are cut off.
        device: Where to compute; by default on the CPU.

    Returns:
        A function from images ``(N, 1 or 3, H, W)`` to features ``(N, 2048)`` on the CPU.

    Raises:
        pvae.data.MissingData: If the file is not there.
        ValueError: If it holds something else, or ``bounds`` are not ordered.
    """
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be ordered, got {bounds}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / _FILE if path is None else Path(path)
    if not file.is_file():
        raise MissingData(
            f"path must be a file of Inception's weights, which are not downloaded, and {file} is not there: "
            "take the features of a classifier trained on the data (fit_classifier), or copy the file there"
        )
    with isolated_rng(torch.device("cpu")):  # layers draw weights that are about to be replaced
        network: nn.Module = inception_network()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        # A file of anything else fails in as many ways as there are formats.
        raise ValueError(f"path must be a file of torchvision's Inception v3, got {file}") from error
    network.fc = nn.Identity()
    network.eval().requires_grad_(False).to(device)
    place = next(network.parameters()).device
    loc, scale = (torch.tensor(value, device=place).reshape(3, 1, 1) for value in (_LOC, _SCALE))

    def features(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x must have shape (N, 1 or 3, H, W), got {tuple(x.shape)}")
        found = []
        with evaluating(network):
            for part in x.split(_ROWS):
                image = ((part.to(place, torch.float32) - low) / (high - low)).clamp(0, 1)
                image = F.interpolate(image.expand(-1, 3, -1, -1), (_SIDE, _SIDE), mode="bilinear")
                found.append(network((image - loc) / scale).cpu())
        return torch.cat(found)

    return features
