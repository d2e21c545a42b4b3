"""Typical data have the log-likelihood of their like, no more and no less (Nalisnick et al. 2019,
arXiv:1906.02994).
"""

import torch
from torch import Tensor

__all__ = ["typicality"]


def typicality(log_prob: Tensor, training: Tensor) -> Tensor:
    r"""Distance of each datum's log-likelihood from the mean over training data, in nats.

    .. math:: \epsilon(x) = \left| -\log p(x) - \frac1M \sum_m -\log p(x_m) \right|

    The paper's test with batches of one datum. It is two-sided: data that are far more likely than any the
    model was trained on, as plain images often are, are strange too. Where both are lower bounds on log
    p(x), what they lack in common cancels. The training data's mean is higher than that of held-out data by
    what the model has overfitted, which harms no test that is calibrated on held-out data.

    Args:
        log_prob: log p(x) or a bound on it, nats, shape ``(N,)``.
        training: The same of training data, by the same estimate, shape ``(M,)``.

    Returns:
        Shape ``(N,)``, float64, larger for stranger data.

    Raises:
        ValueError: If a shape is another one, there are no training data, or a value is not finite.
    """
    for name, value in (("log_prob", log_prob), ("training", training)):
        if value.ndim != 1:
            raise ValueError(f"{name} must have shape (N,), got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} other entries")
    if not len(training):
        raise ValueError("training must hold at least one log-likelihood, got none")
    mean: Tensor = training.detach().cpu().to(torch.float64).mean()
    return (log_prob.detach().cpu().to(torch.float64) - mean).abs()
