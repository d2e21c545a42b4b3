"""What a spec may do but might surprise: one sentence each."""

from typing import Any

from torch.distributions import kl_divergence

from pvae.data import Data
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import SiteRecorder
from pvae.priors import CodePrior

from .program import Program
from .spec import Spec

__all__ = ["notes"]


def notes(spec: Spec, program: Program, data: Data) -> list[str]:
    """Return what a reader of this spec's numbers should know.

    Args:
        spec: The spec.
        program: Its program.
        data: Its data.
    """
    settings, found = spec.fit.arguments(), []
    objective = settings["objective"]
    if objective in ("iwae", "dreg") and settings["num_particles"] == 1:
        found.append(f"with one particle '{objective}' is the ELBO: set fit.num_particles")
    if objective == "mean_field" and not _has_closed_form(program, data):
        found.append("KL(q(z | x) ‖ p(z)) has no closed form here: 'mean_field' draws it, as 'elbo' does")
    kl = spec.prior.arguments().get("kl", "mc")
    if kl != "mc" and objective != "mean_field":
        found.append(f"prior.kl = '{kl}' enters the objective 'mean_field' alone, not '{objective}'")
    if spec.prior.kind == "vamp" and spec.posterior.kind not in ("normal", "hvae"):
        found.append("the vamp prior mixes the encoder's diagonal Gaussians, not this posterior itself")
    if spec.posterior.kind in ("five", "laplace"):
        if spec.likelihood.kind == "bernoulli":
            found.append(
                "the noise of the posterior is that of bits at f(x): an approximation, not the paper's"
            )
        if settings["beta_warmup"] or settings["free_bits"]:
            found.append("the covariance of the posterior supposes that log q(z | x) has the weight one")
    if data.protocol.values == "unit" and spec.likelihood.kind in ("normal", "continuous_bernoulli"):
        found.append("log p(x) is a density on [0, 1], not comparable with the mass of grey levels")
    if data.protocol.values == "count" and spec.likelihood.kind == "normal":
        found.append("log p(x) is a density on the line, not comparable with the mass of counts")
    return found


def _has_closed_form(program: Program, data: Data) -> bool:
    """Whether Pyro knows the KL of a latent of this pair; of a ladder it knows all but that of u."""
    prior = getattr(program.model, "prior", None)
    if isinstance(prior, CodePrior):  # not fitted before its first stage
        return prior.kl != "mc" or prior.variant in ("diag", "full", "paired")
    device, some = device_of(*program), data.train[:1]
    args = [some.x.to(device)]
    if some.y is not None and getattr(program.model, "conditional", False):
        args.append(some.y.to(device))
    with evaluating(*program):
        with SiteRecorder() as q:
            program.guide(*args)
        latents = {name: site.value for name, site in q.sites.items() if not site.observed}
        with SiteRecorder(latents) as p:
            program.model(*args)
        return any(_known_kl(q.sites[name].fn, p.sites[name].fn) for name in latents)


def _known_kl(q: Any, p: Any) -> bool:
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True
