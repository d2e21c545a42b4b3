"""The command ``pvae``."""

import functools
import json
import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import torch
import typer

import pvae
from pvae.data import Data, DataError, MissingData, names
from pvae.evaluation import LikelihoodEstimate, NestedEstimate
from pvae.files import Busy, WriteError
from pvae.inference import NonFiniteLoss, PeerFailure, Team
from pvae.inference.checkpoint import CheckpointError, CheckpointWarning, exists
from pvae.inference.distributed import launched

from .program import SpecError
from .registry import PARTS, TABLES, nearest
from .runs import RunError, RunFolder, open_run
from .spec import load_spec, recipes

__all__ = ["app", "main"]

_BAD_INPUT, _FAILURE, _INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="pvae",
    help="Variational autoencoders as Pyro programs, with likelihoods that can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What several processes do together, as torchrun starts them.
_TOGETHER = ("train", "evaluate")

_P = ParamSpec("_P")

_Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a TOML file, or a run folder.")]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Changes, such as fit.epochs=5.")
]
_RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
_DataRoot = Annotated[Path | None, typer.Option(help="Folder of the data files (default $PVAE_DATA).")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
_Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of torch on the CPU (default: measured, kept by a run).")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGTERM, _interrupt)  # what is at work is ended in order, as by Ctrl-C
    if launched() and os.environ["RANK"] != "0":
        # One process prints results, and one what is wrong with the command line: any of them may fail later.
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # until the process ends
        warnings.simplefilter("ignore")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(code: int, sentence: object) -> NoReturn:
    """End with a sentence, or, where another process has said one first, as that one does."""
    code, first = Team.find().fail(code)
    if first:
        _speak()
        typer.echo(f"pvae: {sentence}", err=True)
    raise typer.Exit(code)


def _speak() -> None:
    """Let a process print that otherwise leaves that to the first."""
    if launched() and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__


def _guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn what a user can put right into one sentence and an exit code; anything else is a traceback."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            team = _team(command.__name__)
            with _told_at_once():
                command(*args, **kwargs)
            team.part()
        except (SpecError, DataError, RunError, Busy) as error:
            _fail(_BAD_INPUT, error)
        except (NonFiniteLoss, CheckpointError, PeerFailure, OSError) as error:
            _fail(_FAILURE, error)
        except KeyboardInterrupt:
            _fail(_INTERRUPTED, "interrupted")
        except typer.Exit:
            raise
        except Exception as error:
            if _lacks_memory(error):
                _fail(_FAILURE, f"there is not enough memory: {' '.join(str(error).split())[:200]}")
            code, first = Team.find().fail(_FAILURE)
            if first:
                _speak()
                raise
            raise typer.Exit(code) from None

    return run


def _lacks_memory(error: Exception) -> bool:
    """Whether an error is that of an allocation: Python's, NumPy's, or one of torch's."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _team(command: str) -> Team:
    """Join the other processes, where ``torchrun`` started several."""
    if launched() and command not in _TOGETHER:
        typer.echo(f"pvae: {command.strip('_')} runs in one process: start it without torchrun", err=True)
        raise typer.Exit(_BAD_INPUT)
    return Team.find()


@contextmanager
def _told_at_once() -> Iterator[None]:
    """Print what was put right in a damaged run as the sentence that it is."""

    def told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, CheckpointWarning):
            typer.echo(f"pvae: {message}", err=True)
        else:
            before(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        before, warnings.showwarning = warnings.showwarning, told
        yield


def _version(asked: bool) -> None:
    if asked:
        others = f"torch {torch.__version__}, pyro {metadata.version('pyro-ppl')}"
        typer.echo(f"pvae {pvae.__version__} ({others}, python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Variational autoencoders as Pyro programs, with likelihoods that can be trusted."""


@app.command(name="list")
@_guarded
def list_(
    as_json: _Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the parts as a Markdown table.")
    ] = False,
) -> None:
    """List recipes, data sets, and the parts that a spec may name."""
    if markdown:
        from .components import to_markdown

        typer.echo(to_markdown())
        return
    found = {name: load_spec(name).description for name in recipes()}
    parts = {table: {kind: part.about for kind, part in kinds.items()} for table, kinds in PARTS.items()}
    if as_json:
        typer.echo(json.dumps({"recipes": found, "data": names(), "parts": parts}))
        return
    _section("recipes  (pvae train RECIPE)", found)
    _section("data  ([data] name)", names())
    for table, kinds in parts.items():
        mark = {TABLES[table]: " (default)"}
        _section(
            f"{table}  ([{table}] kind)", {kind: about + mark.get(kind, "") for kind, about in kinds.items()}
        )


@app.command()
@_guarded
def train(
    recipe: _Recipe,
    overrides: _Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default runs/RECIPE-SEED).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete the run in the folder first.")] = False,
    device: _Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the run; short for fit.seed=N.")] = None,
    data_root: _DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing data files.")] = False,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Train a recipe, draw its figures, and print its held-out log-likelihood."""
    if resume and force:
        raise SpecError("--resume goes on with a run and --force deletes it: give one of the two")
    place = _place(device)
    changes = [*(overrides or []), *([] if seed is None else [f"fit.seed={seed}"])]
    spec = load_spec(recipe, changes)
    if out is None:
        is_run = Path(recipe).is_dir() and recipe not in recipes()
        out = Path(recipe) if is_run else Path("runs") / f"{Path(recipe).stem}-{spec.seed}"
    from .jobs import train as run_training

    try:
        trained = run_training(
            spec,
            out,
            resume=resume,
            force=force,
            device=place,
            root=data_root,
            download=download,
            threads=threads,
            progress=False if as_json else None,
        )
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, f"interrupted{_how_to_resume(out, device, data_root, threads)}")
    except WriteError as error:
        _fail(_FAILURE, f"{error}{_how_to_resume(out, device, data_root, threads)}")
    if as_json:
        _print_json(
            run=str(out),
            stopped=trained.run.stopped,
            steps=trained.run.steps,
            seconds=trained.run.seconds,
            threads=trained.threads.number,
            last=trained.run.history[-1] if trained.run.history else None,
            figures=[str(path) for path in trained.pictures],
            notes=trained.notes,
            evaluation=_estimates(trained.estimates) or None,
        )
        return
    typer.echo(
        f"run       {out}: {trained.run.steps} steps in {trained.run.seconds:.1f} s, {trained.run.stopped}"
    )
    typer.echo(f"threads   {trained.threads}")
    for path in trained.pictures:
        typer.echo(f"figure    {path}")
    for note in trained.notes:
        typer.echo(f"note      {note}")
    _print_estimates(spec.evaluate.split, trained.estimates)


@app.command()
@_guarded
def evaluate(
    run: _RunPath,
    num_particles: Annotated[
        int | None, typer.Option(min=1, help="Importance samples for each datum.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, valid or test.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many data, evenly spread.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Data per pass of the decoder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the importance samples.")] = None,
    proposal: Annotated[
        str | None, typer.Option(help="What z is drawn from: own (the guide), laplace, both or auto.")
    ] = None,
    device: _Device = "auto",
    data_root: _DataRoot = None,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Estimate the held-out log-likelihood of a run; what is not given is as in its [evaluate]."""
    place = _place(device)
    asked = {
        "num_particles": num_particles,
        "split": split,
        "limit": limit,
        "seed": seed,
        "proposal": proposal,
    }
    changes = [f"evaluate.{key}={value}" for key, value in asked.items() if value is not None]
    from .jobs import evaluate as run_evaluation
    from .jobs import use_threads_of

    opened = open_run(run, root=data_root, device=place)
    use_threads_of(opened, threads)
    status = opened.folder.read_manifest().get("status", "of unknown end, as its manifest is missing")
    if status not in ("finished", "early"):
        typer.echo(f"pvae: the training of {run} is {status}: this is its last checkpoint", err=True)
    settings = load_spec(run, changes).evaluate
    estimates = run_evaluation(opened, settings, batch_size=batch_size, progress=False if as_json else None)
    if as_json:
        _print_json(run=str(run), split=settings.split, **_estimates(estimates))
    else:
        _print_estimates(settings.split, estimates)


@app.command()
@_guarded
def diagnose(
    run: _RunPath,
    ood: Annotated[
        list[str] | None,
        typer.Option(help="A data set from elsewhere: emnist, or NAME,key=value; may be repeated."),
    ] = None,
    num_data: Annotated[
        int, typer.Option(min=20, help="At most so many data of each part, evenly spread.")
    ] = 2000,
    num_samples: Annotated[int, typer.Option(min=1, help="Draws of the latents for each datum.")] = 16,
    num_particles: Annotated[
        int | None, typer.Option(min=1, help="Particles of log p(x) as one more score (default none).")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Conformal tests are calibrated on: valid (default), or test, half of it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    budget: Annotated[
        str,
        typer.Option(help="quick (about 1 minute on two cores), standard (10 minutes) or full (an hour)."),
    ] = "quick",
    only: Annotated[
        list[str] | None,
        typer.Option(help="A part by its name, such as likelihood or gaps; may be repeated."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute again what earlier diagnoses found.")
    ] = False,
    device: _Device = "auto",
    data_root: _DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing data files.")] = False,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Judge a run within a budget: its likelihood with evidence, posterior, prior, samples and more.

    Each part is kept in the run folder as soon as it is found; after a break, and within a larger budget, the
    same command goes on. `pvae report RUN` shows all of it on one page.
    """
    place = _place(device)
    from .diagnosing import Wanted
    from .evidence import judge
    from .jobs import use_threads_of
    from .telling import Teller, to_json

    wanted = Wanted(tuple(ood or ()), num_data, num_samples, num_particles, calibration, seed)
    opened = open_run(run, root=data_root, device=place)
    use_threads_of(opened, threads)
    teller = Teller(opened.folder, typer.echo, progress=not as_json and sys.stderr.isatty())
    try:
        found = judge(
            opened,
            wanted,
            budget=budget,
            only=tuple(only or ()),
            fresh=fresh,
            root=data_root,
            download=download,
            progress=False if as_json else None,
            begun=teller.begun,
            ended=None if as_json else teller.ended,
        )
    except KeyboardInterrupt:
        kept = f"finished parts are kept in {opened.folder.evidence}: the same command goes on"
        _fail(_INTERRUPTED, f"interrupted, {kept}")
    if as_json:
        _print_json(run=str(run), **to_json(opened.folder, found))
        return
    teller.summary(found, budget)


@app.command()
@_guarded
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file (default report.html in the folder of the run, or here for several)."),
    ] = None,
    data_root: _DataRoot = None,
    as_json: _Json = False,
) -> None:
    """Write one HTML page that shows runs and what diagnoses found, complete in itself."""
    from .report import write_report

    path = write_report(runs, out, root=data_root)
    if as_json:
        _print_json(page=str(path), bytes=path.stat().st_size)
    else:
        typer.echo(str(path))


@app.command()
@_guarded
def sample(
    run: _RunPath,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="Number of draws (default 64, or 8 for each row; of points 500 or 100)."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A row for each class: 0..9, or 0,3,7, or names.")
    ] = None,
    attributes: Annotated[
        list[str] | None,
        typer.Option(help="A row with these attributes: bordered=1,dotted=1, or rare; may be repeated."),
    ] = None,
    sampling: Annotated[
        str | None, typer.Option(help="exact, or paper (the base of a flow prior, without its inverse).")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the latents' standard deviation.")] = None,
    scale_mode: Annotated[
        str | None, typer.Option(help="within the components of the prior, or global about its mean.")
    ] = None,
    scale_sweep: Annotated[
        bool, typer.Option("--scale-sweep", help="A row for each of seven scales.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Factor of the variances of all priors of a ladder.")
    ] = None,
    temperature_sweep: Annotated[
        bool, typer.Option("--temperature-sweep", help="A row for each of seven temperatures.")
    ] = False,
    given: Annotated[
        int | None,
        typer.Option(min=1, help="A row for each of so many held-out images: draws that share its low-pass."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file (default in RUN/figures, named for what is drawn).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws, and of the choice of images.")] = 0,
    device: _Device = "auto",
    data_root: _DataRoot = None,
    as_json: _Json = False,
) -> None:
    """Draw from the model of a run and write them as one picture."""
    place = _place(device)
    from .jobs import sample as run_sampling
    from .sampling import Wanted

    wanted = Wanted(
        num,
        seed,
        labels,
        attributes or (),
        sampling,
        scale,
        scale_mode,
        scale_sweep,
        temperature,
        temperature_sweep,
        given,
    )
    opened = open_run(run, root=data_root, device=place)
    path, plan, low_pass = run_sampling(opened, wanted, out, progress=False if as_json else None)
    if as_json:
        rows = [row for row in (row.to_dict() for row in plan.rows) if row]
        asked = {"num": plan.num, "seed": seed, "options": plan.options, "rows": rows}
        near = {} if low_pass is None else {"low_pass": low_pass._asdict()}
        _print_json(run=str(run), **asked, **near, figure=str(path))
        return
    typer.echo(str(path))
    if low_pass is not None:
        typer.echo(f"note      {low_pass}")


@app.command()
@_guarded
def explain(
    recipe: _Recipe, overrides: _Overrides = None, data_root: _DataRoot = None, as_json: _Json = False
) -> None:
    """Print the joint density, the guide and the objective of a recipe or run in symbols."""
    spec = load_spec(recipe, overrides or [])
    from .explain import explain as explained
    from .explain import num_parameters

    data: Data | None = None
    try:
        data = spec.load_data(data_root)
    except MissingData as error:
        typer.echo(f"pvae: without its data a spec is explained without sizes: {error}", err=True)
    program = None if data is None else spec.build(data)
    text = explained(spec, data, program)
    if as_json:
        counts = None if program is None else num_parameters(program)
        _print_json(text=text, parameters=counts, spec=spec.model_dump())
    else:
        typer.echo(text)


@app.command()
@_guarded
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    as_json: _Json = False,
) -> None:
    """Print the estimates of several runs: seeds share a row, protocols never share a table."""
    from .compare import compare as compared
    from .compare import to_markdown

    tables = compared(runs)
    if as_json:
        _print_json(**{protocol: [row.to_dict() for row in rows] for protocol, rows in tables.items()})
        return
    for protocol, rows in tables.items():
        typer.echo(f"{protocol}\n\n{to_markdown(rows)}\n")


@app.command()
@_guarded
def reproduce(
    paper: Annotated[str | None, typer.Argument(metavar="PAPER", help="A study; see --list.")] = None,
    scale: Annotated[str, typer.Option(help="smoke (seconds), cpu (an hour or so), full (GPU).")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder (default runs/reproduce/PAPER-SCALE).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes of one thread each.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Part of the cells' names, such as mnist; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is left to do and stop.")] = False,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Write the tables of the cells that are finished.")
    ] = False,
    list_studies: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, ... (default cpu; auto at full scale).")
    ] = None,
    data_root: _DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing data files.")] = False,
    as_json: _Json = False,
) -> None:
    """Run a paper's study, or what is left of it: every configuration with every seed, then the tables."""
    from .reproduce import SCALES, STUDIES, Context, plan
    from .reproduce import report as write_report
    from .reproduce import run as run_study

    if list_studies:
        found = {name: study.about for name, study in STUDIES.items()}
        if as_json:
            _print_json(**found)
        else:
            _section("studies  (pvae reproduce PAPER)", found)
        return
    if paper not in STUDIES:
        said = "PAPER must be given" if paper is None else f"there is no study '{paper}'"
        raise SpecError(f"{said}{nearest(paper or '', STUDIES)}")
    if scale not in SCALES:
        raise SpecError(f"unknown --scale '{scale}'{nearest(scale, SCALES)}")
    if dry_run and tables_only:
        raise SpecError("--dry-run and --tables-only exclude one another: give one of the two")
    study, folder = STUDIES[paper], out or Path("runs") / "reproduce" / f"{paper}-{scale}"
    if not tables_only:
        place = _place(device or ("auto" if scale == "full" else "cpu"))
        context = Context(folder, study.scales[scale], place, data_root, download)
        if dry_run:
            left = plan(study, context, only or ())
            minutes = left.seconds / min(jobs, max(1, len(left.missing))) / 60
            if as_json:
                _print_json(
                    cells=[cell.name for cell in left.cells],
                    missing=[cell.name for cell in left.missing],
                    minutes=minutes,
                )
                return
            for cell in left.missing:
                typer.echo(cell.name)
            done = len(left.cells) - len(left.missing)
            typer.echo(
                f"{len(left.cells)} cells, {done} finished, {len(left.missing)} to run: "
                f"about {minutes:.0f} min with --jobs {jobs}"
            )
            return
        try:
            run_study(study, scale, context, jobs=jobs, only=only or (), progress=False if as_json else None)
        except KeyboardInterrupt:
            _fail(_INTERRUPTED, f"interrupted, finished cells are kept in {folder}: the same command goes on")
    files = write_report(study, folder)
    if as_json:
        _print_json(study=paper, scale=scale, files=[str(path) for path in files])
        return
    for path in files:
        typer.echo(str(path))


@app.command()
@_guarded
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Benchmarks; if none, all those against hand-written PyTorch. recipes: every recipe against "
            "its bare networks; recipe:NAME: one of them; peers: other libraries.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are printed.")] = 11,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="eager, traced, graph, cuda_graph; may be repeated (default: see the docs)."),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch on the CPU (default: one for a small net).")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    compare_to: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OLD.json",
            help="A run that --out wrote: name what got slower, and exit with 1.",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Time training steps and evaluations against hand-written PyTorch, bare networks, or other libraries."""
    place = _place(device)
    from .bench import compare as compared
    from .bench import format_table, machine_of, read_stored, run_bench

    stored = None if compare_to is None else read_stored(compare_to)
    rows = run_bench(
        device=device,
        rounds=rounds,
        names=tuple(names) if names else None,
        engines=tuple(engine) if engine else None,
        threads=threads,
        out=out,
    )
    found = None if stored is None else compared(stored, rows, machine_of(place) | {"threads": threads})
    if as_json:
        _print_json(rows=rows, **({} if found is None else {"compare": found.to_dict()}))
    else:
        typer.echo(format_table(rows))
        if found is not None:
            typer.echo(f"\n{found}")
    if found is not None and found.slower:
        raise typer.Exit(_FAILURE)


def _place(device: str) -> torch.device:
    """Check the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = Team.find().place(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError):
        raise SpecError(f"--device must name a device of this machine, such as cpu, got '{device}'") from None
    except ValueError as error:
        raise SpecError(f"--device {device}: {error}") from None
    return place


def _how_to_resume(out: Path, device: str, data_root: Path | None, threads: int | None) -> str:
    """Say what is left of a run that was broken off, and the command that goes on with it."""
    if not RunFolder(out).spec.is_file():
        return " before training began"
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return ": go on with the command that started it on each machine, and --resume"
    start = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "-m"] if launched() else []
    command = [*start, "pvae", "train", str(out), "--resume"]
    command += [] if device == "auto" else ["--device", device]
    command += [] if data_root is None else ["--data-root", str(data_root)]
    command += [] if threads is None else ["--threads", str(threads)]
    kept = "the last checkpoint is kept" if exists(out) else "before the first checkpoint"
    return f", {kept}: go on with  {shlex.join(command)}"


def _estimates(estimates: Sequence[LikelihoodEstimate | NestedEstimate]) -> dict[str, Any]:
    """Estimates without their data: one as it is, more in a list with what follows from them."""
    records = [
        {key: value for key, value in estimate.to_dict().items() if key != "per_datum"}
        for estimate in estimates
    ]
    if len(records) < 2:
        return records[0] if records else {}
    return {"estimates": records, **_conclusions(estimates)}


def _print_estimates(split: str, estimates: Sequence[LikelihoodEstimate | NestedEstimate]) -> None:
    for estimate in estimates:
        typer.echo(f"{split:<9} {estimate}")
    for name, sentence in _conclusions(estimates).items():
        typer.echo(f"{name:<9} {sentence}")


def _conclusions(estimates: Sequence[LikelihoodEstimate | NestedEstimate]) -> dict[str, str]:
    """What follows from several estimates of one run: of the first full and nested ones, and of two full
    ones.
    """
    from .jobs import better_bound, compare_bounds

    full = [estimate for estimate in estimates if isinstance(estimate, LikelihoodEstimate)]
    nested = [estimate for estimate in estimates if isinstance(estimate, NestedEstimate)]
    return {
        **({"bounds": compare_bounds(full[0], nested[0])} if nested else {}),
        **({"better": better_bound(*full)} if len(full) > 1 else {}),
    }


def _print_json(**record: Any) -> None:
    typer.echo(json.dumps(record))


def _section(title: str, rows: dict[str, str] | list[str]) -> None:
    """Print names, with what they are where that is known."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    if isinstance(rows, dict):
        table.add_column(no_wrap=True)
        for name, about in rows.items():
            table.add_row(Text(name, style="cyan"), Text(about))
    else:
        table.add_row(Text(", ".join(rows), style="cyan"))
    console.print(Padding(table, (0, 0, 1, 2)))
