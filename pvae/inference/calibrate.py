"""Measuring the variance of a normal likelihood on training data (Rybkin et al. 2021, arXiv:2006.13202)."""

import torch
from torch import Tensor, nn

from pvae.data import Split
from pvae.likelihoods import Normal
from pvae.ops import has_float64

from .isolation import device_of, evaluating, isolated_rng
from .program import SiteRecorder
from .trainer import arguments

__all__ = ["measure_sigma"]


def measure_sigma(
    model: nn.Module, guide: nn.Module, split: Split, seed: int = 0, batch_size: int = 1000
) -> Tensor:
    r"""Measure sigma of a normal likelihood on the training data, and store it for every evaluation.

    .. math:: \sigma^2 = \frac1n \sum_{i=1}^n (x_i - \hat x_i(z))^2, \qquad z \sim q(z \mid x)

    over all n entries of the data, or all of each channel, with one draw of z for each datum: the maximum-
    likelihood value, so that no held-out figure depends on the data it is about. One pass in evaluation mode
    without gradients; parameters, flags and generators are left as they were.

    Args:
        model: The model; its ``likelihood`` is a :class:`pvae.likelihoods.Normal` with ``sigma`` "batch" or
            "frozen", and the mean at its site ``"x"`` is the reconstruction.
        guide: The guide.
        split: The training data.
        seed: Seed of the draws.
        batch_size: Data per pass; the last one may be smaller.

    Returns:
        Sigma in the units of x as it was stored, the floor applied, shape ``()`` or ``(channels,)``.

    Raises:
        TypeError: If ``model`` has no such likelihood.
        ValueError: If the model observes no site ``"x"``, or the reconstructions are not finite.
    """
    likelihood = getattr(model, "likelihood", None)
    if not isinstance(likelihood, Normal) or likelihood.mode not in ("batch", "frozen"):
        kind = likelihood.mode if isinstance(likelihood, Normal) else type(likelihood).__name__
        raise TypeError(f"model.likelihood must be a Normal with sigma 'batch' or 'frozen', got {kind}")
    device = device_of(model, guide)
    split = split.to(device)
    total = torch.zeros_like(_wide(likelihood.measured_sigma))
    with evaluating(model, guide), isolated_rng(device, seed):
        for batch in split.batches(batch_size, seed=seed, epoch=0, drop_last=False, shuffle=False):
            args = arguments(model, batch)
            with SiteRecorder() as q:
                guide(*args)
            latents = {name: site.value for name, site in q.sites.items() if not site.is_factor}
            with SiteRecorder(latents) as p:
                model(*args)
            site = p.sites.get("x")
            if site is None or not site.observed:
                raise ValueError(f"model must observe a site 'x', got sites {', '.join(p.sites) or 'none'}")
            mse = likelihood.mean_squared_error(_wide(site.fn.mean), _wide(batch.x))
            total += mse * (len(batch.x) / len(split))
    likelihood.freeze(likelihood.optimum(total))
    return likelihood.sigma.clone()


def _wide(x: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return x.double() if has_float64(x.device) else x.cpu().double()
