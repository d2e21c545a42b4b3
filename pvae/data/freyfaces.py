"""Frey faces: 1,965 frames of one face, 28x20, 256 levels (Roweis, Saul, Hinton 2002)."""

import numpy as np
import torch

from ._npz import Expected, read_npz
from ._request import Request
from ._seeds import derive_seed
from .dataset import Source
from .errors import DataError

__all__ = ["freyfaces"]

_FILE = "freyfaces/freyfaces.npz"
_N, _TEST, _VALID = 1_965, 200, 200


def freyfaces(request: Request, *, split: str = "blocks") -> Source:
    """Read ``freyfaces/freyfaces.npz``: ``images`` (1965, 28, 20) uint8 in time order.

    ``x_shape`` is (1, 28, 20), and there are no labels.
    The test part has 200 frames, the validation part 200 (``valid``), the training part the rest.

    Args:
        request: What is asked for.
        split: ``"blocks"``: the parts follow each other in time, training first, as neighbouring frames are
            nearly equal and a random split tests on what was trained on. ``"shuffled"``: at random by
            ``seed``, in the sizes of Tomczak and Welling 2018 (arXiv:1705.07120), 1565 / 200 / 200; their
            draw is not recorded.
    """
    if split not in ("blocks", "shuffled"):
        raise DataError(f"split must be 'blocks' or 'shuffled', got {split!r}")
    arrays = read_npz(
        request.name,
        request.root,
        _FILE,
        {"images": Expected("u", (_N, 28, 20))},
        "; there is no download of this archive",
    )
    images = arrays["images"]
    if split == "shuffled":
        images = images[np.random.default_rng(derive_seed("freyfaces", request.seed)).permutation(_N)]
    x = torch.from_numpy(images).unsqueeze(1)
    return Source(
        kind="levels",
        levels=256,
        binarize=None,
        split="blocks of time: train, validation, test" if split == "blocks" else "shuffled frames",
        seeded=split == "shuffled",
        parts={**request.hold_out(x[:-_TEST], None, default=_VALID), "test": (x[-_TEST:], None)},
        note=""
        if split == "blocks"
        else "neighbouring frames stand in different parts: not a held-out likelihood",
    )
