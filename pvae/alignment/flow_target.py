r"""The target that a flow from data to codes makes of a log-density (DiVAE 2025, arXiv:2512.03928v1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pvae.moments import moments, restore_moments
from pvae.ops import batch_mean_gradients
from pvae.priors import CouplingFlow

from .targets import DensityLike, Target

__all__ = ["FlowTarget"]


class FlowTarget(Target):
    r"""Alignment through a flow g from the embedding u of the data to the latent space.

    .. math:: t_i = \rho_i - \log \left| \det \frac{\partial g}{\partial u}(u_i) \right|

    so that the factor compares :math:`\log p(z_i) + \log |\det \partial g / \partial u|`, a density of u,
    with :math:`\rho_i`. Targets are constants for model and guide: the flow is trained by maximum likelihood
    alone, one step of Adam before each step of theirs,

    .. math:: \min_g \; -\frac1B \sum_i \left( \log p_Z(g(u_i))
              + \log \left| \det \frac{\partial g}{\partial u}(u_i) \right| \right)

    under the prior of the moment, which that step leaves alone. Were the flow perfect, the target would be
    :math:`\log p_Z(g(u_i))`, and log p(z) no longer an estimate of :math:`\rho`: compare
    ``log p(z) + log_det`` with it.

    The flow works on u standardised; the standard deviations are part of its determinant, so that units are
    those of :math:`\rho`.

    Args:
        density: The log-density of the training data, with the embedding that it is the density of.
        flow: Has ``condition(None)``, which returns the transform from u to z; ``None`` for eight affine
            couplings.
        lr: Learning rate of the flow.
        pretrain_steps: Steps that it takes before the first step of the model, on batches of the same size.
        in_units: Whether the determinant holds the standard deviations of u. The released code leaves them
            out, and its targets are too low by the sum of their logarithms.
        **settings: Weight, floor, clip and normalize of a :class:`Target`.

    Attributes:
        flow: The flow; its parameters want no gradient from anybody else.

    Raises:
        ValueError: If the density has no embedding with a row for each datum, it is constant in a column,
            or a setting is out of range.
    """

    u: Tensor
    loc: Tensor
    scale: Tensor
    log_scale: Tensor

    def __init__(
        self,
        density: DensityLike,
        flow: nn.Module | None = None,
        lr: float = 1e-3,
        pretrain_steps: int = 0,
        in_units: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(density, **settings)
        if not lr > 0:
            raise ValueError(f"flow_lr must be positive, got {lr}")
        if pretrain_steps < 0:
            raise ValueError(f"pretrain_steps must not be negative, got {pretrain_steps}")
        embedding = getattr(density, "embedding", None)
        if embedding is None:
            raise ValueError("kind='flow' needs a target with an embedding, of which it is the density")
        u = torch.as_tensor(embedding).detach().double().cpu()
        if u.ndim != 2 or len(u) != len(self) or not u.isfinite().all():
            raise ValueError(f"embedding must be finite, shape ({len(self)}, d), got {tuple(u.shape)}")
        scale = u.std(0, correction=0)
        if not (scale > 0).all():
            raise ValueError("embedding must vary in every column, got a constant one")
        loc, log_scale = u.mean(0), scale.log().sum()
        self.register_buffer("u", (u - loc) / scale, persistent=False)
        self.register_buffer("loc", loc, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("log_scale", log_scale if in_units else log_scale * 0, persistent=False)
        self.flow: Any = CouplingFlow(u.shape[1], 8, hidden=128) if flow is None else flow
        came = getattr(self.flow, "z_dim", u.shape[1])
        if came != u.shape[1]:
            raise ValueError(f"flow must have z_dim = {u.shape[1]}, the size of the embedding, got {came}")
        # Wanting no gradient, they are no parameters of the objective, and of no optimiser but this one.
        self.flow.requires_grad_(False)
        self.lr, self.pretrain_steps = lr, pretrain_steps
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def own_training(self) -> bool:
        """Whether :meth:`step` does anything: the flow's step of maximum likelihood."""
        return True

    def forward(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return targets in nats and weights, each ``(B,)``, of the data at ``rows`` (of all if ``None``)."""
        target, weight = super().forward(rows)
        with torch.no_grad():
            return target - self.log_det(rows), weight

    def log_det(self, rows: Tensor | None = None) -> Tensor:
        """Return log |det dg/du| at the data of ``rows`` (of all if ``None``), in nats, shape ``(B,)``."""
        return self._image(self.u if rows is None else self.u.index_select(0, rows))[1]

    @torch.no_grad()
    def log_det_at(self, u: Tensor) -> Tensor:
        """Return log |det dg/du| at any embeddings, in nats, as :meth:`log_det` does at those of the data.

        Args:
            u: As the density's embedding, not standardised, shape ``(M, d)``.

        Returns:
            Shape ``(M,)``.

        Raises:
            ValueError: If ``u`` has another width.
        """
        if u.ndim != 2 or u.shape[1] != len(self.loc):
            raise ValueError(f"u must have shape (M, {len(self.loc)}), got {tuple(u.shape)}")
        return self._image((u.to(self.loc) - self.loc) / self.scale)[1]

    def step(self, prior: Any, rows: Tensor, first: bool) -> None:
        """Take the flow's step on the data at ``rows``; before the ``first`` also those that come before it.

        Args:
            prior: p(z) of the moment, its ``batch_shape`` ``()`` or that of ``rows``.
            rows: Positions of the data, shape ``(B,)``.
            first: Whether this is the first step of a run.

        Raises:
            ValueError: If the latent has another size than the embedding.
        """
        self.check_size(prior)
        for _ in range(self.pretrain_steps if first else 0):
            self._step(prior, torch.randint(len(self), rows.shape, device=rows.device))
        self._step(prior, rows)

    def check_size(self, prior: Any) -> None:
        """Refuse a prior of latents of another size than the embedding."""
        if prior.event_shape != self.u.shape[1:]:
            raise ValueError(
                f"kind='flow' needs an embedding of the latent's shape {tuple(prior.event_shape)}, got "
                f"{tuple(self.u.shape[1:])}: fit the target with dim={prior.event_shape.numel()}"
            )

    def training_state(self) -> dict[str, Tensor]:
        """What the next :meth:`step` depends on: the flow and the moments of its optimiser."""
        state = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self._optimizer is not None:
            state |= moments(self._optimizer)
        return state

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`training_state` returned."""
        self.flow.load_state_dict(
            {name.removeprefix("flow."): t for name, t in state.items() if name.startswith("flow.")}
        )
        self._optimizer = self._new_optimizer()
        restore_moments(self._optimizer, state)

    def _step(self, prior: Any, rows: Tensor) -> None:
        if self._optimizer is None:
            self._optimizer = self._new_optimizer()
        try:
            self.flow.requires_grad_(True)
            with torch.enable_grad():
                z, log_det = self._image(self.u.index_select(0, rows))
                loss = -(prior.log_prob(z) + log_det).mean()
                # Gradients of the flow alone: the prior's parameters keep what they have. (Written into the
                # parameters by autograd, in whose layout the fused optimiser takes them to be.)
                loss.backward(inputs=list(self.flow.parameters()))
                batch_mean_gradients(self.flow.parameters())
        finally:
            self.flow.requires_grad_(False)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # Made at the first step, when the flow is on its device.
        return torch.optim.Adam(self.flow.parameters(), lr=self.lr, fused=True)

    def _image(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return g(u) and log |det dg/du| for standardised u."""
        z, log_det = _both(self.flow.condition(None), u)
        return z, log_det - self.log_scale


def _both(transform: Transform, u: Tensor) -> tuple[Tensor, Tensor]:
    """Image and log-determinant of a map of vectors, in one pass where the map can tell both at once."""
    if isinstance(transform, ComposeTransform):
        total = u.new_zeros(u.shape[:-1])
        for part in transform.parts:
            u, log_det = _both(part, u)
            total = total + log_det
        return u, total
    both = getattr(type(transform), "call_and_ladj", None)
    if both is not None:
        z, log_det = both(transform, u)
    else:
        # A view is another object: a cache keyed by identity cannot answer with a value from before a step.
        u = u.view_as(u)
        z = transform(u)
        log_det = transform.log_abs_det_jacobian(u, z)
    return z, log_det.sum(-1) if transform.domain.event_dim == 0 else log_det
