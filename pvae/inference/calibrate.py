"""What is measured on training data when training is done: the variance of a normal likelihood (Rybkin et
al. 2021, arXiv:2006.13202), and the reverse variances of a diffusion prior (Kuzina & Tomczak 2024,
arXiv:2412.01373v1).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pvae.data import Split
from pvae.distributions import declared
from pvae.likelihoods import Normal
from pvae.ops import has_float64
from pvae.priors import DiffusionPrior

from .isolation import device_of, evaluating, isolated_rng
from .program import SiteRecorder
from .trainer import arguments

__all__ = ["calibrate_diffusion", "measure_sigma"]


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


def calibrate_diffusion(
    model: nn.Module,
    guide: nn.Module,
    split: Split,
    seed: int = 0,
    num_data: int = 10_000,
    batch_size: int = 1000,
) -> None:
    """Calibrate a model's diffusion prior on draws of the guide.

    See :meth:`pvae.priors.DiffusionPrior.calibrate`. Without gradients, in evaluation mode; parameters, flags
    and generators are left as they were.

    Args:
        model: The model; its ``prior`` is a :class:`pvae.priors.DiffusionPrior` over one of its latents.
        guide: The guide.
        split: The training data.
        seed: Seed of the draws.
        num_data: At most so many data, spread evenly over the split: a mean over ten thousand squares is
            known to about one per cent.
        batch_size: Data per pass; the last one may be smaller.

    Raises:
        TypeError: If ``model`` has no such prior.
        ValueError: If no site of the model has a diffusion.
    """
    prior = getattr(model, "prior", None)
    if not isinstance(prior, DiffusionPrior):
        raise TypeError(f"model.prior must be a DiffusionPrior, got {type(prior).__name__}")
    device = device_of(model, guide)
    if len(split) > num_data:
        split = split[torch.linspace(0, len(split) - 1, num_data, dtype=torch.float64).long()]
    split = split.to(device)

    def draws() -> Iterator[Tensor]:
        for batch in split.batches(batch_size, seed=seed, epoch=0, drop_last=False, shuffle=False):
            args = arguments(model, batch)
            with SiteRecorder() as q:
                guide(*args)
            latents = {name: site.value for name, site in q.sites.items() if not site.is_factor}
            with prior.using("vlb"), SiteRecorder(latents) as p:
                model(*args)
            of = [name for name, site in p.sites.items() if declared(site.fn, "density", "exact") == "bound"]
            if len(of) != 1:
                raise ValueError(
                    f"model must have one latent under its diffusion, got {', '.join(of) or 'none'}"
                )
            yield latents[of[0]]

    with evaluating(model, guide), isolated_rng(device, seed):
        prior.calibrate(draws())


def _wide(x: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return x.double() if has_float64(x.device) else x.cpu().double()
