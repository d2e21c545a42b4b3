"""One door to every data set."""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from ._files import data_root
from ._options import check_options
from ._request import Request
from .binarized_mnist import binarized_mnist
from .celeba import celeba
from .cifar10 import cifar10
from .dataset import Choice, Data, Source, assemble
from .digits import digits
from .embedded_mixture import embedded_mixture
from .errors import DataError
from .freyfaces import freyfaces
from .gaussian_mixture import gaussian_mixture
from .manifold import manifold, saddle
from .mnist import emnist, fashion_mnist, kmnist, mnist
from .omniglot import omniglot
from .ppca import ppca
from .sprites import sprites
from .streaming import stream
from .two_moons import two_moons

__all__ = ["load", "names"]

# Data sets by the names of their functions; keyword-only parameters of a function are the options of its set.
_LOADERS: dict[str, Callable[..., Source]] = {
    loader.__name__: loader
    for loader in (
        digits,
        mnist,
        fashion_mnist,
        kmnist,
        emnist,
        omniglot,
        binarized_mnist,
        freyfaces,
        cifar10,
        celeba,
        sprites,
        gaussian_mixture,
        embedded_mixture,
        two_moons,
        manifold,
        saddle,
        ppca,
    )
}


def names() -> list[str]:
    """Return the names that :func:`load` knows."""
    return list(_LOADERS)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    binarize: str | None = "default",
    scale: str = "default",
    dequantize: bool = False,
    download: bool = False,
    valid: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Data:
    """Load a data set.

    =====================  =============  =======================  ======================================
    name                   ``x_shape``    train / valid / test     options
    =====================  =============  =======================  ======================================
    ``digits``             (1, 8, 8)      1297 / 200 / 300
    ``mnist``              (1, 28, 28)    50000 / 10000 / 10000
    ``fashion_mnist``      (1, 28, 28)    50000 / 10000 / 10000
    ``kmnist``             (1, 28, 28)    50000 / 10000 / 10000
    ``emnist`` (letters)   (1, 28, 28)    104000 / 20800 / 20800   ``parts="all" | "test"``
    ``omniglot``           (1, 28, 28)    22722 / 1623 / 8115      ``labels="alphabet" | "character"``
    ``binarized_mnist``    (1, 28, 28)    50000 / 10000 / 10000    ``labels="none" | "matched"``
    ``freyfaces``          (1, 28, 20)    1565 / 200 / 200         ``split="blocks" | "shuffled"``
    ``cifar10``            (3, 32, 32)    45000 / 5000 / 10000     ``source="auto" | "full" | "subset"``
    its subset             (3, 32, 32)    3000 / 500 / 500
    ``celeba``             (3, 86, 86)    162770 / 19867 / 19962   ``size, attributes, limit, flip,``
                                                                   ``in_memory, num_workers``
    ``sprites``            (1, 32, 32)    8000 / 1000 / 2000       ``balanced``
    ``gaussian_mixture``   (2,)           10000 / 2000 / 5000      ``components, layout, radius, std``
    ``embedded_mixture``   (dim,)         20000 / 2000 / 5000      ``num_components, dim, variant, law``
    ``two_moons``          (2,)           10000 / 2000 / 5000      ``noise``
    ``manifold``           (2,)           10000 / 2000 / 5000      ``noise``
    ``saddle``             (3,)           10000 / 2000 / 5000      ``curvature, noise``
    ``ppca``               (x_dim,)       10000 / 2000 / 5000      ``x_dim, z_dim, noise``
    =====================  =============  =======================  ======================================

    The last six and ``sprites`` are drawn by ``seed``, take ``num_train`` and ``num_test``, and tell their
    truth in ``data.truth``; the last six have ``data.log_density``. ``digits`` comes with scikit-learn;
    the others are files. ``celeba`` is read by worker processes as it is needed, unless it is small.

    Args:
        name: Name of the data set.
        root: Folder of the files; by default the one that the environment variable ``PVAE_DATA`` names, else
            ``~/.cache/pvae``.
        binarize: ``"dynamic"``: pixels are 1 with the probability of their grey value, drawn again for each
            training batch, once for validation and test; ``"static"``: drawn once everywhere;
            ``"threshold"``: grey values of at least one half; ``None`` (or ``"none"``): grey. The default
            is ``"dynamic"`` for digits, mnist, kmnist, emnist and omniglot, and ``None`` for the other sets
            of grey values.
        scale: ``"unit"`` (default): grey values k / (levels - 1) in [0, 1]; ``"count"``: the levels
            themselves.
        dequantize: Whether to add uniform noise: (k + u) / levels, or k + u for counts; drawn again for
            each training batch, once for validation and test.
        download: Whether missing or damaged files may be fetched, where torchvision knows from where.
        valid: Number of validation data, taken from the training data by the rule of the set.
        seed: Seed of what is drawn once. Splits of real sets do not depend on it, unless an option says so.
        **options: Options of the set; its function documents them.

    Returns:
        The data set, on the CPU.

    Raises:
        MissingData: If a file is not there; the message says how to get it.
        CorruptData: If a file is truncated, damaged or not what it should be.
        DataError: If a name, an option or a choice is not possible; the message names the nearest one that
            is.

    Example:
        >>> data = load("digits")
        >>> len(data.train), data.x_shape, data.protocol.values
        (1297, (1, 8, 8), 'binary')
    """
    if name not in _LOADERS:
        raise DataError(f"name must be a data set{_nearest(str(name), _LOADERS)}, got {name!r}")
    loader = _LOADERS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(loader).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    common = [*list(inspect.signature(load).parameters)[1:-1], *known]
    for option in options:
        if option not in known:
            raise DataError(
                f"{name} must be given options that it has{_nearest(option, common)}, got {option!r}"
            )
    chosen = {"binarize": binarize, "scale": scale, "dequantize": dequantize, "valid": valid, "seed": seed}
    check_options(get_type_hints(load) | get_type_hints(loader), chosen | options)
    request = Request(name=name, root=data_root(root), download=download, valid=valid, seed=seed)
    source, choice = loader(request, **options), Choice(binarize, scale, dequantize, seed)
    return assemble(name, source, choice) if source.streams is None else stream(name, source, choice)


def _nearest(got: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known word, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(got.lower().replace("-", "_"), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are {', '.join(known)})"
