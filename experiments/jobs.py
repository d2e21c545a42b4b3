"""What the command does to a run folder: train, evaluate, sample."""

import math
import time
from contextlib import ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pvae.data import Data, Split
from pvae.evaluation import LikelihoodEstimate, NestedEstimate, log_likelihood, nested_likelihood
from pvae.files import WriteError
from pvae.guides import FiveGuide, PointGuide, laplace_proposal
from pvae.inference import ELBO, Run, Team, fit
from pvae.inference.isolation import isolated_rng
from pvae.inference.threads import Threads, available_threads, choose_threads, measure_threads
from pvae.inference.trainer import arguments
from pvae.models import Autoencoder

from . import figures, sampling
from .aligning import begin as begin_alignment
from .given import low_pass
from .monitors import jacobian_curves, jacobian_monitor
from .notes import notes
from .program import Program, SpecError
from .runs import Onlooker, OpenRun, RunError, RunFolder, environment
from .spec import Evaluate, Spec
from .stages import pretrain

__all__ = [
    "Trained",
    "better_bound",
    "compare_bounds",
    "evaluate",
    "proposals",
    "sample",
    "train",
    "use_threads",
    "use_threads_of",
]


class Trained(NamedTuple):
    """What training left behind.

    Attributes:
        folder: The run folder.
        run: What :func:`pvae.fit` returned.
        pictures: PNG files.
        notes: What may surprise, one sentence each.
        estimates: What :func:`evaluate` returned, if the spec asks for it after training.
        threads: Threads of torch on the CPU, and why so many.
    """

    folder: RunFolder
    run: Run
    pictures: list[Path]
    notes: list[str]
    estimates: tuple[LikelihoodEstimate | NestedEstimate, ...]
    threads: Threads


def train(
    spec: Spec,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    device: torch.device | None = None,
    root: Path | None = None,
    download: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
) -> Trained:
    """Train a spec into a run folder, draw its figures, and evaluate it if the spec says so.

    All processes that ``torchrun`` started do it together; the first one alone writes and draws.

    Args:
        spec: The spec.
        out: Run folder.
        resume: Go on with the run in ``out``.
        force: Delete the run in ``out`` first.
        device: Where to train, the CPU if absent.
        root: Folder of the data files.
        download: Whether missing data may be fetched.
        threads: Threads of torch on the CPU, by default what :func:`use_threads` finds.
        progress: Whether to show bars; by default on a terminal only.

    Raises:
        SpecError: If the spec cannot be built or trained.
        RunError: If the folder is in the way, cannot be written to, or cannot be resumed.
        pvae.data.DataError: If the data cannot be loaded.
        pvae.files.Busy: If another process trains in the folder.
        pvae.files.WriteError: If a file cannot be written; the last checkpoint stays.
        pvae.inference.NonFiniteLoss: If training diverges; the last checkpoint stays.
    """
    team = Team.find()
    folder = RunFolder(out) if team.leads else Onlooker(out)
    with ExitStack() as claim:
        with team.together():
            claim.enter_context(folder.claimed())
        return _train(
            spec,
            folder,
            team,
            resume=resume,
            force=force,
            device=device or torch.device("cpu"),
            root=root,
            download=download,
            threads=threads,
            progress=progress if team.leads else False,
        )


def _train(
    spec: Spec,
    folder: RunFolder,
    team: Team,
    *,
    resume: bool,
    force: bool,
    device: torch.device,
    root: Path | None,
    download: bool,
    threads: int | None,
    progress: bool | None,
) -> Trained:
    """Train in a folder that is claimed."""
    data = team.in_turn(lambda: spec.load_data(root, download))
    program = spec.build(data)
    before = folder.read_manifest().get("threads") if resume else None
    chosen = use_threads(program, spec, data, threads, before=before, device=device, team=team)
    if spec.evaluate.after_training:
        _part(data, spec.evaluate)
        proposals(program, spec.evaluate, prior_scale=1.0)  # a prior may not be fitted before training
    with team.together():
        folder.prepare(spec, resume=resume, force=force)
    spent = folder.read_manifest().get("seconds", 0.0) if resume else 0.0
    folder.update_manifest(
        status="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=spec.seed,
        data=data.protocol.to_dict(),
        **environment(device),
        **({} if before is not None else {"threads_because": chosen.reason}),
        **({} if team.alone else {"processes": team.size}),
    )
    start = time.monotonic()
    status = "failed"
    try:
        said = _first_stage(spec, program, data, folder, device, progress)
        monitor = jacobian_monitor(program, data)
        alignment = team.in_turn(lambda: begin_alignment(spec, program, data, folder, device, progress))
        model, guide = program if alignment is None else alignment.pair
        run = fit(
            model,
            guide,
            data,
            **spec.fit.arguments() | {"threads": None},
            device=device,
            out=folder.path,
            resume=resume,
            callbacks=[] if monitor is None else [monitor],
            progress=progress,
        )
        status = run.stopped
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except ValueError as error:
        if not resume:
            folder.discard_unless_trained()
        if isinstance(error, SpecError | RunError):
            raise
        raise SpecError(f"[fit] {' '.join(str(error).split())}") from error
    finally:
        # On a full disk there is no room for this either, and the first sentence is the one to tell.
        unsaid = suppress(WriteError) if status in ("failed", "interrupted") else nullcontext()
        if folder.spec.is_file():
            with unsaid:
                folder.update_manifest(status=status, seconds=round(spent + time.monotonic() - start, 3))
    if not team.leads:
        estimates = _evaluate_after(spec, folder, data, program, progress)
        return Trained(folder, run, [], [], estimates, chosen)
    folder.update_manifest(steps=run.steps, **_measured(program))
    if monitor is not None and monitor.report is not None:
        folder.update_manifest(jacobian=monitor.report.to_dict())
        said = [*said, *monitor.problems]
    if alignment is not None:
        alignment.keep(run.steps)
    pictures = _pictures(spec, folder, program, data, progress)
    if alignment is not None:
        folder.update_manifest(alignment=alignment.summary())
        said = [*said, *alignment.notes()]
        pictures.append(alignment.picture(_title(spec)))
    estimates = _evaluate_after(spec, folder, data, program, progress)
    return Trained(folder, run, pictures, [*notes(spec, program, data), *run.notes, *said], estimates, chosen)


def _evaluate_after(
    spec: Spec, folder: RunFolder, data: Data, program: Program, progress: bool | None
) -> tuple[LikelihoodEstimate | NestedEstimate, ...]:
    if not spec.evaluate.after_training:
        return ()
    return evaluate(OpenRun(folder, spec, data, *program), spec.evaluate, progress=progress)


def evaluate(
    run: OpenRun, settings: Evaluate, *, batch_size: int | None = None, progress: bool | None = None
) -> tuple[LikelihoodEstimate | NestedEstimate, ...]:
    """Estimate the held-out log-likelihood of a run and keep it in ``evaluation.json``.

    A diffusion prior has its density estimated along a chain of steps. Its estimates are followed by the
    nested bound with as many particles, which knows no steps. Processes that ``torchrun`` started share the
    data; all of them return the same estimates, those of one process alone.

    Args:
        run: The run.
        settings: Split, number of data and particles, seed, proposal. A limit takes data spread evenly over
            the split, since some test sets are sorted by class.
        batch_size: Data per pass of the decoder; affects time and memory alone.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        One estimate for each proposal, the guide's own first, with the nested bound under it, if any, behind
        it; each is a record of its own in the file.

    Raises:
        SpecError: If the program has no such proposal.
        RunError: If what was estimated before is damaged, or nothing can be written to the folder.
        pvae.data.MissingPart: If the data have no such split.
    """
    team = Team.find()
    if not team.leads:
        run, progress = run._replace(folder=Onlooker(run.folder.path)), False
    split = _part(run.data, settings)
    run.folder.check_ready(run.folder.read_evaluations)
    estimates: list[LikelihoodEstimate | NestedEstimate] = []
    for name, proposal in proposals(run.program, settings).items():
        start = time.monotonic()
        options: dict[str, Any] = {
            "num_particles": settings.num_particles,
            "batch_size": batch_size,
            "seed": settings.seed,
            "progress": progress,
            "team": team,
        }
        full = log_likelihood(run.model, proposal, split, **options)
        _keep(run, settings, full, start, proposal=name)
        estimates.append(full)
        if full.num_steps is not None:
            start = time.monotonic()
            nested = nested_likelihood(run.model, proposal, split, **options)
            draws = {"num_draws": nested.num_draws, "num_times": nested.num_times}
            _keep(run, settings, nested, start, proposal=name, bound="nested", **draws)
            estimates.append(nested)
    return tuple(estimates)


def better_bound(own: LikelihoodEstimate, laplace: LikelihoodEstimate) -> str:
    """Say which of two estimates of one model on the same data is the better bound, in one sentence.

    Both means are lower bounds on the same mean log p(x) up to their Monte-Carlo errors, so the larger one is
    nearer to it.

    Args:
        own: Under the guide's own proposal.
        laplace: Under the Laplace proposal.
    """
    gap = laplace.mean - own.mean
    error = math.hypot(own.monte_carlo_error, laplace.monte_carlo_error)
    said = "both are lower bounds on the same log p(x)"
    if abs(gap) <= 2 * error:
        return (
            f"{said} and agree: they differ by {abs(gap):.2f} nats, with a Monte-Carlo error of {error:.2f}"
        )
    name = "Laplace" if gap > 0 else "guide's own"
    return f"{said}: the one under the {name} proposal is better, by {abs(gap):.2f} nats"


def compare_bounds(full: LikelihoodEstimate, nested: NestedEstimate) -> str:
    """Say in one sentence how far apart the full and the nested bound of one model are.

    The full bound is of the model in T steps, the nested one of its limit of many steps. The full one is at
    most lower by what the steps cost, and higher by what u drawn outside the logarithm costs.

    Args:
        full: With the density of u estimated along the chain.
        nested: Under the same proposal.
    """
    gap, error = full.mean - nested.mean, math.hypot(full.monte_carlo_error, nested.monte_carlo_error)
    place = "above" if gap >= 0 else "below"
    said = f"the full bound ({full.num_steps} steps) is {abs(gap):.2f} nats {place} the nested one"
    if gap < -2 * error:
        return f"{said}: more steps{'' if full.calibrated else ', calibration'} or particles would raise it"
    return f"{said}, Monte-Carlo error {error:.2f}"


def use_threads(
    program: Program,
    spec: Spec,
    data: Data,
    threads: int | None = None,
    *,
    before: int | None = None,
    device: torch.device | None = None,
    team: Team | None = None,
) -> Threads:
    """Set the number of torch's threads on the CPU for this process, in which a spec will be trained.

    Args:
        program: The program that will be trained, on the CPU.
        spec: Its spec.
        data: Its data.
        threads: The number, before ``fit.threads`` of the spec and ``OMP_NUM_THREADS``; where nobody says
            one, what :func:`pvae.inference.threads.measure_threads` finds on a batch.
        before: The number of the run that is resumed, which holds.
        device: Where it will be trained; on a GPU nothing is measured.
        team: The processes that train together; nothing is measured in one of several.

    Raises:
        SpecError: If another number is asked for than that of the run.
    """
    asked = spec.fit.arguments()["threads"] if threads is None else threads

    def measured() -> Threads:
        if not (team is None or team.alone):
            return Threads(torch.get_num_threads(), "as torch has it in one of several processes")
        if device is not None and device.type != "cpu":
            return Threads(torch.get_num_threads(), "as torch has it beside a GPU")
        return _measured_threads(program, spec, data)

    try:
        chosen = choose_threads(measured, asked=asked, before=before)
    except ValueError as error:
        raise SpecError(str(error)) from None
    torch.set_num_threads(chosen.number)
    return chosen


def use_threads_of(run: OpenRun, threads: int | None = None) -> None:
    """Set the number of torch's threads on the CPU for this process, in which a run will be judged.

    Args:
        run: The run.
        threads: The number, before ``OMP_NUM_THREADS``; where nobody says one, that of its training, or all
            cores if there are fewer.
    """
    of_training = run.folder.read_manifest().get("threads", 1)
    chosen = choose_threads(
        lambda: Threads(min(of_training, available_threads()), "as in training"), asked=threads
    )
    torch.set_num_threads(chosen.number)


def _measured_threads(program: Program, spec: Spec, data: Data) -> Threads:
    model: Any = program.model
    guide: Any = program.guide
    if spec.autoencoder is not None:
        # The prior is not fitted yet; the first stage has the networks of the second.
        model, guide = Autoencoder(model.decoder, model.likelihood), PointGuide(guide.encoder)
    settings = spec.fit.arguments()
    try:
        objective = ELBO(settings["objective"], settings["num_particles"], settings["free_bits"])
        with isolated_rng(torch.device("cpu"), 0):
            size = min(settings["batch_size"], len(data.train))
            batch = next(data.train.batches(size, seed=0, epoch=0, drop_last=True))
        return measure_threads(model, guide, arguments(model, batch), objective)
    except (ValueError, RuntimeError):
        # Whatever is wrong is found, and said, when it is trained.
        return Threads(torch.get_num_threads(), "as torch has it")


def sample(
    run: OpenRun,
    wanted: sampling.Wanted | None = None,
    out: Path | None = None,
    *,
    progress: bool | None = None,
) -> sampling.Drawn:
    """Draw from the model of a run and write a PNG.

    All rows of a picture are drawn from the same noise: a column shows what the label, the scale or the
    pseudoinput changes.

    Args:
        run: The run.
        wanted: What to draw, 64 images or 500 points if absent; those of a conditional model have labels of
            held-out rows.
        out: PNG file, by default one in the ``figures`` of the run that is named after what was asked for.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        SpecError: If the model or its data do not have what is asked for.
    """
    wanted = wanted or sampling.Wanted()
    plan = sampling.plan(run, wanted)
    path = out or run.folder.figures / f"{plan.name}.png"
    with sampling.watched(run.model, plan, progress):
        drawn = [
            figures.draw_samples(run.program, plan.num, wanted.seed, row.y, **plan.options, **row.options)
            for row in plan.rows
        ]
    title, bounds = _title(run.spec), figures.value_range(run.data.train)
    means, draws = ({row.text: pair[i] for row, pair in zip(plan.rows, drawn, strict=True)} for i in (0, 1))
    near = None
    if wanted.given is not None:
        given = {row.text: row.shown for row in plan.rows if row.shown is not None}
        figures.given_grid(given, means, draws, path, title, panels=plan.panels, bounds=bounds)
        u = [row.options["u"] for row in plan.rows]
        held = sampling.held_out(run.data)
        near = low_pass(run.model.pseudoinput, u, list(means.values()), list(draws.values()), held)
    elif plan.rows[0].label:
        figures.labelled_grid(means, path, title, draws=draws, panels=plan.panels, bounds=bounds)
    else:
        figures.samples(*drawn[0], path, title, panels=plan.panels, bounds=bounds)
    return sampling.Drawn(path, plan, near)


def _first_stage(
    spec: Spec,
    program: Program,
    data: Data,
    folder: RunFolder,
    device: torch.device,
    progress: bool | None,
) -> list[str]:
    """Train the autoencoder of a spec that has one, and return what is to be said about it."""
    if spec.autoencoder is None:
        return []
    stage = pretrain(spec, program, data, folder=folder.autoencoder, device=device, progress=progress)
    folder.update_manifest(autoencoder=stage.summary())
    return stage.notes()


def _measured(program: Program) -> dict[str, Any]:
    """The sigma that every evaluation of the run uses, where it was measured on the training data."""
    likelihood: Any = getattr(program.model, "likelihood", None)
    return {"sigma": likelihood.sigma.tolist()} if getattr(likelihood, "profiled", False) else {}


def proposals(program: Program, settings: Evaluate, prior_scale: float | None = None) -> dict[str, nn.Module]:
    """Return the programs that latents are drawn from, by name.

    Args:
        program: Model and guide.
        settings: Which are wanted.
        prior_scale: See :func:`pvae.guides.laplace_proposal`.

    Raises:
        SpecError: If the program has no such proposal.
    """
    wanted = settings.proposal
    if wanted == "auto":
        wanted = "both" if hasattr(program.guide, "proposal") else "own"
    found = {} if wanted == "laplace" else {"own": program.guide}
    if wanted != "own":
        try:
            found["laplace"] = laplace_proposal(*program, prior_scale)
        except (TypeError, ValueError) as error:
            raise SpecError(f"[evaluate] proposal = '{settings.proposal}': {error}") from error
    return found


def _keep(
    run: OpenRun,
    settings: Evaluate,
    estimate: LikelihoodEstimate | NestedEstimate,
    start: float,
    **of_its_own: Any,
) -> None:
    """Keep an estimate that was begun at ``start``; one with the same settings gives way."""
    run.folder.add_evaluation(
        {
            "settings": settings.model_dump(exclude={"after_training"}) | of_its_own,
            "text": str(estimate),
            "seconds": round(time.monotonic() - start, 3),
            **estimate.to_dict(),
        }
    )


def _part(data: Data, settings: Evaluate) -> Split:
    split: Split = getattr(data, settings.split)
    if settings.limit is None or settings.limit >= len(split):
        return split
    return split[torch.linspace(0, len(split) - 1, settings.limit, dtype=torch.float64).long()]


def _pictures(
    spec: Spec, folder: RunFolder, program: Program, data: Data, progress: bool | None
) -> list[Path]:
    shown, title = sampling.held_out(data), _title(spec)
    drawn = [
        figures.reconstructions(program, shown, folder.figures / "reconstructions.png", title),
        sample(OpenRun(folder, spec, data, *program), progress=progress).path,
    ]
    metrics = folder.read_metrics()
    if any("loss" in row for row in metrics):
        drawn.insert(0, figures.loss_curves(metrics, folder.figures / "losses.png", title))
    if isinstance(program.guide, FiveGuide) and any("five/health" in row for row in metrics):
        path, z_dim = folder.figures / "jacobian.png", program.guide.z_dim
        drawn.insert(1, jacobian_curves(metrics, path, title, z_dim=z_dim))
    return drawn


def _title(spec: Spec) -> str:
    return spec.description or f"{spec.model.kind} on {spec.data.name}"
