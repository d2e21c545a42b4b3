r"""The alignment term itself (DiVAE 2025, arXiv:2512.03928v1)."""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.ops import batch_mean

from .density_factor import DensityFactor
from .expectation import Detach, expected_log_prob, log_prob_at, mean_log_prob
from .targets import Target

__all__ = ["Aligner", "Estimator", "Reduction", "Warmup"]

Estimator = Literal["sample", "mean", "multi"]
Reduction = Literal["mean", "rms"]
Warmup = Callable[[int, int], float]

# A learned offset is this many times its parameter: Adam then moves it as with a tenfold learning rate.
_GAIN = 10.0


class Aligner(nn.Module):
    r"""Says how far the prior's log-density of a latent is from what the data's density asks for.

    .. math:: -\gamma \, w_i \, h_\delta\!\left( s_i - (t_i - c) \right), \qquad
              h_\delta(r) = \tfrac12 r^2 \text{ for } |r| \le \delta,
              \text{ else } \delta (|r| - \tfrac12 \delta)

    With :math:`w = \sigma^{-2}` and :math:`\gamma = 1` its quadratic part is the log-likelihood of
    ":math:`t_i` was observed with error :math:`N(s_i - c, \sigma_i^2)`". The target is a constant; gradients
    reach the prior through its log-density and the encoder through the latent.

    Args:
        target: Targets and weights of all training data.
        site: Name of the latent site.
        estimator: What :math:`s_i` is. ``"sample"``: log p at the draw that is decoded, so that the term also
            pays for the spread of log p under the posterior (half its variance, where quadratic), and shrinks
            it. ``"mean"``: :math:`E_q \log p`, in closed form for two normals, else as ``"multi"``.
            ``"multi"``: the mean over fresh draws, with a bias of ``w Var / 2 num_samples``.
        num_samples: Fresh draws for each datum.
        delta: Where the loss becomes linear, in nats; infinite for a squared one.
        reduction: ``"mean"``: the sum over data as above. ``"rms"``, as in the released code: in value and
            gradient :math:`-\gamma \sqrt{\mathrm{mean}_i \, w_i h_\delta}` for each datum, whose gradient
            does not vanish at agreement and depends on the batch size.
        gamma: The weight, a number, or a function of step and number of steps.
        offset: :math:`c` in nats.
        learn_offset: Whether :math:`c` is trained, from there, ten times as fast as other parameters.
        detach: What the term gives no gradient: ``"guide"`` (through z; a prior made of the encoder still
            passes one), ``"prior"``, or nothing.

    Attributes:
        gamma: The weight of the step, a tensor of shape ``()``. Before any step that of the end of training.
        index: Positions of the batch's data, int64, shape ``(B,)``; empty if nobody has told.

    Raises:
        ValueError: If a setting is out of range.
    """

    gamma: Tensor
    index: Tensor
    start: Tensor

    def __init__(
        self,
        target: Target,
        *,
        site: str = "z",
        estimator: Estimator = "sample",
        num_samples: int = 16,
        delta: float = 1.0,
        reduction: Reduction = "mean",
        gamma: Warmup | float = 1.0,
        offset: float = 0.0,
        learn_offset: bool = False,
        detach: Detach = None,
    ) -> None:
        super().__init__()
        _check(estimator, num_samples, delta, reduction, detach)
        if not callable(gamma) and not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and not negative, or a schedule, got {gamma}")
        if not math.isfinite(offset):
            raise ValueError(f"offset must be finite, got {offset}")
        self.target = target
        self.site, self.estimator, self.num_samples = site, estimator, num_samples
        self.delta, self.reduction, self.detach, self.schedule = float(delta), reduction, detach, gamma
        self.register_buffer("index", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("start", torch.tensor(float(offset)), persistent=False)
        self.register_buffer("gamma", torch.tensor(self._gamma(1, 1)), persistent=False)
        self.raw_offset = nn.Parameter(torch.zeros(())) if learn_offset else None
        self._posterior: Any = None

    @property
    def factor_name(self) -> str:
        """Name of the factor site."""
        return f"{self.site}_align"

    @property
    def off(self) -> bool:
        """Whether the weight is zero for good, so that there is no factor at all."""
        return not callable(self.schedule) and self.schedule == 0

    @property
    def offset(self) -> Tensor:
        """The constant :math:`c` in nats, shape ``()``."""
        return self.start if self.raw_offset is None else self.start + _GAIN * self.raw_offset

    def forward(self, p: Any, z: Tensor, rows: Tensor | None) -> tuple[dist.Unit, str]:
        """Return the factor of each datum, and what it is made of.

        Args:
            p: The prior as the site has it, ``batch_shape`` ``(*particles, B)``.
            z: The site's value.
            rows: Positions of the data, shape ``(B,)``; ``None`` for all of them.

        Returns:
            A distribution with ``log_factor`` in nats, shape ``(*particles, B)``; ``"draw"`` or
            ``"expectation"``.

        Raises:
            ValueError: If the posterior is needed and the guide has not run.
        """
        target, weight = self.target(rows)
        # The weight is that of this moment, whenever the factor is evaluated; and what needs no gradient is
        # done first, since on a small net every operation that does is felt.
        aim = target - self.offset
        if self.reduction == "rms":
            gamma = -self.gamma

            def factor(s: Tensor) -> Tensor:
                return gamma * _root_mean(weight * huber(s, aim, self.delta))

        else:
            heavy = weight * -self.gamma

            def factor(s: Tensor) -> Tensor:
                return heavy * huber(s, aim, self.delta)

        q, self._posterior = self._posterior, None
        if self.estimator == "sample" or (q is None and not torch.is_grad_enabled()):
            # (Where nothing is trained, somebody may look at the model program alone.)
            if self.detach is None:
                return DensityFactor(self.site, p, z, factor), "draw"
            return dist.Unit(factor(log_prob_at(p, z, self.detach))), "draw"
        if q is None:
            raise ValueError(
                f"estimator={self.estimator!r} needs the posterior: run the aligned guide before the model, "
                "both in training mode"
            )
        s = expected_log_prob(q, p, self.detach) if self.estimator == "mean" else None
        s = mean_log_prob(q, p, self.num_samples, self.detach) if s is None else s
        return dist.Unit(factor(s).expand(p.batch_shape)), "expectation"

    def remember(self, q: Any) -> None:
        """Keep the posterior of the guide's site for the run of the model that follows."""
        self._posterior = q

    def at(self, index: Tensor) -> None:
        """Take the positions of the data that come next, int64, shape ``(B,)``, in place."""
        ours = self.index
        if ours.shape != index.shape:
            # The tensor stays the same one: a traced step holds it.
            ours.resize_(index.shape)
        ours.copy_(index)

    def forget(self) -> None:
        """Know nothing of a batch any more, so that no later one is aligned with its targets."""
        self.index.resize_(0)
        self._posterior = None

    def move(self, step: int, total_steps: int) -> None:
        """Set the weight of a step, without waiting for the device."""
        self.gamma.fill_(self._gamma(step, total_steps))

    def training_state(self) -> dict[str, Tensor]:
        """Everything that training changes here, and a digest of what it must not find changed."""
        state = {"digest": self._digest(), "gamma": self.gamma, "index": self.index, "start": self.start}
        if self.raw_offset is not None:
            state["raw_offset"] = self.raw_offset.detach()
        return state | {f"target.{name}": t for name, t in self.target.training_state().items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`training_state` returned.

        Raises:
            RuntimeError: If it is of another target or other settings, before anything is changed.
        """
        if "digest" not in state or not torch.equal(state["digest"].cpu(), self._digest()):
            raise RuntimeError("the alignment must have the target and the settings of the saved run")
        self.at(state["index"])
        with torch.no_grad():
            self.gamma.copy_(state["gamma"])
            self.start.copy_(state["start"])
            if self.raw_offset is not None:
                self.raw_offset.copy_(state["raw_offset"])
        self.target.load_training_state(
            {name.removeprefix("target."): t for name, t in state.items() if name.startswith("target.")}
        )

    def extra_repr(self) -> str:
        """What ``print`` shows in the brackets."""
        settings = ("site", "estimator", "num_samples", "delta", "reduction", "detach", "schedule")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)

    def _gamma(self, step: int, total_steps: int) -> float:
        return float(self.schedule(step, total_steps) if callable(self.schedule) else self.schedule)

    def _digest(self) -> Tensor:
        settings = (self.site, self.estimator, self.num_samples, self.delta, self.reduction, self.detach)
        kind = (type(self.target).__name__, self.raw_offset is not None)
        digest = hashlib.sha256(repr((*settings, *kind)).encode() + self.target.digest()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8)


def huber(s: Tensor, aim: Tensor, delta: float) -> Tensor:
    """Return Huber's loss of ``s - aim``, element by element; half its square where ``delta`` is infinite."""
    if math.isinf(delta):
        return 0.5 * (s - aim).square()
    aim = aim if aim.shape == s.shape else aim.expand_as(s)
    return F.huber_loss(s, aim, reduction="none", delta=delta)


def _root_mean(loss: Tensor) -> Tensor:
    """Return, for each datum, the root of the mean loss of the batch, in value and in mean gradient."""
    root = batch_mean(loss.detach().mean()).sqrt()
    half = loss / (2 * (root + 1e-8))
    return half + (root - half.detach())


def _check(estimator: str, num_samples: int, delta: float, reduction: str, detach: str | None) -> None:
    if estimator not in ("sample", "mean", "multi"):
        raise ValueError(f"estimator must be 'sample', 'mean' or 'multi', got {estimator!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    if reduction not in ("mean", "rms"):
        raise ValueError(f"reduction must be 'mean' or 'rms', got {reduction!r}")
    if detach not in (None, "guide", "prior"):
        raise ValueError(f"detach must be 'guide', 'prior' or None, got {detach!r}")
