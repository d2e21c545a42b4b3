r"""Guide with a covariance implied by the encoder's Jacobian (Sorrenson et al. 2025, arXiv:2506.01522v1)."""

from typing import ClassVar, Literal

import pyro
from torch import Tensor, nn

from pvae.distributions import Directions, FreeFormNormal, JacobianNormal, LogDet, Probe, check_options

from .laplace import LaplaceGuide
from .tied import TiedGuide

__all__ = ["FiveGuide"]


class FiveGuide(TiedGuide):
    r"""The noise of x pushed through the encoder: a full covariance without a parameter of its own.

    .. math:: q(z \mid x) = \mathcal N\left(z \mid f(x), \; \sigma^2 f'(x) f'(x)^\top\right), \qquad
              z = f(x) + \sigma f'(x) v, \quad v \sim \mathcal N(0, I)

    with the likelihood's :math:`\sigma`. Where f finds the mode of p(z | x) this is
    :math:`\Sigma_L - \Sigma_L^2`, for :math:`\Sigma_L = (I + g'^\top g' / \sigma^2)^{-1}`: right where
    posterior variances are small, too narrow in latents that the data leave open, and zero in a latent that
    the decoder ignores. Such a posterior cannot collapse: the model finds a use for every latent, at a cost
    of 0.35 nats for each that it does not need (linear decoder). The curvature of the decoder is penalised
    because z, not f(x), is decoded.

    In training the density is a surrogate (:class:`pvae.distributions.JacobianNormal` says of what kind), so
    that the loss is no bound in value. In evaluation mode draws and density are exact. As its covariance can
    be too narrow a proposal for importance weights, score a model under both::

        pvae.log_likelihood(model, guide.proposal("five"), x)
        pvae.log_likelihood(model, guide.proposal("laplace"), x)

    A weight other than one on z (KL warm-up) is no tempering of this posterior, whose covariance supposes the
    weight one; as a start it does no harm.

    Args:
        encoder: A :class:`pvae.nn.Encoder`, whose location is f, or any module from x to z (see
            :class:`TiedGuide`). Layers are checked.
        decoder: The model's decoder, held and not owned.
        likelihood: The model's likelihood, ``Normal`` (any sigma) or, experimentally, ``Bernoulli``.
        objective: ``"five"``, or ``"fif"``: the loss of a free-form injective flow, which reconstructs from
            f(x) itself and is no bound at all (:class:`pvae.distributions.FreeFormNormal`). Evaluation is the
            same.
        logdet: ``"surrogate"``, ``"pinv"`` or ``"exact"``: gradient of the log-determinant.
        probe: ``"latent"`` or ``"data"`` (cheaper, noisier).
        directions: ``"sphere"``, ``"rademacher"`` or ``"gaussian"``: latent probes.
        num_probes: Latent probes per datum.

    Attributes:
        training_loss: What the loss in training is: ``"surrogate of minus the ELBO"`` or ``"free-form
            loss"``.

    Raises:
        TypeError: For another likelihood.
        ValueError: For options that do not go together, or a network whose derivatives are wrong or missing.
    """

    proposal_name: ClassVar[str] = "five"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        *,
        objective: Literal["five", "fif"] = "five",
        logdet: LogDet = "surrogate",
        probe: Probe = "latent",
        directions: Directions = "sphere",
        num_probes: int = 1,
    ) -> None:
        super().__init__(
            encoder, decoder, likelihood, differentiate_encoder=True, differentiate_decoder=False
        )
        if objective not in ("five", "fif"):
            raise ValueError(f"objective must be 'five' or 'fif', got {objective!r}")
        check_options(self.z_dim, logdet, probe, directions, num_probes)
        self.objective = objective
        self.logdet, self.probe, self.directions, self.num_probes = logdet, probe, directions, num_probes

    @property
    def training_loss(self) -> str:
        """What the loss in training is, for reports."""
        if self.objective == "fif":
            return "free-form loss (no bound)"
        return "surrogate of minus the ELBO" if self.logdet == "surrogate" else "minus the ELBO"

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            q = self.posterior(x, y)
            return pyro.sample("z", q if self.training else q.exact())

    def posterior(self, x: Tensor, y: Tensor | None = None) -> JacobianNormal:
        """Return :math:`q(z | x)` for ``x`` ``(B, *x_shape)``, outside of any program."""
        kind = FreeFormNormal if self.objective == "fif" else JacobianNormal
        return kind(
            lambda data: self.location(data, y),
            lambda z: self.reconstruction(z, y),
            x,
            self.noise(x, y),
            self.z_dim,
            logdet=self.logdet,
            probe=self.probe,
            directions=self.directions,
            num_probes=self.num_probes,
        )

    def proposal(self, kind: Literal["five", "laplace"], prior_scale: float | Tensor = 1.0) -> nn.Module:
        """Return the guide program that an evaluation is to draw from.

        Args:
            kind: ``"five"``: this guide. ``"laplace"``: the same networks as a :class:`LaplaceGuide`, whose
                covariance holds the prior's and so covers latents that the data leave open.
            prior_scale: Standard deviation of z under the prior, for ``"laplace"``.

        Raises:
            ValueError: If ``kind`` is another word.
        """
        if kind == "five":
            return self
        if kind != "laplace":
            raise ValueError(f"kind must be 'five' or 'laplace', got {kind!r}")
        return LaplaceGuide(self.encoder, *self._model, prior_scale=prior_scale, trained=False)
