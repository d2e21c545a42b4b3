"""The alignment of a run: the density of its training data, and the pair that is trained (DiVAE)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.alignment import Aligned, FlowTarget, LinearWarmup, align
from pvae.data import Data
from pvae.density import ESTIMATORS, DensityTarget
from pvae.evaluation import latent_scores
from pvae.inference import checkpoint
from pvae.inference.progress import reporting
from pvae.priors import CouplingFlow

from . import figures
from .program import Program, SpecError
from .runs import OpenRun, RunError, RunFolder
from .spec import AlignKeys, Spec

__all__ = ["Alignment", "aligned", "begin", "density_of_run", "embedded", "estimate", "log_det_of_run"]

# Name of the checkpoint that holds the flow of the targets.
_FLOW = "flow"

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

    def keep(self, steps: int) -> None:
        """Keep the flow of the targets in the run's folder, where they have one.

        What a run is used for later is the bare pair; :func:`log_det_of_run` reads this.

        Args:
            steps: Steps that were taken.
        """
        target = self.pair.aligner.target
        if isinstance(target, FlowTarget) and not self.pair.aligner.off:
            checkpoint.save(self.folder.path, _FLOW, target.flow.state_dict(), {"step": steps})

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
    found = folder.density.is_file()
    try:
        target = (
            DensityTarget.load(folder.density)
            if found
            else estimate(keys, data, os.environ.get("PVAE_CACHE"), progress)
        )
        if not found:
            target.save(folder.density)
        pair = aligned(spec, program, data, target, device)
    except (TypeError, ValueError) as error:
        way_out = f" (move {folder.density} away to have it estimated again)" if found else ""
        raise SpecError(f"[align] {' '.join(str(error).split())}{way_out}") from error
    return Alignment(pair, _log_prior(program, data, _rows(data)), folder, data)


def aligned(
    spec: Spec, program: Program, data: Data, target: DensityTarget, device: torch.device | None = None
) -> Aligned:
    """Align a program with a density of its training data, as the table ``[align]`` says.

    Args:
        spec: The spec.
        program: Its program, which is moved to the device.
        data: Its data.
        target: The density.
        device: Where it will be trained, the CPU if absent.

    Raises:
        TypeError, ValueError: If the program cannot be aligned so.
    """
    keys = spec.align
    if keys is None:
        raise ValueError("a spec must have a table [align] for its program to be aligned, got none")
    for part in program:
        part.to(device or "cpu")
    y = data.train.y
    example = (data.train[:1].x, y[:1]) if y is not None and _conditional(program) else None
    flow = None
    if keys.kind == "flow":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            flow = _flow(spec.z_dim, keys)
    return align(
        *program,
        target,
        kind=keys.kind,
        flow=flow,
        example=example,
        gamma=LinearWarmup(keys.warmup, keys.gamma) if keys.warmup else keys.gamma,
        **keys.of_align(),
    )


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
        x = data.train.x.double()
        if data.log_density_intrinsic is not None:
            return DensityTarget.known(data.log_density_intrinsic(x), embedding=data.truth.project(x))
        return DensityTarget.known(data.log_density(x), embedding=x.flatten(1))
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


def density_of_run(run: OpenRun) -> DensityTarget | None:
    """Return the density that a run was aligned with, if it was.

    Raises:
        RunError: If its file is missing or damaged.
    """
    if run.spec.align is None:
        return None
    try:
        return DensityTarget.load(run.folder.density)
    except FileNotFoundError:
        problem = f"{run.folder.density} is missing"
    except (OSError, ValueError) as error:
        problem = f"the density cannot be read, {error}"
    raise RunError(
        f"{problem}: once it is moved away, pvae train {run.folder.path} --resume estimates it again"
    )


def embedded(target: DensityTarget, data: Data, x: Tensor) -> Tensor:
    """Embed data as those of a density of :func:`estimate` are.

    Args:
        target: The density.
        data: What it is the density of.
        x: Data without the noise of their protocol, shape ``(M, *x_shape)``.

    Returns:
        Shape ``(M, d)``, in double precision on the CPU.
    """
    if target.projection is not None:
        return torch.from_numpy(target.projection(x))
    x = x.detach().cpu().double()
    u: Tensor = x.flatten(1) if data.log_density_intrinsic is None else data.truth.project(x)
    return u


def log_det_of_run(run: OpenRun, x: Tensor) -> Tensor:
    """Return what ``log_det`` of a run's aligned pair was when training ended, at any data.

    It is the log-determinant of the flow that the run was aligned through, from the embedding of x to z, of
    the last step.

    Args:
        run: The run.
        x: Data without the noise of their protocol, shape ``(M, *x_shape)``.

    Returns:
        Nats, shape ``(M,)``, in double precision on the CPU.

    Raises:
        RunError: If there is no flow in the folder, or no sound density.
        pvae.inference.CheckpointError: If the flow is damaged.
    """
    keys, folder = run.spec.align, run.folder
    target = density_of_run(run)
    if keys is None or keys.kind != "flow" or target is None:
        raise RunError(f"the run in {folder.path} was not aligned through a flow")
    if not checkpoint.exists(folder.path, _FLOW):
        raise RunError(
            f"{folder.path} holds no flow, as training has not ended or was that of an earlier version: "
            f"pvae train {folder.path} --resume keeps it"
        )
    state, _ = checkpoint.load(folder.path, _FLOW)
    flow = _flow(run.spec.z_dim, keys).double()
    flow.load_state_dict(state)
    provider = FlowTarget(target, flow, in_units=keys.preset != "released")
    return provider.log_det_at(embedded(target, run.data, x))


def _flow(z_dim: int, keys: AlignKeys) -> CouplingFlow:
    return CouplingFlow(z_dim, keys.flow_layers, hidden=keys.flow_hidden)


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
