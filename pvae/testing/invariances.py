"""What must not change an estimate (training terms, batching, other data), and what it must not change."""

import random
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from .bench import NUM_DATA, ROUNDING, Bench, difference
from .linear_gaussian import LinearGaussianVAE
from .programs import AlignedGuide, AlignedModel, RefittingModel, ScaledGuide, ScaledModel

__all__ = [
    "check_batch_size",
    "check_datum_independence",
    "check_labels",
    "check_per_datum_khat",
    "check_reproducible",
    "check_side_effects",
    "check_stored_variance",
    "check_training_factors",
    "check_training_scales",
]

# A fit amplifies rounding in the weights.
_KHAT_ROUNDING = 1e-6


def check_reproducible(bench: Bench) -> str:
    """Equal seeds must give equal bits, and other seeds other draws."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    first, again, other = (
        bench.value(model, guide, x, num_particles=10, seed=bench.seed + step) for step in (0, 0, 1)
    )
    bench.require(first.isfinite().all(), "log_prob is not finite on a linear-Gaussian model")
    error = difference(first, again)
    bench.require(error == 0, f"the same seed gives values {error:.3g} nats apart")
    bench.require((first != other).all(), "another seed gives the same values")
    return "equal bits for equal seeds"


def check_side_effects(bench: Bench) -> str:
    """Programs, generators and settings must be what they were."""
    oracle = LinearGaussianVAE()
    wrapped, guide = _Wrapped(oracle.model), oracle.imperfect_guide
    x = oracle.model.sample(NUM_DATA)
    # Mixed flags: whoever calls eval() and train() on the whole cannot restore them.
    wrapped.train()
    oracle.model.eval()
    guide.eval()
    oracle.model.weight.grad = torch.full_like(oracle.model.weight, 0.25)
    # An empty store for the time: what an earlier run left behind would hide what this one leaves.
    with pyro.get_param_store().scope():
        pyro.param("bystander", torch.tensor(1.0))
        before = _state(wrapped, guide, x)
        bench.value(wrapped, guide, x, num_particles=10, batch_size=3)
        after = _state(wrapped, guide, x)
    changed = [name for name in before if before[name] != after[name]]
    bench.require(not changed, f"it changes {', '.join(changed)}")
    return f"{len(before)} kinds of state unchanged"


class _Wrapped(nn.Module):
    """A program inside a module that has a training flag of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.inner(x, y)


def _state(model: nn.Module, guide: nn.Module, x: Tensor) -> dict[str, object]:
    """Everything an evaluation could disturb, as bytes or plain values."""
    modules = [*model.modules(), *guide.modules()]
    parameters = [*model.parameters(), *guide.parameters()]
    store = pyro.get_param_store()
    return {
        "parameters": [(p.data_ptr(), _bytes(p)) for p in parameters],
        "buffers": [_bytes(b) for m in (model, guide) for b in m.buffers()],
        "gradients": [None if p.grad is None else _bytes(p.grad) for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "training flags": [m.training for m in modules],
        "the data": _bytes(x),
        "torch's generator": _bytes(torch.random.get_rng_state()),
        "NumPy's generator": str(np.random.get_state()),  # noqa: NPY002
        "Python's generator": str(random.getstate()),
        "Pyro's param store": [(name, _bytes(value)) for name, value in sorted(store.items())],
        "Pyro's validation": (
            pyro.settings.get("validate_distributions_pyro"),
            pyro.settings.get("validate_infer"),
        ),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def check_training_factors(bench: Bench) -> str:
    """``pyro.factor`` sites are terms of an objective, not of a density."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    plain = bench.value(model, guide, x, num_particles=10)
    cases: list[tuple[str, nn.Module, nn.Module]] = [
        ("a pyro.factor in the model", AlignedModel(model, marked=False), guide),
        ("a factor marked training_only in the model", AlignedModel(model, marked=True), guide),
        ("a pyro.factor in the guide", model, AlignedGuide(guide)),
    ]
    for name, with_factor, guide_with_factor in cases:
        error = difference(bench.value(with_factor, guide_with_factor, x, num_particles=10), plain)
        bench.require(error < ROUNDING, f"{name} moves values by up to {error:.3g} nats")
    return f"{len(cases)} placements hidden"


def check_training_scales(bench: Bench) -> str:
    """Weights that ``poutine.scale`` puts on sites in training are no part of a density."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    plain = bench.value(model, guide, x, num_particles=10)
    cases: list[tuple[str, nn.Module, nn.Module]] = [
        ("the model", ScaledModel(model), guide),
        ("the guide", model, ScaledGuide(guide)),
    ]
    for name, scaled, scaled_guide in cases:
        error = difference(bench.value(scaled, scaled_guide, x, num_particles=10), plain)
        bench.require(error < ROUNDING, f"poutine.scale in {name} moves values by up to {error:.3g} nats")
    return "ignored in model and guide"


def check_stored_variance(bench: Bench) -> str:
    """The variance of the decoder is a parameter of the model, not a function of the data scored."""
    oracle = LinearGaussianVAE(scale=0.5)
    other = LinearGaussianVAE(scale=0.8)
    guide, x = oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    ours, theirs = (bench.value(m, guide, x, num_particles=10) for m in (oracle.model, other.model))
    bench.require(
        difference(ours, theirs) > 1e-3,
        "decoders that store the standard deviations 0.5 and 0.8 get the same values: the variance is "
        "refitted to the data scored",
    )
    model = RefittingModel(oracle.model)
    stored = _bytes(model.scale)
    model.train()
    error = difference(bench.value(model, guide, x, num_particles=10), ours)
    bench.require(
        error < ROUNDING,
        f"a likelihood that refits its variance in training mode is scored {error:.3g} nats from where its "
        "stored variance puts it",
    )
    bench.require(_bytes(model.scale) == stored, "the stored variance of a likelihood is overwritten")
    bench.require(model.training, "a model in training mode is left in evaluation mode")
    return "read, not refitted, not overwritten"


def check_labels(bench: Bench) -> str:
    """Each datum must be scored with its own label, in the model and in the guide."""
    oracle = LinearGaussianVAE(y_dim=2)
    y = torch.randn(2 * NUM_DATA, 2, dtype=torch.float64)
    x = oracle.model.sample(len(y), y)
    model, guide = oracle.model, oracle.imperfect_guide
    ours = bench.value(model, guide, x, y, num_particles=10, batch_size=3)
    others = bench.value(model, guide, x, y.roll(1, 0), num_particles=10, batch_size=3)
    bench.require((ours != others).all(), "other labels give the same values")
    # A label shifts the mean of x: taking the shift off x and the label to zero must come to the same.
    shift = model.offset(y).detach() - model.offset(torch.zeros_like(y)).detach()
    moved = bench.value(model, guide, x - shift, torch.zeros_like(y), num_particles=10, batch_size=3)
    error = difference(ours, moved)
    bench.require(error < ROUNDING, f"values are {error:.3g} nats from those of each datum's own label")
    return "each datum's own label"


def check_batch_size(bench: Bench) -> str:
    """Values must not depend on how data are batched, nor on how particles are chunked to fit a batch."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(70)
    num_particles, sizes = bench.num_particles[-1], (1, 7, 64, 70, 140)
    plain = bench.value(model, guide, x, num_particles=num_particles)
    for size in sizes:
        error = difference(bench.value(model, guide, x, num_particles=num_particles, batch_size=size), plain)
        bench.require(
            error < ROUNDING,
            f"batch_size {size} moves values by up to {error:.3g} nats at K = {num_particles}",
        )
    return f"{len(x)} data in batches of {', '.join(map(str, sizes))}, K = {num_particles}"


def check_datum_independence(bench: Bench) -> str:
    """The value of the first datum must stay when the others change, or are left out."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    others = torch.cat([x[:1], x[1:] + 5])
    for num_particles in (10, bench.num_particles[-1]):
        plain = bench.value(model, guide, x, num_particles=num_particles)
        for name, data in (("far from it", others), ("left out", x[:1])):
            error = difference(bench.value(model, guide, data, num_particles=num_particles)[:1], plain[:1])
            bench.require(
                error < ROUNDING, f"the value of a datum moves by {error:.3g} nats when the others are {name}"
            )
    return "values stay when the other data change or go"


def check_per_datum_khat(bench: Bench) -> str:
    """The k-hat of a datum must stay when the others change, and for every batch size."""
    oracle = LinearGaussianVAE()
    model, guide, x = oracle.model, oracle.imperfect_guide, oracle.model.sample(NUM_DATA)
    others = torch.cat([x[:1], x[1:] + 5])
    _, khat = bench.run(model, guide, x, num_particles=1000)
    if khat is None:
        return "- no k-hats"
    for name, data, batch_size in (("the others change", others, None), ("batch_size is 3", x, 3)):
        _, again = bench.run(model, guide, data, num_particles=1000, batch_size=batch_size)
        assert again is not None
        error = difference(again[:1], khat[:1])
        bench.require(error < _KHAT_ROUNDING, f"the k-hat of a datum moves by {error:.3g} when {name}")
    return "k-hats stay when the other data or the batch size change"
