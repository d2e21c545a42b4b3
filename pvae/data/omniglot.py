"""Omniglot at 28x28: 1,623 characters of 50 alphabets by 20 people (Lake, Salakhutdinov, Tenenbaum 2015)."""

import numpy as np
import torch

from ._npz import Expected, read_npz
from ._request import Request
from .dataset import Source
from .errors import CorruptData, DataError

__all__ = ["omniglot"]

_FILE = "omniglot/omniglot_28x28.npz"
_N, _CHARACTERS, _DRAWERS = 32_460, 1_623, 20


def omniglot(request: Request, *, labels: str = "alphabet") -> Source:
    """Read ``omniglot/omniglot_28x28.npz``, ``x_shape (1, 28, 28)``, ink 255 on 0.

    The archive holds ``images`` (32460, 28, 28) uint8, the area average of the 105x105 bitmaps;
    ``alphabet`` 0 ... 49, ``alphabet_names``, ``character`` 1 ... 1623 and ``drawer`` 1 ... 20. It is our
    own reduction, not the ``chardata.mat`` of the IWAE and VampPrior papers, whose likelihoods are
    therefore not comparable.

    Training data are those of drawers 1 to 15 (24,345, as many as in ``chardata.mat``), test data those of
    drawers 16 to 20 (8,115). In each, data are in the order of drawers, then characters; the last ``valid``
    training data, by default the 1,623 of drawer 15, are the validation part.

    Args:
        request: What is asked for.
        labels: What ``y`` is: ``"alphabet"`` (50 classes) or ``"character"`` (1,623).
    """
    if labels not in ("alphabet", "character"):
        raise DataError(f"labels must be 'alphabet' or 'character', got {labels!r}")
    arrays = read_npz(
        request.name,
        request.root,
        _FILE,
        {
            "images": Expected("u", (_N, 28, 28)),
            "alphabet": Expected("i", (_N,), 0, 49),
            "alphabet_names": Expected("U", (50,)),
            "character": Expected("i", (_N,), 1, _CHARACTERS),
            "drawer": Expected("i", (_N,), 1, _DRAWERS),
        },
        "; there is no download of this reduction",
    )
    drawer, character = arrays["drawer"].astype(np.int64), arrays["character"].astype(np.int64)
    order = np.lexsort((character, drawer))
    # Every person drew every character once: in this order each drawer's stretch runs through all characters.
    if not np.array_equal(character[order], np.tile(np.arange(1, _CHARACTERS + 1), _DRAWERS)):
        raise CorruptData(f"{request.name}: each of {_DRAWERS} drawers must have drawn each character once")
    x = torch.from_numpy(arrays["images"][order]).unsqueeze(1)
    y = torch.from_numpy(
        character[order] - 1 if labels == "character" else arrays["alphabet"][order].astype(np.int64)
    )
    names = arrays["alphabet_names"].tolist()
    train = 15 * _CHARACTERS
    return Source(
        kind="levels",
        levels=256,
        binarize="dynamic",
        split="train: drawers 1-15, test: drawers 16-20, validation: last of train by drawer",
        parts={**request.hold_out(x[:train], y[:train], default=_CHARACTERS), "test": (x[train:], y[train:])},
        note="area average of the 105x105 bitmaps, our own reduction and split; not chardata.mat",
        class_names=tuple(names)
        if labels == "alphabet"
        else tuple(str(i) for i in range(1, _CHARACTERS + 1)),
    )
