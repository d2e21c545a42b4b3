"""Networks in bfloat16 under densities in float32: which modules compute in which, and for how long."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn

from pvae.nn import (
    MLP,
    BottomUp,
    ConvDecoder,
    Encoder,
    GatedLinear,
    LabelEmbedding,
    MLPDecoder,
    MLPDenoiser,
    PairDecoder,
    PairMLP,
    Pseudoinput,
    PseudoinputPosterior,
    UNetDenoiser,
)
from pvae.nn.ladder_block import LadderBlock

from .isolation import device_of
from .objective import ELBO, Terms
from .program import parameters_of

__all__ = ["LowPrecision", "Networks", "Precision", "check_precision"]

Precision = Literal["float32", "bf16"]
Method = Callable[..., Any]

# Layers that are products of matrices.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
# Networks that are layers from one end to the other. An encoder is not: its log-variance is squeezed and
# exponentiated after the last layer, which eight bits are too few for.
_NETWORKS = (
    MLP,
    BottomUp,
    ConvDecoder,
    GatedLinear,
    LabelEmbedding,
    LadderBlock,
    MLPDecoder,
    MLPDenoiser,
    PairDecoder,
    PairMLP,
    UNetDenoiser,
)
# Their output is part of a density, or is what a narrow one stands around: log-determinants add up over
# couplings, and an inverse must undo the map; r(u | x) is narrower than a coefficient's last of eight bits.
_MATHEMATICS = (TransformModule, ConditionalTransformModule, Pseudoinput, PseudoinputPosterior)


class LowPrecision(ELBO):
    """An objective whose programs' networks compute in bfloat16; everything else is as in the objective.

    The parameters stay in float32, and so do their gradients.

    Args:
        objective: The objective.
        model: The model program.
        guide: The guide program.
    """

    def __init__(self, objective: ELBO, model: nn.Module, guide: nn.Module) -> None:
        super().__init__(objective.kind, objective.num_particles, objective.free_bits)
        self.objective = objective
        self._programs = (model, guide)
        self._networks = Networks(model, guide)

    def terms(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Terms:
        """Evaluate the objective as :meth:`ELBO.terms` does."""
        with self._networks:
            return self.objective.terms(model, guide, *args, **kwargs)

    def obstacle(self, *args: Any) -> str | None:
        """Try a batch, forward and backward; say why the programs do not run, or nothing.

        Draws from the generators, and moves running statistics as a step does.
        """
        parameters = [parameter for _, parameter in parameters_of(*self._programs)]
        try:
            with torch.enable_grad():
                loss = self.terms(*self._programs, *args).loss
                torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError) as error:
            return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
        return None


def check_precision(precision: str, model: nn.Module, guide: nn.Module) -> None:
    """Refuse a word that is no precision, and bfloat16 for programs that are not in float32.

    Raises:
        ValueError: If so.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision must be 'float32' or 'bf16', got {precision!r}")
    if precision == "float32":
        return
    others = {str(p.dtype) for _, p in parameters_of(model, guide) if p.dtype != torch.float32}
    if others:
        raise ValueError(f"precision 'bf16' needs programs in torch.float32, got {', '.join(others)}")


class Networks:
    r"""A context in which the networks of programs compute under autocast to bfloat16.

    In bfloat16, with 8 bits of a mantissa, are products of matrices and convolutions in layers of
    ``torch.nn``, and what stands between the layers of a network of :mod:`pvae.nn` (activations; norms as
    autocast has them). Whoever calls a network gets float32: all that distributions are made of, every
    log-density, and every sum of them.

    In float32 is all of

    - a flow (any transform module of Pyro's): rounding would enter its log-determinant once for each
      coupling, and take from :math:`f^{-1}` that it is the inverse;
    - :math:`r(u \mid x)` and its pseudoinput, whose standard deviations are as small as the rounding;
    - a guide that has ``keeps_float32``, and what it calls: the posteriors made of Jacobians
      (:class:`pvae.guides.FiveGuide`, :class:`pvae.guides.LaplaceGuide`), where a product
      :math:`u^\top f'(x) w` that estimates a trace is a small sum of large terms;
    - a network that is none of the above: layers of a user's own, such as ``nn.RNN``.

    Args:
        *programs: Model and guide, as they are now: what they hold, and where.
    """

    def __init__(self, *programs: nn.Module) -> None:
        self._device = device_of(*programs).type
        self._decided = False  # a network, or something that stays in float32, is running
        modules = list(dict.fromkeys(module for program in programs for module in program.modules()))
        keeping = [module for module in modules if _keeps(module)]
        inside = {id(part) for module in keeping for part in module.modules()}
        free = [module for module in modules if id(module) not in inside]
        wrapped = [(module, "forward", self._kept) for module in keeping]
        wrapped += [(module, "forward", self._lowered) for module in free if _is_network(module)]
        wrapped += [(module, "features", self._lowered) for module in free if isinstance(module, Encoder)]
        self._methods = [(module, name, wrap(getattr(module, name))) for module, name, wrap in wrapped]

    def __enter__(self) -> Self:
        # Past nn.Module.__setattr__, which would look through parameters, buffers and modules first.
        for module, name, method in self._methods:
            module.__dict__[name] = method
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, _method in self._methods:
            del module.__dict__[name]

    def _lowered(self, method: Method) -> Method:
        """Call under autocast and hand out float32, unless whoever calls has decided."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._decided:
                return method(*args, **kwargs)
            self._decided = True
            try:
                # Nothing outlives the call: a weight is cast in the graph of each.
                with torch.autocast(self._device, dtype=torch.bfloat16, cache_enabled=False):
                    return _float32(method(*args, **kwargs))
            finally:
                self._decided = False

        return call

    def _kept(self, method: Method) -> Method:
        """Call in float32, with all that is called from there."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._decided = self._decided, True
            try:
                with torch.autocast(self._device, enabled=False):
                    return method(*_float32(args), **kwargs)
            finally:
                self._decided = before

        return call


def _keeps(module: nn.Module) -> bool:
    return isinstance(module, _MATHEMATICS) or bool(getattr(module, "keeps_float32", False))


def _is_network(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and all(
            isinstance(part, _NETWORKS) or type(part).__module__.startswith("torch.nn.") for part in module
        )
    return isinstance(module, (*_LAYERS, *_NETWORKS))


def _float32(value: Any) -> Any:
    """Tensors of bfloat16 as float32, in tuples, lists and alone."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, tuple | list):
        return type(value)(map(_float32, value))
    return value
