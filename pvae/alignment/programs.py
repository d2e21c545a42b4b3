r"""Model and guide with the alignment's factor between them (DiVAE 2025, arXiv:2512.03928v1)."""

import math
from collections.abc import Iterator
from typing import Any, Self

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .aligner import Aligner
from .training_only import TRAINING_ONLY

__all__ = ["AlignedGuide", "AlignedModel", "prior_at"]


class _Aligned(nn.Module):
    """A program in place of another one, with its attributes and its state.

    Args:
        program: The program.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.bare = program

    def __getattr__(self, name: str) -> Any:
        """Look up what this module does not have in the program: ``prior``, ``encoder``, ``sample``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "bare" or name.startswith("__"):
                raise
            return getattr(self.bare, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the program's own state: the alignment is no part of it."""
        return self.bare.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state of the program's."""
        return self.bare.load_state_dict(*args, **kwargs)


class AlignedModel(_Aligned):
    """A model that in training mode has one more site, a factor; in evaluation mode it is the bare model.

    The factor is emitted where the latent is, so that it has the plates, the scale of a subsample, the mask
    and the particles of the latent's site. It reads the rows of its targets from what :meth:`on_batch` was
    told; else from the subsample of the plate over the data, if that plate is as large as the training data.

    Args:
        program: The model.
        aligner: The alignment.
        example: What the model can be called with, to find its prior.
    """

    def __init__(self, program: nn.Module, aligner: Aligner, example: tuple[Any, ...] | None = None) -> None:
        super().__init__(program)
        self.aligner = aligner
        self.example = example

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            ValueError: If the site is missing or is no latent with a density of its own, the rows of the
                batch are not known, or the posterior is needed and not there.
        """
        aligner = self.aligner
        if not self.training or aligner.off:
            return self.bare(*args, **kwargs)
        with _Emit(aligner) as emitted:
            value = self.bare(*args, **kwargs)
        emitted.check()
        return value

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model, and a learned offset; those of a flow have an optimiser of their own."""
        others = {id(parameter) for parameter in self.aligner.target.parameters()}
        for name, parameter in super().named_parameters(*args, **kwargs):
            if id(parameter) not in others:
                yield name, parameter

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; leaving it, forget the batch."""
        super().train(mode)
        if not mode:
            self.aligner.forget()
        return self

    def check_data(self, num_data: int) -> None:
        """Refuse to be trained on other data than those of the targets.

        Args:
            num_data: Number of training data.

        Raises:
            ValueError: If it is not the number of targets.
        """
        if num_data != len(self.aligner.target):
            raise ValueError(
                f"target must have a row for each of the {num_data} training data, "
                f"got {len(self.aligner.target)}"
            )

    def on_batch(self, index: Tensor) -> None:
        """Say which training data the next run is about.

        Args:
            index: Their positions in the training data, int64, shape ``(B,)``.
        """
        self.aligner.at(index)

    def on_step(self, args: tuple[Any, ...], index: Tensor, step: int, total_steps: int) -> None:
        """Prepare an optimisation step: the batch, the weight, and the flow's own step where there is one.

        Args:
            args: What the programs are called with.
            index: Positions of the batch's data, int64, shape ``(B,)``.
            step: Number of the step, from 0.
            total_steps: Number of steps in all.
        """
        aligner = self.aligner
        aligner.at(index)
        aligner.move(step, total_steps)
        target = aligner.target
        if target.own_training and not aligner.off:
            with torch.no_grad():
                prior = prior_at(self.bare, aligner.site, args)
            target.step(prior, index, first=step == 0)

    def training_state(self) -> dict[str, Tensor]:
        """What training changes beside the program, for a checkpoint."""
        return self.aligner.training_state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`training_state` returned.

        Raises:
            RuntimeError: If it is of another alignment.
        """
        self.aligner.load_training_state(state)


class AlignedGuide(_Aligned):
    """A guide that in training mode shows its posterior to the model that runs next, if that needs it.

    Args:
        program: The guide.
        aligner: The alignment; it is the model's and not held here.
    """

    def __init__(self, program: nn.Module, aligner: Aligner) -> None:
        super().__init__(program)
        # Held in a tuple, as the model owns it: registered here too, its tensors would have two names.
        self._aligner = (aligner,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide."""
        (aligner,) = self._aligner
        if not self.training or aligner.off or aligner.estimator == "sample":
            return self.bare(*args, **kwargs)
        with _Remember(aligner):
            return self.bare(*args, **kwargs)


class _Remember(Messenger):
    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.aligner.site:
            self.aligner.remember(msg["fn"])


class _Emit(Messenger):
    """Emits the factor right after the site, while the site's plates are open."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner, self.site, self.factor_name = aligner, aligner.site, aligner.factor_name
        self.subsamples: dict[str, Tensor] = {}
        self.latents: list[str] = []
        self.seen: list[str] = []

    def check(self) -> None:
        """Refuse a program that has run without the site."""
        if self.site not in self.seen:
            sites = ", ".join(map(repr, self.seen)) or "none"
            raise ValueError(f"site must be a latent of the model, got {self.site!r} beside {sites}")

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.factor_name:
            return
        # Of messengers inside this one; what stands around the whole program weighs everything alike.
        wanted = math.prod((f.full_size or f.size) / f.size for f in msg["cond_indep_stack"])
        scale = msg["scale"]
        if isinstance(scale, Tensor) or not math.isclose(scale, wanted, rel_tol=1e-6):
            raise ValueError(
                f"the alignment at site {self.site!r} must have the weight of its plates alone, "
                f"{wanted:g}, got another one from a poutine.scale around the site: weigh the KL by the "
                "objective (beta_warmup), or by a messenger that scales the site of that name and no other"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":  # a plate's own index draw
            self.subsamples[name] = msg["value"]
            return
        self.seen.append(name)
        if name == self.site:
            self._check_site(msg)
            factor, made_of = self.aligner(fn, msg["value"], self._rows(msg["cond_indep_stack"]))
            infer = {"is_auxiliary": True, TRAINING_ONLY: made_of}
            pyro.sample(self.factor_name, factor, obs=factor.sample(), infer=infer)
        elif not msg["is_observed"]:
            self.latents.append(name)

    def _check_site(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            raise ValueError(
                f"site {name!r} must be a latent, got an observed or reparametrised one, whose density is "
                "gone"
            )
        if (msg["infer"] or {}).get("enumerate"):
            raise ValueError(f"site {name!r} must be drawn to be aligned, got one that is enumerated")
        if self.latents:
            raise ValueError(
                f"site {name!r} must be the first latent, whose density is that of the prior, got one "
                f"that depends on {self.latents[0]!r}"
            )

    def _rows(self, frames: Any) -> Tensor | None:
        """Positions of the data in the plate; ``None`` for all of them in their order."""
        aligner = self.aligner
        frame = next((f for f in frames if f.dim == -1), None)
        if frame is None:
            raise ValueError(f"site {self.site!r} must lie in the plate over the data, at dim -1")
        index = aligner.index
        if index.numel():
            if len(index) != frame.size:
                raise ValueError(
                    f"the model must be told of each batch by on_step or on_batch: the plate {frame.name!r} "
                    f"has {frame.size} data, the last batch {len(index)}"
                )
            return index
        if frame.full_size == len(aligner.target):
            return self.subsamples.get(frame.name)
        raise ValueError(
            f"the model must be told which data these are by on_step or on_batch: the plate {frame.name!r} "
            f"has {frame.full_size}, the targets {len(aligner.target)} rows"
        )


class _Reached(Exception):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn


class _StopAt(Messenger):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            raise _Reached(msg["fn"])


def prior_at(model: nn.Module, site: str, args: tuple[Any, ...]) -> Any:
    """Return the distribution of a site, from a run of the model that ends there.

    Args:
        model: The bare model.
        site: Name of the site.
        args: What it is called with.

    Raises:
        ValueError: If it has no such site.
    """
    try:
        with _StopAt(site):
            model(*args)
    except _Reached as reached:
        return reached.fn
    raise ValueError(f"site must be a latent of the model, got {site!r}")
