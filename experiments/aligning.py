"""The alignment of a run: the density of its training data, and the pair that is trained (DiVAE)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.alignment import Aligned, LinearWarmup, align
from pvae.data import Data
from pvae.density import ESTIMATORS, DensityTarget
from pvae.evaluation import latent_scores
from pvae.inference.progress import reporting
from pvae.priors import CouplingFlow

from . import figures
from .program import Program, SpecError
from .runs import RunFolder
from .spec import AlignKeys, Spec

__all__ = ["Alignment", "begin", "density_of_run", "estimate"]

# Data whose log p(z) is drawn, evenly spread.
_SHOWN = 2000


class Alignment(NamedTuple):
    """What is trained in place of the program, and what it is trained towards.

    Attributes:
        pair: Model and guide with the factor.
        before: log p(z) of some training data before training, nats.
        folder: The run's folder.
        data: Its data.
    """

    pair: Aligned
    before: Tensor
    folder: RunFolder
    data: Data

    def summary(self) -> dict[str, Any]:
        """What a manifest says of it: prior against targets, and the constant between them."""
        return self.pair.report().to_dict()

    def notes(self) -> list[str]:
        """Say what the targets are, beside what the prior offers."""
        return [f"alignment: {self.pair.report()}"]

    def picture(self, title: str) -> Path:
        """Draw targets and log p(z), before and after training."""
        rows = _rows(self.data)
        return figures.densities(
            self.pair.targets()[rows.to(self.pair.targets().device)].cpu(),
            self.before,
            _log_prior(self.pair.bare, self.data, rows),
            self.folder.figures / "targets.png",
            title,
        )


def begin(
    spec: Spec,
    program: Program,
    data: Data,
    folder: RunFolder,
    device: torch.device | None = None,
    progress: bool | None = None,
) -> Alignment | None:
    """Estimate the density of the training data and align the program with it.

    The density is kept in the run's folder, and where the environment's ``PVAE_CACHE`` names a folder, there
    as well, for other runs on the same data.

    Args:
        spec: The spec.
        program: Its program.
        data: Its data.
        folder: The run's folder.
        device: Where it will be trained, the CPU if absent.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        The alignment, or ``None`` if the spec asks for none.

    Raises:
        SpecError: If the program cannot be aligned, or the data have no density.
    """
    keys = spec.align
    if keys is None:
        return None
    try:
        target = (
            DensityTarget.load(folder.density)
            if folder.density.is_file()
            else estimate(keys, data, os.environ.get("PVAE_CACHE"), progress)
        )
        if not folder.density.is_file():
            target.save(folder.density)
        for part in program:
            part.to(device or "cpu")
        y = data.train.y
        example = (data.train[:1].x, y[:1]) if y is not None and _conditional(program) else None
        flow = None
        if keys.kind == "flow":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(spec.seed)
                flow = CouplingFlow(spec.z_dim, keys.flow_layers, hidden=keys.flow_hidden)
        pair = align(
            *program,
            target,
            kind=keys.kind,
            flow=flow,
            example=example,
            gamma=LinearWarmup(keys.warmup, keys.gamma) if keys.warmup else keys.gamma,
            **keys.of_align(),
        )
    except (TypeError, ValueError) as error:
        raise SpecError(f"[align] {' '.join(str(error).split())}") from error
    return Alignment(pair, _log_prior(program, data, _rows(data)), folder, data)


def estimate(
    keys: AlignKeys, data: Data, cache: str | Path | None = None, progress: bool | None = None
) -> DensityTarget:
    """Estimate the log-density of the training data without the noise of their protocol.

    Args:
        keys: The table ``[align]``.
        data: The data.
        cache: Folder of densities that were estimated before.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: If an option is wrong or the data cannot be estimated.
    """
    if keys.estimator == "exact":
        if data.log_density is None:
            raise ValueError(f"estimator = 'exact' needs data with a known density, but {data.name} has none")
        x = data.train.x
        return DensityTarget.known(data.log_density(x.double()), embedding=x.double().flatten(1))
    options: dict[str, Any] = {} if keys.max_neighbors is None else {"max_neighbors": keys.max_neighbors}
    if keys.estimator != "kde":
        options["dim"] = keys.unit
    with reporting("density", 100, progress) as report:
        return DensityTarget.fit(
            data.train.clean,
            dim=keys.dim,
            estimator=ESTIMATORS[keys.estimator](**options),
            projection=keys.projection,
            cache=cache,
            progress=lambda done, total: report(100 * done // max(total, 1)),
        )


def density_of_run(folder: RunFolder) -> DensityTarget | None:
    """Return the density that a run was aligned with, if it was."""
    return DensityTarget.load(folder.density) if folder.density.is_file() else None


def _conditional(program: Program) -> bool:
    return bool(getattr(program.model, "conditional", False))


def _rows(data: Data) -> Tensor:
    n = len(data.train)
    return torch.linspace(0, n - 1, min(n, _SHOWN), dtype=torch.float64).long()


def _log_prior(program: Any, data: Data, rows: Tensor) -> Tensor:
    """log p(z) at one draw of z for each of some training data, nats, on the CPU."""
    model, guide = program
    split = data.train[rows]
    return latent_scores(model, guide, split, num_samples=1, progress=False).log_p_draw
