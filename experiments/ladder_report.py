r"""What the layers of a model of several latents carry, and its pseudoinput (DVP-VAE, arXiv:2412.01373v1)."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Normal

from pvae.data import Split
from pvae.evaluation import Exchange, LayerReport, exchanged_kl, layer_report
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.progress import reporting
from pvae.models import Ladder
from pvae.nn import DCTPseudoinput
from pvae.nn.ladder_block import LOG_VARIANCES
from pvae.priors import DiffusionPrior

__all__ = ["LadderReport", "PseudoinputReport", "gaussian_rate", "ladder_report"]

# Draws of the latents for each datum, and times of the diffusion's bound for each of them.
_SAMPLES, _TIMES = 4, 8
_ROWS = 1000
# Nats that a trained prior of u may cost above the fit of one Gaussian.
_MARGIN = 2.0


@dataclass(frozen=True)
class PseudoinputReport:
    r"""The pseudoinput u of a ladder: what it costs, what it would under one Gaussian, whether it is used.

    Attributes:
        rate: :math:`\mathbb E[\log r(u \mid x) - \log p(u)]` of held-out data in nats, shape ``(N,)``. Under
            a diffusion prior, an upper bound: that of its continuous time.
        rate_train: The same of training data.
        rate_steps: The same of held-out data for the chain of steps that is sampled, one path for each datum;
            ``None`` under another prior.
        num_steps: Steps of that chain; ``None`` under another prior.
        calibrated: Whether the chain's variances were measured.
        gaussian: The rate of held-out data under a Gaussian fitted to u of training data, shape ``(N,)``.
        num_fit: Training data of the fit.
        num_train: Size of the training part: a prior that knows it by heart has the rate log ``num_train``.
        log_variance: Of r, shape ``(C, k, k)``.
        bounds: Its range.
        share_at_bounds: Share of its entries at an end of the range.
        clipped: Shares of the coefficients of held-out and of training data that lie outside [-1, 1] and are
            clipped; ``None`` for a pseudoinput that clips nothing.
        exchange: KL of the layers below, with the datum's own u and with another's.
    """

    rate: Tensor
    rate_train: Tensor
    rate_steps: Tensor | None
    num_steps: int | None
    calibrated: bool | None
    gaussian: Tensor
    num_fit: int
    num_train: int
    log_variance: Tensor
    bounds: tuple[float, float]
    share_at_bounds: float
    clipped: tuple[float, float] | None
    exchange: Exchange

    @property
    def excess(self) -> Tensor:
        """Rate above that of the Gaussian fit, nats, shape ``(N,)``."""
        return self.rate - self.gaussian

    @property
    def fit_cost(self) -> float:
        """What the Gaussian loses to the finite number of data of its fit in nats, on average at most, about:
        half the number of its parameters per datum.
        """
        size = self.log_variance.numel()
        return size * (size + 3) / (4 * self.num_fit)

    @property
    def trained(self) -> bool:
        """Whether the prior costs at most two nats more than one Gaussian would."""
        return float(self.excess.mean()) <= _MARGIN

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        steps = None if self.rate_steps is None else _figures(self.rate_steps)
        return {
            "rate": _figures(self.rate),
            "rate_train": _figures(self.rate_train),
            "rate_steps": steps,
            "num_steps": self.num_steps,
            "calibrated": self.calibrated,
            "gaussian": _figures(self.gaussian),
            "excess": _figures(self.excess),
            "trained": self.trained,
            "num_fit": self.num_fit,
            "fit_cost": self.fit_cost,
            "num_train": self.num_train,
            "log_variance": self.log_variance.tolist(),
            "bounds": list(self.bounds),
            "share_at_bounds": self.share_at_bounds,
            "clipped": None if self.clipped is None else list(self.clipped),
            "exchange": self.exchange.to_dict(),
        }

    def to_text(self) -> str:
        """Return what was found in sentences, and the table of the exchange."""
        kind = "" if self.num_steps is None else ", bounded in continuous time"
        said = [
            f"Rate of u {_shown(self.rate)} nats{kind}; {_shown(self.rate_train)} on training data, where "
            f"that of a prior that knows all by heart is {math.log(self.num_train):.1f}."
        ]
        if self.rate_steps is not None:
            how = "calibrated" if self.calibrated else "not calibrated"
            said.append(f"Of the chain of {self.num_steps} steps, {how}: {_shown(self.rate_steps)} nats.")
        excess = float(self.excess.mean())
        verdict = "" if self.trained else ": the prior is undertrained"
        said += [
            f"Under one Gaussian, fitted to {self.num_fit} training data, u would cost "
            f"{_shown(self.gaussian)} nats, at most about {self.fit_cost:.2f} of them for the finite fit; "
            f"the prior costs {abs(excess):.2f} {'more' if excess > 0 else 'less'} (wanted: at most "
            f"{_MARGIN:g} more){verdict}.",
            f"Log-variance of r(u | x): mean {float(self.log_variance.mean()):.2f}, "
            f"{100 * self.share_at_bounds:.1f} % of {self.log_variance.numel()} at an end of "
            f"[{self.bounds[0]:g}, {self.bounds[1]:g}].",
        ]
        if self.clipped is not None:
            here, there = (f"{100 * share:.3f} %" for share in self.clipped)
            said.append(
                f"Outside [-1, 1], and clipped: {here} of the coefficients, {there} of training data."
            )
        used = "they look at it" if self.exchange.used else "u is paid for and not used"
        rise = self.exchange.rise
        said.append(f"With u of another datum the layers below cost {_shown(rise, '+')} nats: {used}.")
        return "\n".join([*said, "", self.exchange.to_markdown()])


@dataclass(frozen=True)
class LadderReport:
    """The layers of a model of several latents.

    Attributes:
        test: On held-out data.
        train: On training data.
        u: The pseudoinput, where the model has one.
    """

    test: LayerReport
    train: LayerReport
    u: PseudoinputReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        return {
            "test": self.test.to_dict(),
            "train": self.train.to_dict(),
            "u": None if self.u is None else self.u.to_dict(),
        }

    def to_text(self) -> str:
        """Return the table of the layers, and what it stands on."""
        drawn = [layer.name for layer in self.test.layers if not layer.closed_form]
        form = "in closed form" + (f", of {', '.join(drawn)} by draws" if drawn else "")
        threshold = self.test.layers[0].threshold
        return "\n".join(
            [
                self.test.to_markdown(self.train),
                "",
                f"{len(self.test)} held-out data, {len(self.train)} of training, "
                f"{self.test.num_samples} draws each; KL given the latents above {form}.",
                f"Active: the variance of the posterior mean is above {threshold:g}. Collapsed: KL below "
                "0.01 nats for 95 % of the data.",
            ]
        )


def ladder_report(
    model: nn.Module,
    guide: nn.Module,
    test: Split,
    train: Split,
    fit: Split | None = None,
    *,
    num_train: int | None = None,
    num_samples: int = _SAMPLES,
    seed: int = 0,
    progress: bool | None = None,
) -> LadderReport:
    """Measure the layers of a model of several latents, and the pseudoinput of a ladder that has one.

    The rate of u is taken from a diffusion's bound, which is what was trained; the chain's, which the
    evaluator uses, stands beside it. Data of the training part are binarised as they are for evaluation.

    Args:
        model: The model, a :class:`pvae.models.Ladder` or another one.
        guide: Its guide.
        test: Held-out data.
        train: Training data.
        fit: Training data that a Gaussian is fitted to u of; ``train`` by default.
        num_train: Size of the whole training part; that of ``train`` by default.
        num_samples: Draws of the latents for each datum, at least 2.
        seed: Seed of the draws.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        ValueError: As :func:`pvae.evaluation.layer_report`.
    """
    bounds = dict.fromkeys(model.spec.names, LOG_VARIANCES) if isinstance(model, Ladder) else None
    prior = model.prior if isinstance(model, Ladder) else None
    diffusion = prior if isinstance(prior, DiffusionPrior) else None

    def layers(split: Split, stream: int) -> LayerReport:
        with nullcontext() if diffusion is None else diffusion.using("vlb", _TIMES):
            return layer_report(
                model,
                guide,
                split,
                num_samples=num_samples,
                bounds=bounds,
                seed=seed + stream,
                progress=progress,
            )

    here, there = layers(test, 0), layers(train, 1)
    posterior = getattr(guide, "posterior_u", None)
    if prior is None or posterior is None:
        return LadderReport(here, there)
    fit = train if fit is None else fit
    exchange = exchanged_kl(model, guide, test, num_samples=num_samples, seed=seed, progress=progress)
    device, pseudoinput = device_of(model, guide), posterior.pseudoinput
    with evaluating(model, guide):
        clipped = None
        if isinstance(pseudoinput, DCTPseudoinput):
            held, known = (float(pseudoinput.share_clipped(part.x.to(device))) for part in (test, train))
            clipped = held, known
        u = PseudoinputReport(
            here["u"].kl,
            there["u"].kl,
            None
            if diffusion is None
            else _rate_of_steps(diffusion, posterior, test.x, device, seed, progress),
            None if diffusion is None else diffusion.num_steps,
            None if diffusion is None else diffusion.calibrated,
            gaussian_rate(posterior, fit.x, test.x, device),
            len(fit),
            len(train) if num_train is None else num_train,
            posterior.log_variance.detach().cpu(),
            posterior.bounds,
            float(posterior.share_at_bounds()),
            clipped,
            exchange,
        )
    return LadderReport(here, there, u)


@torch.no_grad()
def gaussian_rate(
    posterior: Callable[[Tensor], TorchDistribution],
    fit: Tensor,
    x: Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""What u would cost under the Gaussian with the moments of u in training data: the measure of a prior.

    .. math:: KL\left(r(u \mid x) \,\Vert\, \mathcal N(m, S)\right), \qquad
              m = \overline{f(x)}, \quad S = \mathrm{Cov} f(x) + \overline{\mathrm{Var}}

    with f and Var the mean and variance of r(u | x), so that no draw is needed. A prior that can be any
    density should not cost more.

    Args:
        posterior: r: maps images to independent normals of ``event_shape u_shape``.
        fit: Training data, shape ``(M, *x_shape)``.
        x: Data to rate, shape ``(N, *x_shape)``.
        device: Where the posterior's numbers are.

    Returns:
        Nats, shape ``(N,)``, double precision.
    """
    loc, variance = _moments(posterior, fit, device)
    centre = loc.mean(0)
    covariance = (loc - centre).mT @ (loc - centre) / len(loc) + variance.mean(0).diag()
    root = torch.linalg.cholesky(covariance)
    loc, variance = _moments(posterior, x, device)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False)
    distance = ((loc - centre) @ inverse.mT).square().sum(-1)
    spread = (variance @ inverse.square().mT).sum(-1)
    log_ratio = 2 * root.diagonal().log().sum() - variance.log().sum(-1)
    rate: Tensor = 0.5 * (log_ratio + spread + distance - len(root))
    return rate


def _moments(
    posterior: Callable[[Tensor], TorchDistribution], x: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Means and variances of r(u | x), each ``(N, D)``, in double precision on the CPU."""
    rows = []
    for part in _parts(x, device):
        r = posterior(part).base_dist
        assert isinstance(r, Normal)
        rows.append([t.expand(r.batch_shape).flatten(1).double().cpu() for t in (r.loc, r.variance)])
    loc, variance = (torch.cat(column) for column in zip(*rows, strict=True))
    return loc, variance


def _rate_of_steps(
    prior: DiffusionPrior,
    posterior: Callable[[Tensor], TorchDistribution],
    x: Tensor,
    device: torch.device,
    seed: int,
    progress: bool | None,
) -> Tensor:
    """Rate of u for the model that is sampled, one draw and one path for each datum, shape ``(N,)``."""
    torch.manual_seed(seed)
    found, done = [], 0
    with reporting("rate of u", len(x), progress) as report, prior.using("chain"):
        for part in _parts(x, device):
            r = posterior(part)
            u = r.sample()
            found.append((r.log_prob(u) - prior().log_prob(u)).double().cpu())
            done += len(part)
            report(done)
    return torch.cat(found)


def _parts(x: Tensor, device: torch.device | str) -> Iterator[Tensor]:
    for start in range(0, len(x), _ROWS):
        yield x[start : start + _ROWS].to(device)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _figures(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": _standard_error(values)}


def _shown(values: Tensor, sign: str = "") -> str:
    return f"{float(values.mean()):{sign}.2f} ± {_standard_error(values):.2f}"
