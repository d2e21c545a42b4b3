"""All benchmarks, or those that are asked for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pvae.inference.isolation import isolated_rng

from ..program import SpecError
from .alignment import time_alignment
from .evaluation import time_evaluation
from .flow_prior import time_flow_prior
from .ladder import time_ladder
from .posteriors import NETWORKS, time_posteriors
from .steps import CASES, time_steps
from .table import format_table
from .timing import Row, machine_of, sentence, threads_set

__all__ = ["BENCHMARKS", "run_bench"]

_ENGINES = ("eager", "graph")

Timer = Callable[[torch.device, int, tuple[str, ...]], list[Row]]

#: What can be measured, by name, in the order in which it is.
BENCHMARKS: dict[str, Timer] = {
    **{name: partial(time_steps, name) for name in CASES},
    "evaluation": time_evaluation,
    "cvae-nf": time_flow_prior,
    **{name: partial(time_posteriors, name) for name in NETWORKS},
    "alignment": time_alignment,
    "ladder": time_ladder,
}


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
        names: Benchmarks out of :data:`BENCHMARKS`; all if ``None``.
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
    names = tuple(BENCHMARKS) if names is None else names
    for argument, given, allowed in (
        ("benchmark", names, tuple(BENCHMARKS)),
        ("engine", engines, _ENGINES),
    ):
        for name in given:
            if name not in allowed:
                raise SpecError(f"{argument} must be one of {', '.join(allowed)}, got {name!r}")
    if rounds < 1 or threads < 1:
        raise SpecError(f"rounds and threads must be positive, got {rounds} and {threads}")
    place, rows = torch.device(device), []
    with threads_set(threads), isolated_rng(place, seed=0):
        for name in names:
            rows += BENCHMARKS[name](place, rounds, engines)
        machine = machine_of(place)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        out.with_suffix(".md").write_text(f"{sentence(machine, rounds)}\n\n{format_table(rows)}\n")
    return rows
