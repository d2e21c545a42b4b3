"""What a training step and an evaluation cost, as ratios to hand-written PyTorch (see docs/benchmarks.md)."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae.data import Split, from_tensors
from pvae.guides import NormalGuide
from pvae.inference import registered
from pvae.inference.isolation import isolated_rng
from pvae.inference.trainer import Trainer
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import ConvDecoder, ConvEncoder, LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import ConditionalFlowPrior, CouplingFlow, StandardNormal

from ._hand_loops import HandLoop, HandVAE, conv_vae, mlp_vae
from .program import Program, SpecError

__all__ = ["CASES", "SyncCounter", "count_syncs", "format_table", "interleave", "run_bench"]

_BATCH_SIZE = 128
_ENGINES = ("eager", "graph")
_SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
_NUM_IMAGES, _NUM_PARTICLES = 100, 1000
_FLOW_STEPS = 20
_EVALUATION, _FLOW = "evaluation", "cvae-nf"

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One pair of programs, built with the library and by hand.

    Attributes:
        x_shape: Shape of one datum.
        z_dim: Size of z.
        hidden: Widths of the encoder's hidden layers; empty for the convolutional networks.
        steps: Steps in one round: a tenth of a second to half a second.
        eager_target: Largest ratio of the eager step to the eager loop that the design asks for.
    """

    x_shape: tuple[int, ...]
    z_dim: int
    hidden: tuple[int, ...]
    steps: int
    eager_target: float

    def program(self) -> Program:
        """Build model and guide with the library."""
        encoder: nn.Module
        decoder: nn.Module
        if self.hidden:
            encoder = MLPEncoder(self.x_shape, self.z_dim, self.hidden)
            decoder = MLPDecoder(self.z_dim, self.x_shape, self.hidden[::-1])
        else:
            encoder, decoder = ConvEncoder(self.x_shape, self.z_dim), ConvDecoder(self.z_dim, self.x_shape)
        return Program(VAE(StandardNormal(self.z_dim), decoder, Bernoulli()), NormalGuide(encoder))

    def hand(self) -> HandVAE:
        """Build the same networks by hand."""
        return (
            mlp_vae(torch.Size(self.x_shape).numel(), self.hidden, self.z_dim)
            if self.hidden
            else conv_vae(self.z_dim)
        )

    def levels(self) -> Tensor:
        """Draw grey images, uint8, as many as one round takes."""
        return torch.randint(256, (self.steps * _BATCH_SIZE, *self.x_shape), dtype=torch.uint8)


#: The step benchmarks: digits size, MNIST size, and convolutions. The steps of each are about as long as a
#: round of the others.
CASES: dict[str, Case] = {
    "small": Case((1, 8, 8), z_dim=8, hidden=(64,), steps=100, eager_target=2.0),
    "medium": Case((1, 28, 28), z_dim=20, hidden=(400, 400), steps=25, eager_target=1.1),
    "conv": Case((1, 28, 28), z_dim=20, hidden=(), steps=5, eager_target=1.1),
}


class SyncCounter(TorchDispatchMode):
    """Counts operations that wait for the device, such as ``.item()`` and ``bool(tensor)``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in _SYNCS
        return func(*args, **(kwargs or {}))


def run_bench(
    *,
    device: str,
    rounds: int,
    names: tuple[str, ...] | None,
    engines: tuple[str, ...],
    threads: int,
    out: Path | None,
) -> list[Row]:
    """Measure every benchmark that is asked for.

    On a CPU the clock is the process's CPU time, elsewhere wall time of a synchronised device.

    Args:
        device: Where to run.
        rounds: Interleaved rounds; the order within a round is reversed each time.
        names: Benchmarks out of ``small``, ``medium``, ``conv``, ``evaluation``, ``cvae-nf``; all if
            ``None``.
        engines: Engines out of ``eager``, ``graph``.
        threads: Threads of torch on the CPU.
        out: JSON file for rows and machine; the table goes beside it as Markdown.

    Returns:
        One row per comparison: ``benchmark``, ``ours``, ``yardstick``, medians ``ours_ms`` and
        ``yardstick_ms`` (per step or evaluation), ``ratio`` (median of the rounds' ratios), its quartiles
        ``low`` and ``high``, ``target`` (``None`` where the design names none), ``rounds``, and ``syncs``
        (host synchronisations of one step; ``None`` for an evaluation).

    Raises:
        SpecError: For an unknown benchmark or engine, or numbers that are not positive.
    """
    known = (*CASES, _EVALUATION, _FLOW)
    names = known if names is None else names
    for argument, given, allowed in (("benchmark", names, known), ("engine", engines, _ENGINES)):
        for name in given:
            if name not in allowed:
                raise SpecError(f"{argument} must be one of {', '.join(allowed)}, got {name!r}")
    if rounds < 1 or threads < 1:
        raise SpecError(f"rounds and threads must be positive, got {rounds} and {threads}")
    place, rows = torch.device(device), []
    with _threads(threads), isolated_rng(place, seed=0):
        for name in names:
            if name == _EVALUATION:
                rows += _evaluation(place, rounds)
            elif name == _FLOW:
                rows += _flow_prior(place, rounds, engines)
            else:
                rows += _steps(name, place, rounds, engines)
        machine = _machine(place)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        out.with_suffix(".md").write_text(f"{_sentence(machine, rounds)}\n\n{format_table(rows)}\n")
    return rows


def format_table(rows: list[Row]) -> str:
    """Lay rows out as a Markdown table that can be read as plain text, too."""
    head = (
        "benchmark",
        "ours",
        "yardstick",
        "ours ms",
        "yardstick ms",
        "ratio",
        "quartiles",
        "target",
        "syncs",
    )
    table = [head, *(_cells(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    target = "" if row["target"] is None else f"{row['target']:.2f} {'met' if _met(row) else 'missed'}"
    return (
        f"{row['benchmark']}",
        f"{row['ours']}",
        f"{row['yardstick']}",
        f"{row['ours_ms']:.2f}",
        f"{row['yardstick_ms']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        target,
        "" if row["syncs"] is None else f"{row['syncs']}",
    )


def _met(row: Row) -> bool:
    ratio, target = row["ratio"], row["target"]
    assert isinstance(ratio, float)
    assert isinstance(target, float)
    return ratio <= target


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time contenders in turn, every second round backwards, so that all see the same machine.

    Args:
        contenders: What to run, by name; each runs once untimed first.
        rounds: Number of rounds.
        clock: Returns seconds.

    Returns:
        Seconds of each round, by name.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
    return seconds


def count_syncs(program: Program, split: Split, engine: str) -> int:
    """Count the host synchronisations of one training step, drawing of the batch included.

    The graph engine is counted by its graph, before compilation: inductor adds no wait.
    """
    trainer = Trainer(*program, total_steps=2, engine=engine, compile=False, window=2)
    with trainer.generator():
        batches = split.batches(min(_BATCH_SIZE, len(split) // 2), seed=0, epoch=0, drop_last=True)
        trainer.step(next(batches))  # traces, and makes the optimiser's state
        with SyncCounter() as counter:
            trainer.step(next(batches))
    return counter.count


def _steps(name: str, device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time each engine's step against the loop, the compiled loop (graph alone), and stock SVI."""
    case = CASES[name]
    levels = case.levels()
    split = from_tensors(levels, binarize="dynamic").train.to(device)
    loops = {"loop": False, "loop, compiled": True} if "graph" in engines else {"loop": False}
    contenders: dict[str, Callable[[], object]] = {
        loop: partial(
            HandLoop(case.hand().to(device), levels.to(device), _BATCH_SIZE, compiled).run, case.steps
        )
        for loop, compiled in loops.items()
    }
    contenders["stock SVI"] = _stock(_placed(case.program(), device), split, case.steps)
    syncs = {}
    for engine in engines:
        syncs[engine] = count_syncs(_placed(case.program(), device), split, engine)
        contenders[engine] = _training(_placed(case.program(), device), split, engine, case.steps)
    seconds = interleave(contenders, rounds, _clock(device))
    comparisons: dict[str, list[tuple[str, float | None]]] = {
        "eager": [("loop", case.eager_target), ("stock SVI", None)],
        "graph": [("loop", 0.95), ("loop, compiled", 1.05), ("stock SVI", None)],
    }
    return [
        _row(name, engine, yardstick, seconds, case.steps, target, syncs[engine])
        for engine in engines
        for yardstick, target in comparisons[engine]
    ]


def _placed(program: Program, device: torch.device) -> Program:
    return Program(program.model.to(device), program.guide.to(device))


def _training(program: Program, split: Split, engine: str, steps: int) -> Callable[[], object]:
    """Return one round of what the inside of :func:`pvae.fit` does between two rows of its history."""
    trainer = Trainer(*program, total_steps=10**9, engine=engine, window=steps)

    def run() -> dict[str, float]:
        epoch = trainer.step_count // steps
        with trainer.generator():
            for batch in split.batches(_BATCH_SIZE, seed=0, epoch=epoch, drop_last=True):
                trainer.step(batch)
        return trainer.read_losses()

    return run


def _stock(program: Program, split: Split, steps: int) -> Callable[[], object]:
    """Return one round of Pyro's own SVI with its validation off; it reads each loss back."""
    svi = SVI(
        registered(program.model, "model"),
        registered(program.guide, "guide"),
        pyro.optim.Adam({"lr": 1e-3}),
        Trace_ELBO(),
    )
    with pyro.get_param_store().scope() as own:
        pass

    def run() -> None:
        # A param store of its own, which keeps what is trained from round to round.
        with pyro.get_param_store().scope(own), pyro.validation_enabled(False):
            for batch in split.batches(_BATCH_SIZE, seed=0, epoch=0, drop_last=True):
                svi.step(batch.x)

    return run


def _evaluation(device: torch.device, rounds: int) -> list[Row]:
    """Time ``log_likelihood`` of the medium programs against decoder passes over the same chunks of rows,
    alone and with the density of x, which no likelihood can do without."""
    case = CASES["medium"]
    program = _placed(case.program(), device)
    x = (torch.rand(_NUM_IMAGES, *case.x_shape) < 0.5).float().to(device)

    def ours() -> object:
        return pvae.log_likelihood(*program, x, num_particles=_NUM_PARTICLES, progress=False)

    model: Any = program.model
    decoder = model.decoder
    chunks = [torch.randn(shape, device=device) for shape in _decoder_inputs(decoder, ours)]

    def passes() -> None:
        with torch.inference_mode():
            for z in chunks:
                decoder(z)

    def scored() -> None:
        with torch.inference_mode():
            for z in chunks:
                logits = decoder(z)
                target = x[: z.shape[-2]].expand_as(logits)
                F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(2).sum(-1)

    seconds = interleave(
        {"log_likelihood": ours, "decoder": passes, "decoder + density": scored},
        rounds,
        _clock(device),
    )
    return [
        _row(_EVALUATION, "log_likelihood", "decoder", seconds, 1, 1.1, None),
        _row(_EVALUATION, "log_likelihood", "decoder + density", seconds, 1, None, None),
    ]


def _flow_prior(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time the step of CVAE-NF at the size of its MNIST recipe against the same CVAE under N(0, I)."""
    levels = torch.randint(256, (_FLOW_STEPS * _BATCH_SIZE, 1, 28, 28), dtype=torch.uint8)
    data = from_tensors(levels, y=torch.arange(len(levels)) % 10, class_names="0123456789", dequantize=True)
    split = data.train.to(device)
    rows = []
    for engine in engines:
        programs = {flow: _placed(_conditional(flow), device) for flow in (True, False)}
        syncs = count_syncs(_placed(_conditional(True), device), split, engine)
        contenders = {
            engine if flow else "N(0, I)": _training(program, split, engine, _FLOW_STEPS)
            for flow, program in programs.items()
        }
        seconds = interleave(contenders, rounds, _clock(device))
        rows.append(_row(_FLOW, engine, "N(0, I)", seconds, _FLOW_STEPS, 1.5, syncs))
    return rows


def _conditional(flow: bool) -> Program:
    """A CVAE of labels 0 to 9, under the flow prior or the standard normal."""
    z_dim, x_shape, hidden = 16, (1, 28, 28), (400, 200)

    def labels() -> LabelEmbedding:
        return LabelEmbedding(LabelSpace("class", 10), 64)

    prior = (
        ConditionalFlowPrior(z_dim, labels(), CouplingFlow(z_dim, context_dim=64))
        if flow
        else StandardNormal(z_dim)
    )
    decoder = MLPDecoder(z_dim, x_shape, hidden[::-1], "silu", labels=labels())
    encoder = MLPEncoder(x_shape, z_dim, hidden, "silu", labels=labels())
    return Program(ConditionalVAE(prior, decoder, Normal("batch", 0.3)), NormalGuide(encoder))


def _decoder_inputs(decoder: nn.Module, run: Callable[[], object]) -> list[torch.Size]:
    """Shapes of what ``run`` hands to the decoder, all but the one-datum check at the start."""
    shapes: list[torch.Size] = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        run()
    finally:
        hook.remove()
    return [shape for shape in shapes if shape[:-1].numel() > 1]


def _row(
    benchmark: str,
    ours: str,
    yardstick: str,
    seconds: dict[str, list[float]],
    units: int,
    target: float | None,
    syncs: int | None,
) -> Row:
    ratios = [a / b for a, b in zip(seconds[ours], seconds[yardstick], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "benchmark": benchmark,
        "ours": ours,
        "yardstick": yardstick,
        "ours_ms": 1e3 * statistics.median(seconds[ours]) / units,
        "yardstick_ms": 1e3 * statistics.median(seconds[yardstick]) / units,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "target": target,
        "rounds": len(ratios),
        "syncs": syncs,
    }


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU time, which a busy machine disturbs least; on another device the time until it is done."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: torch.device) -> Row:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if device.type == "cpu" else "wall time, synchronised",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pvae": pvae.__version__,
    }


def _processor() -> str:
    """Name of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _sentence(machine: Row, rounds: int) -> str:
    """One line that says what a table was measured on."""
    return (
        f"{machine['device']}, {machine['threads']} thread(s); {machine['clock']}; {rounds} rounds; "
        f"torch {machine['torch']}, Python {machine['python']}, pvae {machine['pvae']}."
    )
