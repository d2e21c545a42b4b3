"""Do draws and densities have the shapes they must have, under ``sample_shape`` and under ``expand``?"""

import math

import torch

from .subject import Subject, relative_error

__all__ = ["check_shapes"]

_ROUNDING = 1e-9


def check_shapes(s: Subject) -> str:
    """Check shapes, support, and that leading dimensions are treated one by one and drawn apart."""
    d = s.d
    batch, event = tuple(d.batch_shape), tuple(d.event_shape)
    _check_draws(s)
    value = d.sample(torch.Size((2, 3)))
    log_prob = d.log_prob(value)
    one_by_one = torch.stack([d.log_prob(part) for part in value.reshape(6, *batch, *event)])
    error = relative_error(log_prob, one_by_one.reshape(log_prob.shape))
    s.require(error < _ROUNDING, f"log_prob of a stack is {error:.3g} from the stack of log_prob")
    s.require(s.discrete or not torch.equal(value[0, 0], value[0, 1]), "draws of one sample_shape are equal")
    for lead in ((4,), (2, 4)):
        _check_expanded(s, lead)
    return f"batch {batch}, event {event}, under sample_shape and expand"


def _check_draws(s: Subject) -> None:
    d = s.d
    for sample_shape in ((), (3,), (2, 3)):
        value = (d.rsample if d.has_rsample else d.sample)(torch.Size(sample_shape))
        wanted = (*sample_shape, *d.batch_shape, *d.event_shape)
        s.require(
            value.shape == wanted,
            f"a draw of sample_shape {sample_shape} must have shape {wanted}, got {tuple(value.shape)}",
        )
        s.require(bool(d.support.check(value).all()), "a draw lies outside the support")
        log_prob = d.log_prob(value)
        wanted = (*sample_shape, *d.batch_shape)
        s.require(log_prob.shape == wanted, f"log_prob must have shape {wanted}, got {tuple(log_prob.shape)}")
        s.require(log_prob.isfinite().all(), "log_prob of a draw is not finite")


def _check_expanded(s: Subject, lead: tuple[int, ...]) -> None:
    wanted, event = (*lead, *s.d.batch_shape), tuple(s.d.event_shape)
    d = s.d.expand(torch.Size(wanted))
    got = tuple(d.batch_shape), tuple(d.event_shape)
    s.require(
        got == (wanted, event),
        f"expand must give batch_shape {wanted} and event_shape {event}, got {got[0]} and {got[1]}",
    )
    value = (d.rsample if d.has_rsample else d.sample)(torch.Size((5,)))
    s.require(
        value.shape == (5, *wanted, *event),
        f"a draw after expand must have shape {(5, *wanted, *event)}, got {tuple(value.shape)}",
    )
    ours, before = d.log_prob(value), s.d.log_prob(value)
    s.require(ours.shape == before.shape, f"log_prob after expand must have shape {tuple(before.shape)}")
    error = relative_error(ours, before)
    s.require(error < _ROUNDING, f"log_prob after expand is {error:.3g} from that before")
    first, second = value.reshape(5, math.prod(lead), -1)[:, :2].unbind(1)
    s.require(s.discrete or not torch.equal(first, second), "elements made by expand share their draws")
